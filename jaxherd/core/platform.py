"""Which platform a program is being traced for.

Never ask `jax.default_backend()` while tracing: a program compiled ahead of time for a TPU is
traced on a machine whose default backend is the CPU.
"""

import jax

from jaxherd.core import sharding


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": of the active mesh, or else of the default backend."""
    partitioner = sharding.active()
    if partitioner is not None:
        name = partitioner.mesh.devices.flat[0].platform
    else:
        name = jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
