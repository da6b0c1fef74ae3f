"""What a compiled TPU program holds in HBM, from the compiler's own buffer assignment.

`memory_analysis()` counts some buffers of large donated programs twice: Scout's step for v6e:8x16
came out at 33.8 GiB and compiled for chips of 31.25, where the compiler refuses what does not fit;
its buffer assignment held 26.8.  XLA writes that assignment as text when it is asked for.
"""

import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

_SPACE = re.compile(r"^Memory Space: (\w+) \(color=(\d+)\)\nTotal bytes: (\d+)", re.MULTILINE)


def compile_measured(lowered: Any, options: Mapping[str, Any]) -> tuple[Any, int | None]:
    """Compile a lowered program for TPU; return it and the HBM bytes of its buffers per device.

    The bytes are arguments, results and temporaries together, None where the compiler wrote no
    assignment.
    """
    with tempfile.TemporaryDirectory(prefix="jaxherd-plan-") as folder:
        compiled = lowered.compile(compiler_options={**options, "xla_dump_to": folder})
        reports = pathlib.Path(folder).glob("*after_optimizations-memory-usage-report.txt")
        totals = [hbm_bytes(path.read_text(encoding="utf-8")) for path in reports]
    # A program may come with small helpers of its own.
    return compiled, max((total for total in totals if total is not None), default=None)


def hbm_bytes(report: str) -> int | None:
    """Return the bytes in HBM (memory space 0) that a usage report states, if it does."""
    return next((int(size) for _, color, size in _SPACE.findall(report) if color == "0"), None)
