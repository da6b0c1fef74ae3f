"""What the TPU compiler made of a Pallas kernel: instruction bundles, matrix-unit use, spills.

libtpu writes its schedule of each operation as text when `LIBTPU_INIT_ARGS` asks for it; the
variable is read once per process, so a case is compiled in a child process:

    look("v5p", "tests/benchmarks/kernels/grouped.py:case", {"name": "ours"}) -> [KernelCode, ...]

where `case(**arguments)` returns (function, abstract arguments as (shape, dtype name) pairs).
Also as a command: `python -m jaxherd.planning.mosaic v5p FILE.py:FUNCTION '{"name": "ours"}'`.

A kernel's code is cut into regions at its control targets (loop bodies, predicated blocks).  Bundles
are static: a region of a rolled loop counts once, and both branches of a condition count.  They are
the compiler's model of one core, not a measurement.
"""

import dataclasses
import glob
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jaxherd.core.errors import JaxherdError, nearest

TOPOLOGIES: Mapping[str, str] = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}

_TARGET = re.compile(r"^ *(0x[0-9a-f]+|0) +(LH|LB|LE|PB|PF|CT)\b")
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:\w\w)?:")
_SUMMARY = "-schedule-analysis_final_bundles.txt"
_UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"


@dataclasses.dataclass(frozen=True)
class Region:
    """Consecutive bundles between two control targets.

    Attributes:
      kind: the target it starts with: "LB" loop body, "PB" predicated body, "PF" fallthrough,
        "LE" loop exit, "" the entry.
      bundles: how many there are.
      matmul_bundles: from the first to the last bundle that uses the matrix unit.
      used: slots used over the region, by unit ("MXU", "VALU", "VLOAD:FILL", ...).
      occupancy: MXU slots used / (capacity x matmul_bundles); 0 without a matmul.
    """

    kind: str
    bundles: int
    matmul_bundles: int
    used: dict[str, int]
    occupancy: float


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """One kernel as scheduled.

    Attributes:
      name: of the operation, as `pallas_call(name=...)` gave it, with XLA's suffix.
      bundles: of the whole kernel.
      capacity: slots of a bundle, by unit.
      regions: in the order of the code.
    """

    name: str
    bundles: int
    capacity: dict[str, int]
    regions: tuple[Region, ...]

    @property
    def inner(self) -> Region:
        """The region with the most matrix-unit work; the first of equals (within 1%)."""
        most = max(region.used["MXU"] for region in self.regions)
        return next(r for r in self.regions if r.used["MXU"] >= 0.99 * most)

    def to_json(self) -> dict:
        """Return plain data, with the inner region's figures."""
        return {**dataclasses.asdict(self), "inner": dataclasses.asdict(self.inner)}


def read_kernels(folder: str | Path) -> list[KernelCode]:
    """Return the kernels of a dump folder (`--xla_jf_dump_to`, `--xla_jf_dump_llo_text=true`).

    Raises:
      JaxherdError: the folder holds no Pallas kernel.
    """
    found = []
    for name, path in _summaries(folder):
        stem = path.name.removesuffix(_SUMMARY).rsplit("-", 1)[0]
        found.append(
            _kernel(
                name,
                next(path.parent.glob(f"{glob.escape(stem)}-*-{_UTILIZATION}")),
                next(
                    code
                    for code in path.parent.glob(f"{glob.escape(stem)}-*-final_bundles.txt")
                    if re.search(r"-\d+-final_bundles", code.name)
                ),
            )
        )
    if not found:
        raise JaxherdError(
            f"{folder} holds no dump of a Pallas kernel; compile a program with one under "
            "LIBTPU_INIT_ARGS=--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true."
        )
    return found


def _summaries(folder: str | Path) -> Iterator[tuple[str, Path]]:
    """Yield each Pallas kernel's name and the summary of its bundles."""
    for path in sorted(Path(folder).glob(f"*{_SUMMARY}")):
        # <time>-<operation>-<pass number>-schedule-analysis_final_bundles.txt
        name = path.name.removesuffix(_SUMMARY).split("-", 1)[1].rsplit("-", 1)[0]
        # The whole program ("TLP") lists its kernels too: only what is itself a kernel counts.
        if re.search(rf"%{re.escape(name)} = [^\n]*tpu_custom_call", path.read_text()):
            yield name, path


