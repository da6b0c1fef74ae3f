"""Tile sizes of the TPU kernels: a small table per chip, and what a choice takes.

Letters: m, k, n are the tile's share of M, K, N.  By the static cycle estimates of libtpu 0.0.42.1
(README.md of this folder) few large steps beat many small ones, and one step along the inner axis
beats several: each of them passes over the accumulator.  So the inner axis is whole where VMEM
allows, and the table says how wide the other axes are.
"""

import dataclasses
import math
from collections.abc import Mapping

MIB = 2**20
DECODE_ROWS = 64
# Multiply-adds of one step: the compiler unrolls it, and takes minutes over a few times as many.
# Narrow tiles cost no bytes where the inner axis is whole, for x stays while the columns pass.
STEP_SIZE = 2**30


@dataclasses.dataclass(frozen=True)
class TileLimits:
    """The largest tiles on one chip.

    Attributes:
      rows: m of many rows; up to `DECODE_ROWS` rows are one tile.
      columns: n of many rows (k of the gradient).
      decode_columns: n of up to `DECODE_ROWS` rows: narrow, so that the first block of the codes is
        a small part of the whole, which nothing hides.
      vmem_bytes: that a kernel may take of the core's VMEM (128 MiB on v5e and v6e, 64 MiB on v5p
        and tpu7x).
    """

    rows: int
    columns: int
    decode_columns: int
    vmem_bytes: int


LIMITS: Mapping[str, TileLimits] = {
    "v5e": TileLimits(512, 1024, 512, 64 * MIB),
    "v5p": TileLimits(512, 1024, 512, 40 * MIB),
    "v6e": TileLimits(512, 1024, 512, 64 * MIB),
    "tpu7x": TileLimits(512, 1024, 512, 40 * MIB),
}
# An unknown chip gets what fits all of these.
FALLBACK = TileLimits(256, 512, 512, 24 * MIB)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes, and the grid that they make of (M, K, N)."""

    m: int
    k: int
    n: int
    M: int
    K: int
    N: int

    @property
    def rows(self) -> int:
        """Steps along M."""
        return -(-self.M // self.m)

    @property
    def inner(self) -> int:
        """Steps along K."""
        return -(-self.K // self.k)

    @property
    def columns(self) -> int:
        """Steps along N."""
        return -(-self.N // self.n)


@dataclasses.dataclass(frozen=True)
class Operands:
    """What of the operands decides on tiles.

    Attributes:
      x_bytes, code_bytes, out_bytes: of one element (0.5 for int4).
      decoded_bytes: of one element as the matrix unit gets it.
      group: rows of K that share a scale, None for one scale per column.
      zeros: whether there are zero points.
    """

    x_bytes: int
    code_bytes: int | float
    out_bytes: int
    decoded_bytes: int
    group: int | None
    zeros: bool


def vmem_bytes(tiles: Tiles, of: Operands, *, transposed: bool) -> int:
    """Return the VMEM of one kernel: two buffers a block, the decoded block, the accumulator."""
    m, k, n = tiles.m, tiles.k, tiles.n
    inner, outer = (n, k) if transposed else (k, n)
    scales = max(8, 1 if of.group is None else k // of.group) * n * 4 * (2 if of.zeros else 1)
    blocks = m * inner * of.x_bytes + k * n * of.code_bytes + m * outer * of.out_bytes + scales
    # A decoded group passes through float32 before it is rounded.
    decoded = k * n * (of.decoded_bytes + (4 if of.group is not None else 0))
    return int(2 * blocks + decoded + 2 * m * outer * 4)


def choose(
    limits: TileLimits, shape: tuple[int, int, int], of: Operands, *, transposed: bool
) -> Tiles:
    """Return tiles for M x K x N whose `vmem_bytes` are within the chip's limit.

    Args:
      limits: of the chip.
      shape: (M, K, N).
      of: the operands.
      transposed: for the gradient, whose inner axis is N.
    """
    M, K, N = shape
    # Whole int8 tiles of 32 rows where two rows share a byte, eight rows of scales, 128 lanes of x.
    unit_K = 128 if of.group is None else math.lcm(128, 8 * of.group)
    few = M <= DECODE_ROWS
    m = M if few else _even(M, limits.rows, 32)
    wide = limits.decode_columns if few else limits.columns
    while True:
        if transposed:
            outer, inner = _divisor(K, max(wide, unit_K), unit_K), N
        else:
            outer, inner = _divisor(N, wide, 128), K
        while True:
            k, n = (outer, inner) if transposed else (inner, outer)
            tiles = Tiles(m, k, n, M, K, N)
            if wide > 256 and m * k * n > STEP_SIZE:
                break
            if vmem_bytes(tiles, of, transposed=transposed) <= limits.vmem_bytes:
                return tiles
            unit = 128 if transposed else unit_K
            if inner <= max(unit, 1024):
                break
            inner = _divisor(N if transposed else K, max(unit, inner // 2), unit)
        if wide > 128:
            wide //= 2
        else:
            m = max(32, m // 2 // 32 * 32)


def _even(size: int, most: int, unit: int) -> int:
    """Return the whole size if it fits, else equal steps rounded up to `unit`."""
    if size <= most:
        return size
    steps = -(-size // most)
    return -(-size // (steps * unit)) * unit


def _divisor(size: int, most: int, unit: int) -> int:
    """Return the whole size if it fits, else the tile that pads least, the largest of equals."""
    if size <= most:
        return size
    options = range(unit, most + 1, unit)
    return min(options, key=lambda tile: (-(-size // tile) * tile, -tile))
