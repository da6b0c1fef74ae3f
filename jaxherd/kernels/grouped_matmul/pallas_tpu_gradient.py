"""The gradient of the weights as a TPU kernel: dw[g] = x[rows of g]^T dy[rows of g].

Grid: (blocks of K, strips of N, visits).  The first two are independent, so that two cores of a
chip share them; the visits of one group follow each other and add to an accumulator that is written
when the group ends.  A group without rows is visited once, to write zeros.  Rows that are not the
group's are masked on both sides, since zero times what stands in the tail may be NaN; a tile that
lies wholly in its group, the usual case, is multiplied as it is.

Axis letters: M rows, K inner, G groups, N columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxherd.kernels.grouped_matmul.schedule import gradient_schedule
from jaxherd.kernels.grouped_matmul.tiles import Tiles


def gradient(
    x_MK: jax.Array,
    dy_MN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    tiles: Tiles,
    dtype=None,
    expected_rows: int | None = None,
    interpret=False,
) -> jax.Array:
    """Return dw_GKN in `dtype` (of x by default), accumulated in float32.

    Args:
      x_MK, dy_MN: rows sorted by group; those of the tail may hold anything.
      group_sizes_G: rows of each group.
      tiles: see `tiles.gradient_tiles`.
      dtype: of the result.
      expected_rows: of a group, as the kernel's cost is told; all by default.
      interpret: as of `pallas_call`.
    """
    (rows, inner), columns, groups = x_MK.shape, dy_MN.shape[1], group_sizes_G.shape[0]
    dtype = jnp.dtype(dtype or x_MK.dtype)
    blocks, strips = -(-inner // tiles.inner), -(-columns // tiles.columns)
    schedule = gradient_schedule(group_sizes_G, rows, tiles.rows)

    def x_map(k, n, v, live, tile, source, group, start, stop):
        return source[v], k

    def dy_map(k, n, v, live, tile, source, group, start, stop):
        return source[v], n

    def dw_map(k, n, v, live, tile, source, group, start, stop):
        return group[v], k, n

    # Tiles of the tail have no visit: they are neither read nor multiplied.
    used = rows if expected_rows is None else expected_rows
    x_bytes = used * inner * x_MK.dtype.itemsize * strips
    dy_bytes = used * columns * dy_MN.dtype.itemsize * blocks
    dw_bytes = groups * inner * columns * dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        out_shape=jax.ShapeDtypeStruct((groups, inner, columns), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.inner), x_map),
                pl.BlockSpec((tiles.rows, tiles.columns), dy_map),
            ],
            out_specs=pl.BlockSpec((None, tiles.inner, tiles.columns), dw_map),
            grid=(blocks, strips, schedule.count),
            scratch_shapes=[pltpu.VMEM((tiles.inner, tiles.columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * used * inner * columns,
            bytes_accessed=x_bytes + dy_bytes + dw_bytes,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul_dw",
    )(*schedule[:6], x_MK, dy_MN)


def _kernel(
    live, tile, source, group, start, stop, x_ref, dy_ref, dw_ref, accumulator, *, tiles: Tiles
):
    v = pl.program_id(2)
    previous, following = jnp.maximum(v - 1, 0), jnp.minimum(v + 1, pl.num_programs(2) - 1)
    chunk = tiles.row_chunk
    first = jnp.maximum(start[v] - tile[v] * tiles.rows, 0)
    last = jnp.minimum(stop[v] - tile[v] * tiles.rows, tiles.rows)

    @pl.when((v == 0) | (group[previous] != group[v]))
    def _():
        accumulator[...] = jnp.zeros_like(accumulator)

    def add(x, dy):
        accumulator[...] += jax.lax.dot_general(
            x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    def step(r, carry):
        begin = pl.multiple_of(r * chunk, chunk)
        at = pl.ds(begin, chunk)
        whole = (first <= begin) & (begin + chunk <= last)

        @pl.when(whole)
        def _():
            add(x_ref[at, :], dy_ref[at, :])

        @pl.when(jnp.logical_not(whole))
        def _():
            add(_rows(x_ref[at, :], first, last, begin), _rows(dy_ref[at, :], first, last, begin))

        return carry

    @pl.when(first < last)
    def _():
        jax.lax.fori_loop(jax.lax.div(first, chunk), jax.lax.div(last + chunk - 1, chunk), step, 0)

    @pl.when((v == pl.num_programs(2) - 1) | (group[following] != group[v]))
    def _():
        dw_ref[...] = accumulator[...].astype(dw_ref.dtype)


def _rows(a, first, last, begin):
    row = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0) + begin
    return jnp.where((row >= first) & (row < last), a.astype(jnp.float32), 0).astype(a.dtype)
