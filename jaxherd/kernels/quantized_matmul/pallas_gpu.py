"""Products with quantised weights on NVIDIA GPUs, through Pallas Triton; packed bytes are read once.

Compiled for H100 ahead of time and run in interpret mode; never timed, so never a default.
Axis letters: M rows, K inner, N columns; m, k, n of a tile; P = K / per bytes along K, where `per`
values share a byte.

Triton has no interleaving of rows: instead x is split outside into its even and its odd columns,
and each half meets its own nibble.  A step along K covers a part of one group, so that its scale
multiplies the product of codes and no weight is rounded.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix

_COLUMNS = 128
_STEP = 64  # rows of bytes in one step
_LEAST = 16  # the smallest side of a product in Triton


def supports(w: QuantizedMatrix) -> str | None:
    """Return why the kernel cannot take this matrix, or None."""
    if w.values.dtype == jnp.int4:
        return "int4 of one value an element, which Triton does not load: call pack()"
    per = 2 if w.packed else 1
    if w.blocks > 1 and (w.group & (w.group - 1) or w.group < _LEAST * per):
        return f"groups of {w.group} rows, which are no power of two from {_LEAST * per} on"
    return None


def matmul(
    x_MK: jax.Array,
    w: QuantizedMatrix,
    row_scales_M1: jax.Array | None = None,
    *,
    chip: str | None = None,
    transposed: bool = False,
    interpret: bool = False,
    out_dtype: Any = None,
) -> jax.Array:
    """Return x W [M, N], or with `transposed` x W^T [M, K] for x of [M, N].

    The arguments are those of `pallas_tpu.matmul`; tiles do not depend on the chip.
    """
    del chip
    K, N = w.shape
    M, per = x_MK.shape[0], 2 if w.packed else 1
    out_dtype = out_dtype or x_MK.dtype
    most = 32 if x_MK.dtype == jnp.float32 else 128  # what the shared memory of an SM holds
    m = min(most, max(_LEAST, 2 ** math.ceil(math.log2(M))))
    x_MK = jnp.pad(x_MK, ((0, -M % m), (0, 0)))
    if x_MK.dtype == jnp.float8_e4m3fn:
        x_MK = x_MK.astype(jnp.bfloat16)  # exact
    rows = x_MK.shape[0]
    step = min(w.group // per, _STEP) if w.blocks > 1 else _STEP
    operands = [w.values, w.scales] + ([] if w.zeros is None else [w.zeros])
    if transposed:
        grid, halves = (rows // m, -(-(K // per) // step)), [x_MK]
        shapes = [jax.ShapeDtypeStruct((rows, K // per), out_dtype)] * per
    else:
        grid = (rows // m, -(-N // _COLUMNS))
        halves = [x_MK[:, i::per] for i in range(per)]
        shapes = [jax.ShapeDtypeStruct((rows, N), out_dtype)]
    body = functools.partial(
        _dx_kernel if transposed else _kernel, per=per, m=m, step=step, group=w.group // per,
        zeros=w.zeros is not None,
    )  # fmt: skip
    found = pl.pallas_call(
        body,
        grid=grid,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * K * N,
            transcendentals=0,
            # Each tile of rows reads the codes, each tile of columns (or of K) reads x.
            bytes_accessed=grid[0] * w.nbytes
            + grid[1] * x_MK.size * x_MK.dtype.itemsize
            + sum(math.prod(s.shape) * s.dtype.itemsize for s in shapes),
        ),
        interpret=interpret,
        name=f"quantized_matmul_{w.code}" + ("_dx" if transposed else ""),
    )(*halves, *operands)
    if transposed:
        return rearrange(jnp.stack(found), "two m p -> m (p two)")[:M]
    y_MN = found[0][:M]
    return y_MN if row_scales_M1 is None else (y_MN * row_scales_M1).astype(out_dtype)


def _load(ref, row, rows: int, column, columns: int):
    """Return a tile, zeros past the edges of the array."""
    inside = (row + jnp.arange(rows) < ref.shape[0])[:, None]
    inside &= (column + jnp.arange(columns) < ref.shape[1])[None, :]
    tile = ref.at[pl.ds(row, rows), pl.ds(column, columns)]
    return plgpu.load(tile, mask=inside, other=jnp.zeros((), ref.dtype))


def _store(ref, row, column, tile):
    inside = (row + jnp.arange(tile.shape[0]) < ref.shape[0])[:, None]
    inside &= (column + jnp.arange(tile.shape[1]) < ref.shape[1])[None, :]
    window = ref.at[pl.ds(row, tile.shape[0]), pl.ds(column, tile.shape[1])]
    plgpu.store(window, tile.astype(ref.dtype), mask=inside)


def _nibbles(codes, per: int):
    """Return the values of each half: the bytes themselves, or low and high nibble."""
    if per == 1:
        return [codes]
    wide = codes.astype(jnp.int32)
    return [((wide << 28) >> 28).astype(jnp.int8), (wide >> 4).astype(jnp.int8)]


def _dot(x, w, transposed: bool = False):
    integer = x.dtype == jnp.int8
    if not integer:
        w = w.astype(x.dtype)
    return pl.dot(
        x, w, trans_b=transposed, precision="highest" if x.dtype == jnp.float32 else None
    ).astype(jnp.float32)


def _kernel(*refs, per: int, m: int, step: int, group: int, zeros: bool):
    *x_refs, values_ref, scales_ref = refs[: per + 2]
    zeros_ref = refs[per + 2] if zeros else None
    out_ref = refs[-1]
    row, column = pl.program_id(0) * m, pl.program_id(1) * _COLUMNS

    def one(i, total):
        at = i * step
        block = at // group
        scale = _load(scales_ref, block, 1, column, _COLUMNS).astype(jnp.float32)
        codes = _load(values_ref, at, step, column, _COLUMNS)
        part = jnp.zeros((m, _COLUMNS), jnp.float32)
        for x_ref, values in zip(x_refs, _nibbles(codes, per)):
            x = _load(x_ref, row, m, at, step)
            part += _dot(x, values)
            if zeros_ref is not None:
                zero = _load(zeros_ref, block, 1, column, _COLUMNS).astype(jnp.float32)
                part -= x.astype(jnp.float32).sum(axis=1)[:, None] * zero
        return total + part * scale

    steps = pl.cdiv(values_ref.shape[0], step)
    total = jax.lax.fori_loop(0, steps, one, jnp.zeros((m, _COLUMNS), jnp.float32))
    _store(out_ref, row, column, total)


def _dx_kernel(*refs, per: int, m: int, step: int, group: int, zeros: bool):
    dy_ref, values_ref, scales_ref = refs[:3]
    zeros_ref = refs[3] if zeros else None
    out_refs = refs[-per:]
    row, at = pl.program_id(0) * m, pl.program_id(1) * step
    block = at // group

    def one(i, totals):
        column = i * _COLUMNS
        scale = _load(scales_ref, block, 1, column, _COLUMNS).astype(jnp.float32)
        dy = _load(dy_ref, row, m, column, _COLUMNS)
        scaled = dy.astype(jnp.float32) * scale
        codes = _load(values_ref, at, step, column, _COLUMNS)
        parts = [
            _dot(scaled.astype(dy.dtype), values, transposed=True)
            for values in _nibbles(codes, per)
        ]
        if zeros_ref is not None:
            zero = _load(zeros_ref, block, 1, column, _COLUMNS).astype(jnp.float32)
            shift = (scaled * zero).sum(axis=1)[:, None]
            parts = [part - shift for part in parts]
        return tuple(total + part for total, part in zip(totals, parts))

    start = tuple(jnp.zeros((m, step), jnp.float32) for _ in range(per))
    totals = jax.lax.fori_loop(0, pl.cdiv(dy_ref.shape[1], _COLUMNS), one, start)
    for ref, total in zip(out_refs, totals):
        _store(ref, row, at, total)
