"""Tile sizes of the TPU kernels: a small table of limits per chip, and what fits them.

The kernels keep the whole inner axis of a tile of rows and of a strip of a matrix in fast memory
(VMEM) where it fits: then a matrix is read once for all tiles of its group, and not once for each.
"""

import dataclasses
from collections.abc import Mapping

MIB = 2**20
_SUBLANES = 16


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest tiles for one kind of chip.

    Attributes:
      vmem_bytes: for the kernel's blocks and accumulators.
      rows: of a tile.
      row_chunk: of the rows multiplied at once by the forward kernel.
      inner_chunk: of the inner axis multiplied at once.
      columns: of a strip.
      side: of the square tile of dw, in both axes.
      few_borders: rows per group from which dx takes `rows` at once, since few tiles are shared: a
        matrix that is read transposed costs the more the fewer rows it meets.
      gradient_chunk: of the rows that one product of the dw kernel sums over.
    """

    vmem_bytes: int
    rows: int = 512
    row_chunk: int = 256
    inner_chunk: int = 2560
    columns: int = 1024
    side: int = 1024
    few_borders: int = 2048
    gradient_chunk: int = 512


# VMEM is 128 MiB on v5e and v6e and 64 MiB per core on v5p and tpu7x (`pltpu.TpuInfo`).  A quarter
# stays with the compiler: its own scratch, and what XLA keeps there across the call.
LIMITS: Mapping[str, Limits] = {
    "v5e": Limits(96 * MIB),
    "v5p": Limits(48 * MIB),
    # 256 x 256 matrix units: a quarter of the instructions, of which filling and draining are more.
    "v6e": Limits(96 * MIB, inner_chunk=5120),
    "tpu7x": Limits(48 * MIB, inner_chunk=5120),
}
# A chip that is not in the table gets what every TPU core grants by default.
FALLBACK = Limits(12 * MIB, columns=512, inner_chunk=1024, side=512)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its operands.

    Attributes:
      rows: of a tile of x and y.
      row_chunk: rows multiplied at once; a visit skips the chunks it has no row in.
      inner: of a block; all of K where it fits.
      inner_chunk: multiplied at once.
      columns: of a strip of the matrix.
      vmem_bytes: the limit that the kernel states to the compiler.
    """

    rows: int
    row_chunk: int
    inner: int
    inner_chunk: int
    columns: int
    vmem_bytes: int


def limits_of(chip: str | None) -> Limits:
    """Return the limits of "v5e", "v5p", "v6e", "tpu7x"; of another chip or None the fallback."""
    return LIMITS.get(chip or "", FALLBACK)


def _up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _row_tile(rows: int, most: int) -> int:
    return most if rows > most else _up_to(rows, _SUBLANES)


def _chunk(inner: int, most: int, multiple: int) -> int:
    """Return the largest divisor up to `most` that is a multiple, unless it is very small."""
    if inner <= most:
        return inner
    for chunk in range(most // multiple * multiple, most // 3, -multiple):
        if inner % chunk == 0:
            return chunk
    return most // multiple * multiple


def forward_tiles(
    rows: int,
    inner: int,
    columns: int,
    limits: Limits,
    *,
    x_bytes: int | float,
    w_bytes: int | float,
    matrices: int = 1,
    results: int = 1,
    multiple: int = 128,
) -> Tiles:
    """Return the tiles of y = x w for `matrices` matrices at once.

    Args:
      rows, inner, columns: M, K, N.
      limits: of the chip.
      x_bytes, w_bytes: of one element (0.5 for int4).
      matrices: multiplied in the same pass (2 for gate and up).
      results: written in the same pass (3 for the hidden layer and the two products), or read to be
        added.
      multiple: that chunks of K must be of; a code's scales come in groups.
    """
    tile = _row_tile(rows, limits.rows)
    row_chunk = limits.row_chunk if tile % limits.row_chunk == 0 else tile
    widths = [limits.columns >> i for i in range(8) if limits.columns >> i >= 128]
    blocks = [inner, *(multiple << i for i in reversed(range(16)) if multiple << i < inner)]
    for block in blocks:
        for width in widths:
            strip = min(width, _up_to(columns, 128))
            # Blocks are held twice: one is computed on while the next is copied.
            need = 2 * tile * _up_to(block, 128) * x_bytes
            need += 2 * matrices * _up_to(block, 128) * strip * w_bytes
            need += tile * strip * (2 * x_bytes * results + 4 * matrices)
            if need <= limits.vmem_bytes and (strip >= min(256, columns) or block == blocks[-1]):
                chunk = _chunk(block, limits.inner_chunk, multiple)
                return Tiles(tile, row_chunk, block, chunk, strip, _stated(limits))
    raise AssertionError(f"no tile of {rows} x {inner} x {columns} fits {limits}")


def gradient_tiles(rows: int, inner: int, columns: int, limits: Limits) -> Tiles:
    """Return the tiles of dw = x^T dy: `inner` by `columns` of the result, summed over rows."""
    tile = _row_tile(rows, limits.rows)
    chunk = limits.gradient_chunk if tile % limits.gradient_chunk == 0 else tile
    block = min(limits.side, _up_to(inner, 128))
    strip = min(limits.side, _up_to(columns, 128))
    return Tiles(tile, chunk, block, block, strip, _stated(limits))


def _stated(limits: Limits) -> int:
    # What the compiler spills and stages comes on top of the blocks.
    return limits.vmem_bytes * 7 // 6
