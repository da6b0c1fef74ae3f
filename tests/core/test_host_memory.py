"""Memory that is freed stays with the process: large blocks come back without page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from jaxherd.core.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = np.ones(200_000_000, np.uint8)
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    found = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True,
                                check=True).stdout)
        for how in ("keep", "leave")
    }  # fmt: skip
    assert found["keep"] * 10 < found["leave"]
