"""The grouped product in plain XLA at the cost of the dense one: a loop over blocks of rows.

XLA lowers `ragged_dot` on CPU and GPU to a product of every row with every matrix.  Here a block
of at most `block` consecutive rows of one group meets one matrix; the number of blocks is counted
at run time, so empty groups cost nothing.
Axis letters: M rows, K inner, G groups, N columns, b rows of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x_MK, w_GKN, group_sizes_G, transposed: bool = False):
    """Return y_MN; with `transposed` the matrices are given as [G, N, K]."""
    return _forward(x_MK, w_GKN, group_sizes_G, transposed)


def _forward(x_MK, w_GKN, group_sizes_G, transposed):
    rows, block = x_MK.shape[0], _block_rows(x_MK.shape[0], w_GKN.shape[0])
    columns = w_GKN.shape[1 if transposed else 2]
    count, group_at, start_at, _ = _schedule(group_sizes_G, rows, block)
    x = jnp.pad(x_MK, ((0, block), (0, 0)))

    def body(i, y):
        x_bK = jax.lax.dynamic_slice_in_dim(x, start_at(i), block)
        w = jax.lax.dynamic_index_in_dim(w_GKN, group_at(i), keepdims=False)
        y_bN = jax.lax.dot_general(x_bK, w, (((1,), (1 if transposed else 0,)), ((), ())),
                                   preferred_element_type=jnp.float32)  # fmt: skip
        # Rows past the group's end are wrong here; the next block starts there and overwrites.
        return jax.lax.dynamic_update_slice_in_dim(y, y_bN.astype(y.dtype), start_at(i), axis=0)

    y = jax.lax.fori_loop(0, count, body, jnp.zeros((rows + block, columns), x_MK.dtype))[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < group_sizes_G.sum(), y, 0)


def _block_rows(rows: int, groups: int) -> int:
    mean = max(rows // groups, 1)
    return int(min(256, max(8, 2 ** math.ceil(math.log2(mean)))))


def _schedule(group_sizes_G, rows: int, block: int):
    """Return the number of blocks, and the group, first row and end row of block i."""
    sizes = group_sizes_G.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    blocks_G = (sizes + block - 1) // block
    last_G = jnp.cumsum(blocks_G)

    def group_at(i):
        return jnp.searchsorted(last_G, i, side="right").astype(jnp.int32)

    def start_at(i):
        group = group_at(i)
        return starts[group] + (i - (last_G[group] - blocks_G[group])) * block

    return last_G[-1], group_at, start_at, lambda i: ends[group_at(i)]


def _vjp_forward(x_MK, w_GKN, group_sizes_G, transposed):
    return _forward(x_MK, w_GKN, group_sizes_G, transposed), (x_MK, w_GKN, group_sizes_G)


def _vjp_backward(transposed, saved, dy_MN):
    x_MK, w_GKN, group_sizes_G = saved
    # Rows of no group gave constants; whatever comes back for them must not meet a product.
    dy_MN = jnp.where(jnp.arange(dy_MN.shape[0])[:, None] < group_sizes_G.sum(), dy_MN, 0)
    dx_MK = _forward(dy_MN.astype(x_MK.dtype), w_GKN, group_sizes_G, not transposed)
    rows, block = x_MK.shape[0], _block_rows(x_MK.shape[0], w_GKN.shape[0])
    count, group_at, start_at, end_at = _schedule(group_sizes_G, rows, block)
    left, right = (dy_MN, x_MK) if transposed else (x_MK, dy_MN)
    left, right = (jnp.pad(a, ((0, block), (0, 0))) for a in (left, right))

    def body(i, dw):
        start = start_at(i)
        a = jax.lax.dynamic_slice_in_dim(left, start, block)
        a = jnp.where((start + jnp.arange(block))[:, None] < end_at(i), a, 0)
        b = jax.lax.dynamic_slice_in_dim(right, start, block)
        product = jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())),
                                      preferred_element_type=jnp.float32)  # fmt: skip
        group = group_at(i)
        old = jax.lax.dynamic_index_in_dim(dw, group)
        return jax.lax.dynamic_update_slice_in_dim(dw, old + product[None], group, axis=0)

    dw_GKN = jax.lax.fori_loop(0, count, body, jnp.zeros(w_GKN.shape, jnp.float32))
    return dx_MK, dw_GKN.astype(w_GKN.dtype), None


grouped_matmul.defvjp(_vjp_forward, _vjp_backward)