def _kernel(name: str, utilization: Path, code: Path) -> KernelCode:
    lines = utilization.read_text().splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    capacity = dict(zip(units, map(int, lines[2].split())))
    start = next(i for i, line in enumerate(lines) if line.startswith("== UTIL")) + 1
    rows = [list(map(int, line.split())) for line in lines[start:] if line.strip()]
    targets = [(0, "")]
    with code.open() as text:
        for line in text:
            if match := _TARGET.match(line):
                targets.append((int(match[1], 16), match[2]))
    ends = [at for at, _ in targets[1:]] + [len(rows)]
    regions = tuple(
        _region(kind, rows[at:end], units, capacity)
        for (at, kind), end in zip(targets, ends)
        if at < end
    )
    return KernelCode(name, len(rows), capacity, regions)


def _region(kind, rows, units, capacity) -> Region:
    used = {unit: sum(row[i] for row in rows) for i, unit in enumerate(units)}
    mxu = units.index("MXU")
    at = [i for i, row in enumerate(rows) if row[mxu]]
    span = at[-1] - at[0] + 1 if at else 0
    occupancy = used["MXU"] / (capacity["MXU"] * span) if span else 0.0
    return Region(kind, len(rows), span, used, occupancy)


def look(
    chip: str,
    case: str,
    arguments: dict | None = None,
    *,
    timeout: int | float = 540,
    need_kernel: bool = True,
) -> tuple[list[KernelCode], dict]:
    """Compile a case for a chip in a child process and read its kernels.

    Args:
      chip: "v5e", "v5p", "v6e" or "tpu7x".
      case: "FILE.py:FUNCTION"; the function returns (callable, [(shape, dtype name), ...]).
      arguments: of the function; anything JSON holds.
      timeout: seconds.
      need_kernel: whether a program without a Pallas kernel is an error; else it gives none.
    Returns:
      The kernels, and {"flops", "bytes", "seconds", "temp_bytes"}: of XLA's cost analysis of the
      whole program (of a Pallas kernel it is the kernel's own estimate), and of its compilation.
    Raises:
      JaxherdError: an unknown chip, or the compilation failed (the compiler's last line is told).
    """
    with tempfile.TemporaryDirectory(prefix="jaxherd-mosaic-") as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        costs = compile_in_child(chip, case, arguments, flags, timeout)
        if not need_kernel and not any(_summaries(folder)):
            return [], costs
        return read_kernels(folder), costs


def compile_in_child(
    chip: str, case: str, arguments: dict | None, flags: str, timeout: int | float
) -> dict:
    """Compile a case in a process of its own under these `LIBTPU_INIT_ARGS`.

    Returns:
      XLA's costs, as `look` tells them.
    Raises:
      JaxherdError: as in `look`.
    """
    if chip not in TOPOLOGIES:
        raise JaxherdError(f"No TPU compiler for {chip!r}; " + nearest(chip, TOPOLOGIES))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": flags,
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_TRACEBACK_FILTERING": "off",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jaxherd.planning.mosaic", "--child", chip, case,
             json.dumps(arguments or {})],
            env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise JaxherdError(
            f"{case} {arguments} did not compile for {chip} within {timeout:.0f} s; allow more."
        ) from error
    if done.returncode:
        raise JaxherdError(f"{case} {arguments} did not compile for {chip}: {_reason(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _reason(stderr: str) -> str:
    """Return the exception's line of a traceback."""
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (raised or lines or ["no message"])[-1][:600]


def load_case(case: str) -> Callable:
    """Return the function that "FILE.py:FUNCTION" names."""
    path, _, function = case.rpartition(":")
    spec = importlib.util.spec_from_file_location("_case", path)
    if spec is None or spec.loader is None or not Path(path).exists():
        raise JaxherdError(f"{case!r} is not FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def _child(chip: str, case: str, arguments: dict) -> dict:
    import time

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jaxherd.core.layouts import Layout
    from jaxherd.core.sharding import Partitioner

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[
        :1
    ]
    partitioner = Partitioner.create(Layout("one"), devices)
    with partitioner.activate():
        function, shapes = load_case(case)(**arguments)
        inputs = [
            jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=partitioner.replicated())
            for shape, dtype in shapes
        ]
        started = time.monotonic()
        compiled = jax.jit(function).lower(*inputs).compile()
    costs = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    return {
        "flops": costs.get("flops", 0.0),
        "bytes": costs.get("bytes accessed", 0.0),
        "temp_bytes": memory.temp_size_in_bytes if memory else 0,
        "operand_bytes": (
            memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else 0
        ),
        "seconds": time.monotonic() - started,
    }


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["--child"]:
        print(json.dumps(_child(arguments[1], arguments[2], json.loads(arguments[3]))))
        return
    chip, case, *rest = arguments
    kernels, costs = look(chip, case, json.loads(rest[0]) if rest else {})
    print(json.dumps({"kernels": [kernel.to_json() for kernel in kernels], **costs}))


if __name__ == "__main__":
    _main(sys.argv[1:])
