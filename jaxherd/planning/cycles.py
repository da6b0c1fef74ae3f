"""The TPU compiler's own cycle estimates of every operation of a program, Pallas kernels included.

libtpu writes them where `LIBTPU_INIT_ARGS` asks for a static profile.  They price the instructions
of one device (on v5p both cores share a grid) and hardly the memory: take the larger of them and bytes / bandwidth.  They do not hold
where a grid or its index maps depend on data, and some operations end the process that asks
(hence a child): then the program has no estimate.
"""

import dataclasses
import re
import tempfile
from pathlib import Path

from jaxherd.core.chips import CHIPS
from jaxherd.planning.mosaic import compile_in_child

_SUFFIX = "_static_llo_profile.textproto"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the compiler says of one program on one device.

    Attributes:
      operations: estimated cycles by name of the operation, on the TensorCore.
      bytes: moved in HBM: as given, or operands, results and temporaries (written and read) once.
        XLA's cost analysis is not used: it counts a prefetch into VMEM as two accesses more.
      floor: cycles that the bytes take at the chip's full bandwidth.
    """

    operations: dict[str, int]
    bytes: float
    floor: float

    @property
    def compute(self) -> int:
        """Cycles of all operations, one after the other."""
        return sum(self.operations.values())

    @property
    def cycles(self) -> float:
        """The larger of compute and floor: no program takes less, by this model."""
        return max(float(self.compute), self.floor)


def estimate(
    chip: str,
    case: str,
    arguments: dict | None = None,
    *,
    moved: float | None = None,
    timeout: int | float = 540,
) -> Estimate:
    """Compile a case (`mosaic.look`) in a child process and read its cycles.

    Args:
      chip, case, arguments, timeout: as for `mosaic.look`.
      moved: HBM bytes, where the caller knows them (a kernel that reads a block more than once).
    Raises:
      JaxherdError: an unknown chip, a program that does not compile, or an operation that the
        profile cannot price.
    """
    with tempfile.TemporaryDirectory(prefix="jaxherd-cycles-") as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}"
        costs = compile_in_child(chip, case, arguments, flags, timeout)
        operations = read_profiles(folder)
    device = CHIPS[chip]
    bandwidth = device.hbm_bytes_per_s / device.devices_per_chip
    total = costs["operand_bytes"] + 2 * costs["temp_bytes"] if moved is None else moved
    return Estimate(operations, float(total), total / bandwidth * device.clock_hz)


def read_profiles(folder: str | Path) -> dict[str, int]:
    """Return estimated cycles by operation, of the files of a static profile."""
    found = {}
    for path in sorted(Path(folder).rglob(f"*{_SUFFIX}")):
        match = re.search(r"estimated_cycles: *(\d+)", path.read_text(errors="replace"))
        if match:
            found[path.name.removesuffix(_SUFFIX)] = int(match[1])
    return found
