"""The grouped product for NVIDIA GPUs, through Pallas and Triton: values and both gradients.

A program of the forward grid is one visit of the schedule by one strip of columns; a program of the
weight gradient is one group by one tile of its matrix and loops over the rows of the group.  No
operand is padded: loads and stores are masked, and rows of no group are written as zeros.

Axis letters: M rows, K inner, G groups, N columns, V visits; m, k, n sides of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxherd.kernels.grouped_matmul.schedule import forward_schedule, most_visits

# A warp group's usual tile; smaller where the operand is, and a power of two as Triton asks.
_ROWS, _INNER, _COLUMNS = 64, 64, 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x_MK, w_GKN, group_sizes_G, interpret: bool, expected_rows: int | None = None):
    """Return y_MN; see `api.grouped_matmul`."""
    return _product(x_MK, w_GKN, group_sizes_G, interpret, expected_rows, transposed=False)


def _side(size: int, most: int) -> int:
    """Return a power of two from 16 to `most`."""
    return min(most, max(16, pl.next_power_of_2(size)))


def _product(x_MK, w_GKN, group_sizes_G, interpret, expected_rows, *, transposed):
    (rows, inner), groups = x_MK.shape, w_GKN.shape[0]
    columns = w_GKN.shape[1 if transposed else 2]
    m, k, n = _side(rows, _ROWS), _side(inner, _INNER), _side(columns, _COLUMNS)
    visits = most_visits(rows, groups, m)
    schedule = forward_schedule(group_sizes_G, rows, m)
    kernel = functools.partial(_product_kernel, tile=(m, k, n), transposed=transposed)
    itemsize = x_MK.dtype.itemsize
    used = rows if expected_rows is None else expected_rows
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), x_MK.dtype),
        grid=(visits, pl.cdiv(columns, n)),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=pl.CostEstimate(
            flops=2 * used * inner * columns,
            bytes_accessed=(used * inner + rows * columns + min(groups, used) * inner * columns)
            * itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(schedule.live_1, *schedule[1:6], x_MK, w_GKN.astype(x_MK.dtype))


def _product_kernel(
    live, tile_V, source_V, group_V, start_V, stop_V, x_ref, w_ref, y_ref, *, tile, transposed
):
    m, k, n = tile
    (rows, inner), columns = x_ref.shape, y_ref.shape[1]
    v = pl.program_id(0)
    group = group_V[v]
    row_m = tile_V[v] * m + jnp.arange(m)
    column_n = pl.program_id(1) * n + jnp.arange(n)
    mine_m = (row_m >= start_V[v]) & (row_m < stop_V[v]) & (row_m < rows)

    def step(i, sum_mn):
        inner_k = i * k + jnp.arange(k)
        inside_k = inner_k < inner
        x_mk = pltriton.load(
            x_ref.at[row_m[:, None], inner_k[None, :]],
            mask=mine_m[:, None] & inside_k[None, :],
            other=0.0,
        )
        place = (column_n[None, :], inner_k[:, None]) if transposed else (
            inner_k[:, None], column_n[None, :])  # fmt: skip
        w_kn = pltriton.load(
            w_ref.at[group, *place],
            mask=inside_k[:, None] & (column_n < columns)[None, :],
            other=0.0,
        )
        return sum_mn + pl.dot(x_mk, w_kn)

    # Visits of the tail make no step: their zeros are stored as they are.
    steps = (v < live[0]).astype(jnp.int32) * pl.cdiv(inner, k)
    sum_mn = jax.lax.fori_loop(0, steps, step, jnp.zeros((m, n), jnp.float32))
    pltriton.store(
        y_ref.at[row_m[:, None], column_n[None, :]],
        sum_mn.astype(y_ref.dtype),
        mask=mine_m[:, None] & (column_n < columns)[None, :],
    )


def _weight_gradient(x_MK, dy_MN, group_sizes_G, dtype, interpret, expected_rows):
    (rows, inner), columns, groups = x_MK.shape, dy_MN.shape[1], group_sizes_G.shape[0]
    m, k, n = _side(rows, _INNER), _side(inner, _ROWS), _side(columns, _COLUMNS)
    stop_G = jnp.cumsum(group_sizes_G.astype(jnp.int32))
    itemsize = x_MK.dtype.itemsize
    used = rows if expected_rows is None else expected_rows
    return pl.pallas_call(
        functools.partial(_gradient_kernel, tile=(m, k, n)),
        out_shape=jax.ShapeDtypeStruct((groups, inner, columns), dtype),
        grid=(groups, pl.cdiv(inner, k), pl.cdiv(columns, n)),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=pl.CostEstimate(
            flops=2 * used * inner * columns,
            bytes_accessed=used * (inner + columns) * itemsize
            + groups * inner * columns * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul_dw",
    )(stop_G - group_sizes_G.astype(jnp.int32), stop_G, x_MK, dy_MN)


def _gradient_kernel(start_G, stop_G, x_ref, dy_ref, dw_ref, *, tile):
    m, k, n = tile
    inner, columns = x_ref.shape[1], dy_ref.shape[1]
    group = pl.program_id(0)
    start, stop = start_G[group], stop_G[group]
    inner_k = pl.program_id(1) * k + jnp.arange(k)
    column_n = pl.program_id(2) * n + jnp.arange(n)

    def step(i, sum_kn):
        row_m = start + i * m + jnp.arange(m)
        mine_m = row_m < stop
        # Read as [k, m], so that the product needs no transposition.
        x_km = pltriton.load(
            x_ref.at[row_m[None, :], inner_k[:, None]],
            mask=mine_m[None, :] & (inner_k < inner)[:, None],
            other=0.0,
        )
        dy_mn = pltriton.load(
            dy_ref.at[row_m[:, None], column_n[None, :]],
            mask=mine_m[:, None] & (column_n < columns)[None, :],
            other=0.0,
        )
        return sum_kn + pl.dot(x_km, dy_mn)

    steps = jax.lax.div(stop - start + m - 1, m)
    sum_kn = jax.lax.fori_loop(0, steps, step, jnp.zeros((k, n), jnp.float32))
    pltriton.store(
        dw_ref.at[group, inner_k[:, None], column_n[None, :]],
        sum_kn.astype(dw_ref.dtype),
        mask=(inner_k < inner)[:, None] & (column_n < columns)[None, :],
    )


def _forward(x_MK, w_GKN, group_sizes_G, *how):
    return grouped_matmul(x_MK, w_GKN, group_sizes_G, *how), (x_MK, w_GKN, group_sizes_G)


def _backward(interpret, expected_rows, saved, dy_MN):
    x_MK, w_GKN, group_sizes_G = saved
    dy_MN = dy_MN.astype(x_MK.dtype)
    how = (interpret, expected_rows)
    dx_MK = _product(dy_MN, w_GKN, group_sizes_G, *how, transposed=True)
    dw_GKN = _weight_gradient(x_MK, dy_MN, group_sizes_G, w_GKN.dtype, *how)
    return dx_MK, dw_GKN, None


grouped_matmul.defvjp(_forward, _backward)
