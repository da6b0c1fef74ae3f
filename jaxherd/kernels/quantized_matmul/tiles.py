"""Tile sizes of the TPU kernels: a small table per chip, and what a choice costs.

Letters: m, k, n are the tile's share of M, K, N.  The figures were found with the static cycle
estimates of libtpu 0.0.42.1 over the shapes of `arg_specs.py` (README.md of this folder): few large
steps beat many small ones, since every step pays its start and, with several along the inner axis,
a pass over the accumulator.
"""

import dataclasses
import math
from collections.abc import Mapping

MIB = 2**20
DECODE_ROWS = 64


@dataclasses.dataclass(frozen=True)
class TileLimits:
    """The largest tiles on one chip.

    Attributes:
      rows: m of many rows; up to `DECODE_ROWS` rows are one tile.
      inner: k of many rows (n of the gradient).
      columns: n of many rows (k of the gradient).
      decode_inner, decode_columns: k and n of up to `DECODE_ROWS` rows.
      vmem_bytes: that a kernel may take of the core's VMEM.
    """

    rows: int
    inner: int
    columns: int
    decode_inner: int
    decode_columns: int
    vmem_bytes: int


LIMITS: Mapping[str, TileLimits] = {
    "v5e": TileLimits(512, 1024, 1024, 8192, 512, 64 * MIB),
    "v5p": TileLimits(512, 1024, 1024, 8192, 512, 40 * MIB),
    "v6e": TileLimits(512, 1024, 1024, 8192, 512, 64 * MIB),
    "tpu7x": TileLimits(512, 1024, 1024, 8192, 512, 40 * MIB),
}
# An unknown chip gets what fits all of these.
FALLBACK = TileLimits(256, 512, 512, 2048, 512, 24 * MIB)


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


def choose(
    limits: TileLimits, shape: tuple[int, int, int], *, group: int | None, transposed: bool
) -> Tiles:
    """Return tiles for M x K x N.

    Args:
      limits: of the chip.
      shape: (M, K, N).
      group: rows of K that share a scale, None for one scale per column.
      transposed: for the gradient, whose inner axis is N.
    """
    M, K, N = shape
    if M <= DECODE_ROWS:
        m, inner, columns = M, limits.decode_inner, limits.decode_columns
    else:
        m, inner, columns = _even(M, limits.rows, 16), limits.inner, limits.columns
    k, n = (columns, inner) if transposed else (inner, columns)
    if transposed and M <= DECODE_ROWS:
        k, n = limits.decode_columns, limits.decode_inner // 2
    # Whole int8 tiles of 32 rows when two rows share a byte, eight rows of scales, 128 lanes of x.
    unit = 128 if group is None else math.lcm(128, 8 * group)
    return Tiles(m, _divisor(K, max(k, unit), unit), _divisor(N, n, 128), M, K, N)


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
