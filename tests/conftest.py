"""Eight fake CPU devices, one cache of compiled programs for the session, quiet logs."""

import os
import tempfile

# Before the first import of jax, also in the processes that tests start.
_FLAG = "--xla_force_host_platform_device_count"
# Tiny programs run once: compiling them is the time that counts.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8 {_QUICK}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("ABSL_MIN_LOG_LEVEL", "3")
# Where the TPU compiler is installed, it must not look for a TPU of this machine.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="jaxherd-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "jaxherd",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("jaxherd")


@pytest.fixture(scope="session")
def devices() -> list:
    """Eight fake CPU devices."""
    found = jax.devices("cpu")
    assert len(found) >= 8, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"
    return found[:8]


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Let go of a module's compiled programs when it ends.

    Each holds mappings of memory, of which a process may have 65,530 (vm.max_map_count): all tests
    in one process would need more, and the compiler then ends the process.
    """
    yield
    jax.clear_caches()
