"""Compile for NVIDIA H100s on a machine without one, through the CUDA plugin of JAX.

`core.targets.abstract_devices(parse_target("h100:8"))` gives the devices and `compile_plan` the
plan; this module says whether that is possible here.  It shows that a program lowers, compiles and
what memory it takes; XLA's GPU text has no cycle estimates, so nothing is said of speed beyond the
roofline.
"""

import importlib.util

from jaxherd.core.errors import missing_extra


def cuda_compiler_available() -> bool:
    """Whether JAX's CUDA plugin is installed; no driver and no GPU is needed to compile."""
    return importlib.util.find_spec("jax_cuda12_plugin") is not None


def require_cuda_compiler() -> None:
    """Raise the error that names the extra, where the plugin is absent.

    Raises:
        JaxherdError: jax[cuda12] is not installed.
    """
    if not cuda_compiler_available():
        raise missing_extra("jax-cuda12-plugin", "cuda", "Compiling for a GPU")
