"""Our kernels and the public ones, compiled for one chip in one run, by the TPU compiler's account.

    python tests/benchmarks/kernels/compare.py grouped --chip v5p --shape 8192,5120,8192,16
        [--only SUBSTRING] [--json]

Each line is compiled in its own process (nothing runs, no TPU is needed) and its kernel's schedule is
read by `jaxherd.planning.mosaic`.  Columns:

- bundles: of the whole kernel's code, static; inner: of the region with the most matrix-unit work,
  per 512 x 1024 x 1024 multiplications; MXU: its slots used of those there are, from the first to the
  last matmul; fills, spills: of its registers, per the same;
- rows: how many rows are multiplied for each row there is, under a uniform random routing (a border
  between groups inside of a chunk makes it pass twice); product: inner bundles of the whole product
  in millions, those rows included;
- MB: what the kernel moves by its grid; HBM: the time of that over the roofline floor
  max(FLOPs / peak, each operand once / bandwidth).

Bundles are not cycles (a bundle may wait), so they are compared with each other alone.
The compiler's cycle estimates are left out: they are not valid where the grid is counted at run time.
A file beside this one is a kernel: it gives `entries(shape, chip)` and `case(**arguments)`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import sys

from jaxherd.core.chips import CHIPS
from jaxherd.core.errors import JaxherdError
from jaxherd.planning import mosaic

TILE = 512 * 1024 * 1024
HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
      label: what it is.
      arguments: of the kernel file's `case`.
      kernels: parts of the names of the Pallas kernels to read; a line's figures are their sums.
      inner_macs: multiplications of one pass of each kernel's inner region; () if not known.
      total_macs: of the whole product.
      moved: bytes by the grid.
      floor_bytes: every operand once.
      rows: multiplied for each row there is.
      dtype: whose peak counts.
      flops: of the product, where they are not 2 total_macs (a kernel counted by other units).
    """

    label: str
    arguments: dict
    kernels: tuple[str, ...]
    inner_macs: tuple[int, ...]
    total_macs: int
    moved: float
    floor_bytes: float
    rows: float = 1.0
    dtype: str = "bf16"
    flops: float | None = None


def measure(entry: Entry, file: str, chip_name: str) -> dict:
    """Return the figures of one line."""
    found, costs = mosaic.look(chip_name, f"{file}:case", entry.arguments, need_kernel=False)
    chip = CHIPS[chip_name]
    row = {"label": entry.label, "seconds": costs["seconds"], "xla_flops": costs["flops"],
           "xla_bytes": costs["bytes"], "temp_mb": costs["temp_bytes"] / 1e6}  # fmt: skip
    row["moved_mb"] = entry.moved / 1e6
    read = [k for k in found if any(part in k.name for part in entry.kernels)]
    read = [k for k in read if k.inner.used["MXU"]]
    if not read:
        return {**row, "note": "no Pallas kernel with a matmul"}
    row["bundles"] = sum(kernel.bundles for kernel in read)
    if not entry.inner_macs:
        inner = read[0].inner
        return {**row, "mxu": inner.occupancy, "note": "tile not known"}
    parts, total = [], 0.0
    for kernel, macs in zip(read, entry.inner_macs):
        inner, share = kernel.inner, TILE / macs
        parts.append((inner, share))
        total += inner.bundles * entry.total_macs / len(entry.inner_macs) / macs
    # A program with the same kernel twice has its schedule dumped once.
    total *= len(entry.inner_macs) / len(parts)
    mean = 1 / len(parts)
    row["inner"] = sum(i.bundles * s for i, s in parts) * mean
    row["mxu"] = sum(i.occupancy for i, _ in parts) * mean
    row["fills"] = sum(i.used["VLOAD:FILL"] * s for i, s in parts) * mean
    row["spills"] = sum(i.used["VSTORE:SPILL"] * s for i, s in parts) * mean
    row["rows"], row["product"] = entry.rows, total * entry.rows / 1e6
    # A device of tpu7x is one core; one of v5p is two that share the grid.
    bandwidth = chip.hbm_bytes_per_s / chip.devices_per_chip
    peak = chip.peak(entry.dtype) / chip.devices_per_chip
    flops = 2 * entry.total_macs if entry.flops is None else entry.flops
    floor = max(flops / peak, entry.floor_bytes / bandwidth)
    row["hbm"] = entry.moved / bandwidth / floor
    return row


def table(rows: list[dict]) -> str:
    """Return the lines as Markdown."""
    lines = [
        "| kernel | bundles | inner / tile | MXU | fills | spills | rows | product | MB | HBM |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "inner" not in row:
            mxu = f"{row['mxu']:.3f}" if "mxu" in row else ""
            lines.append(
                f"| {row['label']} | {row.get('bundles', '')} | {row['note']} | {mxu} | | | | | | |"
            )
            continue
        lines.append(
            f"| {row['label']} | {row['bundles']} | {row['inner']:.0f} | {row['mxu']:.3f} "
            f"| {row['fills']:.0f} | {row['spills']:.0f} | {row['rows']:.2f} "
            f"| {row['product']:.3f} | {row['moved_mb']:.0f} | {row['hbm']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile every line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", help="a file beside this one, without .py")
    parser.add_argument("--chip", nargs="+", default=["v5p"], choices=list(mosaic.TOPOLOGIES))
    parser.add_argument("--shape", default=None, help="integers with commas; the kernel's default")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="lines whose label holds one of these"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sys.modules["compare"] = sys.modules["__main__"]
    file = str(HERE / f"{arguments.kernel}.py")
    entries = mosaic.load_case(f"{file}:entries")
    shape = tuple(map(int, arguments.shape.split(","))) if arguments.shape else None
    output = []
    for chip in arguments.chip:
        rows = []
        for entry in entries(shape, chip):
            if not any(part in entry.label for part in arguments.only):
                continue
            try:
                rows.append(measure(entry, file, chip))
            except JaxherdError as error:
                rows.append({"label": entry.label, "note": str(error)[-200:]})
            print(".", end="", file=sys.stderr, flush=True)
        versions = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
        output.append({"chip": chip, "shape": arguments.shape, **versions, "rows": rows})
        if not arguments.json:
            print(f"\n{chip}, shape {shape or 'default'}, {versions}\n\n{table(rows)}")
    if arguments.json:
        print(json.dumps(output, indent=1))


if __name__ == "__main__":
    main()
