"""Memory of the host as programs on CPU use it."""

import ctypes
import sys

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, for programs that run on CPU; returns whether it does.

    XLA on CPU takes its scratch memory anew at every call.  Large blocks then come from the kernel
    page by page each time, which is a quarter of a training step of a small model: one million
    page faults for SmolLM2-135M.  One arena that neither maps blocks apart nor gives memory back
    serves them from pages that are there.  Without glibc nothing changes.

    To be called before jax starts its threads.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all(mallopt(name, value) == 1 for name, value in settings)
