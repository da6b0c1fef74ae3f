"""The TPU kernels with their gradients.

dx is the forward kernel with the matrices read transposed (no copy of them is made); dw is a kernel
of its own.  The gated product keeps x gate and x up for its gradient, from the pass that makes h of
them (README.md weighs this).  Axis letters: M rows, K inner, G groups, N columns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.kernels.grouped_matmul.pallas_tpu_forward import Weights, forward
from jaxherd.kernels.grouped_matmul.pallas_tpu_gated import gated_gradient
from jaxherd.kernels.grouped_matmul.pallas_tpu_gradient import gradient
from jaxherd.kernels.grouped_matmul.tiles import Limits, Tiles, forward_tiles, gradient_tiles
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_matmul(
    x_MK, w_GKN, group_sizes_G, limits: Limits, interpret, expected_rows: int | None = None
):  # fmt: skip
    """Return y_MN; see `api.grouped_matmul`."""
    return _product(x_MK, w_GKN, group_sizes_G, limits, interpret, expected_rows)


def _product(
    x_MK, w_GKN: Weights, group_sizes_G, limits, interpret, expected_rows=None, transposed=False,
    addend_MN=None,
):  # fmt: skip
    tiles = tiles_of(x_MK, (w_GKN,), limits, transposed, results=1 if addend_MN is None else 2)
    return forward(x_MK, (w_GKN,), group_sizes_G, tiles=tiles, transposed=transposed,
                   addend_MN=addend_MN, expected_rows=expected_rows, interpret=interpret)  # fmt: skip


def tiles_of(
    x_MK, weights: tuple[Weights, ...], limits: Limits, transposed: bool = False, results: int = 1
) -> Tiles:
    """Return the tiles of a forward product; arguments as of `forward` and `forward_tiles`."""
    w = weights[0]
    rows, inner = x_MK.shape
    choose = functools.partial(
        forward_tiles,
        rows,
        inner,
        w.shape[1 if transposed else 2],
        x_bytes=x_MK.dtype.itemsize,
        matrices=len(weights),
        results=results,
    )
    if transposed and x_MK.shape[0] >= limits.few_borders * w.shape[0]:
        limits = dataclasses.replace(limits, row_chunk=limits.rows)
    if not isinstance(w, QuantizedMatrix):
        return choose(limits=limits, w_bytes=w.dtype.itemsize)
    # Eight scales at a time, and whole groups: chunks of K must be a multiple of both.
    multiple = max(8 * w.group, 128) if w.blocks > 1 else 128
    limits = dataclasses.replace(limits, inner_chunk=max(limits.inner_chunk, multiple))
    return choose(limits=limits, w_bytes=0.5 if w.code == "int4" else 1, multiple=multiple)


def _plain(w_GKN: Weights, dtype) -> jax.Array:
    """Return the matrices as numbers: the gradient of x passes through what a code stands for."""
    return w_GKN.dequantize(dtype) if isinstance(w_GKN, QuantizedMatrix) else w_GKN


def _weight_gradient(
    x_MK, dy_MN, group_sizes_G, w_GKN: Weights, limits, interpret, expected_rows=None
):  # fmt: skip
    """Return dw in the dtype of the weights; a code is a constant."""
    if isinstance(w_GKN, QuantizedMatrix):
        return jax.tree.map(_no_gradient, w_GKN)
    dtype = w_GKN.dtype
    rows, inner = x_MK.shape
    tiles = gradient_tiles(rows, inner, dy_MN.shape[1], limits)
    return gradient(x_MK, dy_MN, group_sizes_G, tiles=tiles, dtype=dtype,
                    expected_rows=expected_rows, interpret=interpret)  # fmt: skip


def _product_forward(x_MK, w_GKN, group_sizes_G, *how):
    return _product(x_MK, w_GKN, group_sizes_G, *how), (x_MK, w_GKN, group_sizes_G)


def _product_backward(limits, interpret, expected_rows, saved, dy_MN):
    x_MK, w_GKN, group_sizes_G = saved
    how = (limits, interpret, expected_rows)
    dy_MN = dy_MN.astype(x_MK.dtype)
    plain_GKN = _plain(w_GKN, x_MK.dtype)
    dx_MK = _product(dy_MN, plain_GKN, group_sizes_G, *how, transposed=True)
    return dx_MK, _weight_gradient(x_MK, dy_MN, group_sizes_G, w_GKN, *how), None


grouped_matmul.defvjp(_product_forward, _product_backward)


def _no_gradient(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def grouped_swiglu(
    x_MK, gate_GKN, up_GKN, group_sizes_G, row_scale_M, limits: Limits, interpret,
    expected_rows: int | None = None,
):  # fmt: skip
    """Return h_MN; see `api.grouped_swiglu`.  `row_scale_M` may be None."""
    weights = (gate_GKN, up_GKN)
    return _gated(
        x_MK, weights, group_sizes_G, row_scale_M, limits, interpret, expected_rows, False
    )


def _gated(
    x_MK, weights, group_sizes_G, row_scale_M, limits, interpret, expected_rows, products
):  # fmt: skip
    tiles = tiles_of(x_MK, weights, limits, results=3 if products else 1)
    return forward(
        x_MK, weights, group_sizes_G, tiles=tiles, row_scale_M=row_scale_M, products=products,
        expected_rows=expected_rows, interpret=interpret,
    )  # fmt: skip


def _swiglu_forward(
    x_MK, gate_GKN, up_GKN, group_sizes_G, row_scale_M, limits, interpret, expected_rows
):  # fmt: skip
    weights = (gate_GKN, up_GKN)
    h_MN, a0_MN, b0_MN = _gated(
        x_MK, weights, group_sizes_G, row_scale_M, limits, interpret, expected_rows, True
    )
    return h_MN, (x_MK, *weights, group_sizes_G, row_scale_M, a0_MN, b0_MN)


def _swiglu_backward(limits, interpret, expected_rows, saved, dh_MN):
    """With a0 = x gate, b0 = x up, a = s a0, b = s b0:  da = dh b silu'(a), db = dh silu(a),
    ds = sum over N of (da a0 + db b0), dx = (s da) gate^T + (s db) up^T, dgate = x^T (s da).

    The products are kept without s, which then has its gradient where it is zero too.
    """
    x_MK, gate_GKN, up_GKN, group_sizes_G, row_scale_M, a0_MN, b0_MN = saved
    how, ds_M = (limits, interpret, expected_rows), None
    if row_scale_M is None:
        da_MN, db_MN = gated_gradient(
            dh_MN, a0_MN, b0_MN, group_sizes_G, expected_rows=expected_rows, interpret=interpret
        )
    else:
        da_MN, db_MN, ds_M = _scaled_gradient(dh_MN, a0_MN, b0_MN, group_sizes_G, row_scale_M)
        da_MN, db_MN = (d.astype(x_MK.dtype) for d in (da_MN, db_MN))
    args = (group_sizes_G, *how)
    dx_MK = _product(da_MN, _plain(gate_GKN, x_MK.dtype), *args, transposed=True)
    # The second product adds the first, which saves a pass over both.
    dx_MK = _product(
        db_MN, _plain(up_GKN, x_MK.dtype), *args, transposed=True, addend_MN=dx_MK
    )  # fmt: skip
    dgate_GKN = _weight_gradient(x_MK, da_MN, group_sizes_G, gate_GKN, *how)
    dup_GKN = _weight_gradient(x_MK, db_MN, group_sizes_G, up_GKN, *how)
    return dx_MK, dgate_GKN, dup_GKN, None, ds_M


def _scaled_gradient(dh_MN, a0_MN, b0_MN, group_sizes_G, row_scale_M):
    """Return (s da, s db, ds) where rows are scaled; the first two in float32."""
    a0_MN, b0_MN = a0_MN.astype(jnp.float32), b0_MN.astype(jnp.float32)
    used_M1 = (jnp.arange(len(a0_MN)) < group_sizes_G.sum())[:, None]
    dh_MN = jnp.where(used_M1, dh_MN, 0).astype(jnp.float32)
    s_M1 = jnp.where(used_M1, row_scale_M[:, None], 0).astype(jnp.float32)
    a_MN, b_MN = s_M1 * a0_MN, s_M1 * b0_MN
    sigmoid_MN = jax.nn.sigmoid(a_MN)
    da_MN = dh_MN * b_MN * sigmoid_MN * (1 + a_MN * (1 - sigmoid_MN))
    db_MN = dh_MN * a_MN * sigmoid_MN
    ds_M = (da_MN * a0_MN + db_MN * b0_MN).sum(axis=1).astype(row_scale_M.dtype)
    return s_M1 * da_MN, s_M1 * db_MN, ds_M


# Where a pass is to be computed again, its first run needs no products and writes none.
grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward, optimize_remat=True)
