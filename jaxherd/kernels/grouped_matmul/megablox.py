"""jax's megablox kernels with tile sizes that suit large matrices, values and gradients."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x_MK, w_GKN, group_sizes_G, interpret: bool):
    """Return y_MN; rows of no group are left uninitialised (also in the gradient of x)."""
    return _gmm(x_MK, w_GKN, group_sizes_G, interpret, transposed=False)


def _tile(size: int, most: int) -> int:
    """Return the largest multiple of 128 up to `most` that divides the size, else `most`."""
    for tile in range(min(most, size), 127, -128):
        if size % tile == 0:
            return tile
    return min(most, size)


def _gmm(x_MK, w_GKN, group_sizes_G, interpret, *, transposed):
    # The package binds the name of this module to a function of its own.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    inner = x_MK.shape[1]
    columns = w_GKN.shape[1] if transposed else w_GKN.shape[2]
    tiling = (_tile(x_MK.shape[0], 512), _tile(inner, 1024), _tile(columns, 1024))
    return gmm(x_MK, w_GKN, group_sizes_G.astype(jnp.int32), x_MK.dtype, tiling,
               transpose_rhs=transposed, interpret=interpret)  # fmt: skip


def _forward(x_MK, w_GKN, group_sizes_G, interpret):
    return grouped_matmul(x_MK, w_GKN, group_sizes_G, interpret), (x_MK, w_GKN, group_sizes_G)


def _backward(interpret, saved, dy_MN):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_MK, w_GKN, group_sizes_G = saved
    sizes = group_sizes_G.astype(jnp.int32)
    dy_MN = dy_MN.astype(x_MK.dtype)
    dx_MK = _gmm(dy_MN, w_GKN, sizes, interpret, transposed=True)
    dx_MK = jnp.where(jnp.arange(dx_MK.shape[0])[:, None] < sizes.sum(), dx_MK, 0)
    tiling = (_tile(x_MK.shape[0], 512), _tile(x_MK.shape[1], 1024), _tile(dy_MN.shape[1], 1024))
    dw_GKN = tgmm(x_MK.swapaxes(0, 1), dy_MN, sizes, w_GKN.dtype, tiling,
                  num_actual_groups=w_GKN.shape[0], interpret=interpret)  # fmt: skip
    return dx_MK, dw_GKN, None


grouped_matmul.defvjp(_forward, _backward)
