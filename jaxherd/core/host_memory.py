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


def available_bytes() -> int | None:
    """Return the bytes that a program can still have without others suffering; None if unknown.

    The least of what the kernel says and what this process's control group leaves.
    """
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            found.append(max(0, limit - int(file.read())))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return min(found) if found else None
