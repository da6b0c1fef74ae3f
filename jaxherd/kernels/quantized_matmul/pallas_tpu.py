"""Products with quantised weights on TPU: the codes are read once and decoded in VMEM.

Axis letters: M rows, K inner, N columns of the whole; m, k, n of a tile; b = k / group.

Grid (M / m, N / n, K / k), the inner axis last.  Up to 64 rows are one tile of M, so that the codes,
scales and zero points pass from HBM once; more rows read them once per m rows, and each read is
decoded again.

- A scale per column multiplies the accumulator; its zero points come off as sum_k x[m, k] * z[n].
- Groups along K need the block itself in floats: it is decoded to the dtype of x in VMEM.
- Quantised activations meet integer (int32 accumulator) or float8 codes directly; both scales
  multiply the accumulator.

The gradient of x, dy W^T, is the same kernel with K and N exchanged: the scale of a column
multiplies dy instead.

VMEM: two buffers for each block, the decoded block, the accumulator: `tiles.vmem_bytes`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxherd.kernels.quantized_matmul.block import (
    block_scales,
    block_values,
    dequantize_block,
    scale_bits,
)
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix
from jaxherd.kernels.quantized_matmul.tiles import FALLBACK, LIMITS, Operands, Tiles, choose


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is static about one kernel."""

    tiles: Tiles
    packed: bool
    grouped: bool
    zeros: bool
    activations: str
    """"float", or the dtype of quantised rows."""
    transposed: bool
    native: bool
    """Whether codes of both sides go to the matrix unit as they are: int8 everywhere (on tpu7x
    at the rate of bfloat16), float8 on tpu7x; elsewhere float8 widens to bfloat16, which holds it."""

    @property
    def steps(self) -> int:
        """Steps of the accumulator."""
        return self.tiles.columns if self.transposed else self.tiles.inner

    @property
    def ragged(self) -> bool:
        """Whether the last step reaches past the inner axis, into whatever lies there."""
        t = self.tiles
        return t.N % t.n != 0 if self.transposed else t.K % t.k != 0


def form_of(
    x_MK: Any,
    w: QuantizedMatrix,
    *,
    chip: str | None,
    activations: str | None = None,
    transposed: bool = False,
    tiles: Tiles | None = None,
) -> _Form:
    """Return what is static about the kernel of these operands (arrays or shapes)."""
    group = w.group if w.blocks > 1 else None
    integers = w.code != "float8_e4m3fn" and activations == "int8"
    floats = chip == "tpu7x" and w.code == activations == "float8_e4m3fn"
    if tiles is None:
        limits = LIMITS.get(chip or "", FALLBACK)
        K, N = w.shape
        tiles = choose(limits, (x_MK.shape[0], K, N), operands_of(x_MK, w), transposed=transposed)
    return _Form(
        tiles,
        w.packed,
        group is not None,
        w.zeros is not None,
        activations or "float",
        transposed,
        native=group is None and (integers or floats),
    )


def operands_of(x_MK: Any, w: QuantizedMatrix) -> Operands:
    """Return what decides on tiles; results and decoded blocks are at most as wide as allowed."""
    size = jnp.dtype(x_MK.dtype).itemsize
    floats = max(size, 2)
    return Operands(
        x_bytes=size,
        code_bytes=0.5 if w.code == "int4" else 1,
        out_bytes=floats,
        decoded_bytes=floats,
        group=w.group if w.blocks > 1 else None,
        zeros=w.zeros is not None,
    )


def supports(w: QuantizedMatrix) -> str | None:
    """Return why the kernel cannot take this matrix, or None."""
    if w.ndim != 2:
        return "a stack of matrices: pick one, or use grouped_matmul"
    if w.blocks > 1 and w.group % 32:
        return f"groups of {w.group} rows, which are no multiple of 32"
    return None


def matmul(
    x_MK: jax.Array,
    w: QuantizedMatrix,
    row_scales_M1: jax.Array | None = None,
    *,
    chip: str | None,
    transposed: bool = False,
    interpret: bool = False,
    out_dtype=None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Return x W [M, N], or with `transposed` x W^T [M, K] for x of [M, N].

    Args:
      x_MK: floats, or int8 or float8 codes with `row_scales_M1`.
      w: the matrix; float32 x meets it in full precision, bfloat16 x in bfloat16.
      row_scales_M1: of quantised activations.
      chip: name in `LIMITS`; another takes `FALLBACK`.
      transposed: multiply by the transpose (float x alone).
      interpret: run on the CPU.
      out_dtype: of the result; None for that of x.
      tiles: for tests and measurements, in place of the table's.
    """
    K, N = w.shape
    M = x_MK.shape[0]
    activations = None if row_scales_M1 is None else x_MK.dtype.name
    form = form_of(x_MK, w, chip=chip, activations=activations, transposed=transposed, tiles=tiles)
    tiles, limits = form.tiles, LIMITS.get(chip or "", FALLBACK)
    out = jax.ShapeDtypeStruct((M, K if transposed else N), out_dtype or x_MK.dtype)
    operands = [x_MK, w.values, scale_bits(w.scales)]
    operands += [scale_bits(w.zeros)] if form.zeros else []
    operands += [row_scales_M1] if row_scales_M1 is not None else []
    in_specs, out_spec = _specs(form, w)
    return pl.pallas_call(
        functools.partial(_kernel, form=form),
        grid=(
            tiles.rows,
            *((tiles.inner, tiles.columns) if transposed else (tiles.columns, tiles.inner)),
        ),
        in_specs=in_specs,
        out_specs=out_spec,
        out_shape=out,
        scratch_shapes=[
            pltpu.VMEM((tiles.m, tiles.k if transposed else tiles.n), _accumulator(form))
        ]
        if form.steps > 1
        else [],
        cost_estimate=pl.CostEstimate(
            flops=2 * M * K * N, transcendentals=0, bytes_accessed=hbm_bytes(x_MK, w, form, out)
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            # What the compiler spills and stages comes on top of the blocks.
            vmem_limit_bytes=limits.vmem_bytes * 5 // 4,
        ),
        interpret=interpret,
        name=f"quantized_matmul_{w.code}" + ("_dx" if transposed else ""),
    )(*operands)


def _specs(form: _Form, w: QuantizedMatrix):
    """Return the blocks: (inputs, output).  Grid (i, j, step): the last runs along the inner axis."""
    t = form.tiles
    per = 2 if form.packed else 1
    b = t.k // w.group if form.grouped else 1
    if form.transposed:
        x = pl.BlockSpec((t.m, t.n), lambda i, j, step: (i, step))
        values = pl.BlockSpec((t.k // per, t.n), lambda i, j, step: (j, step))
        scales = pl.BlockSpec((b, t.n), lambda i, j, step: (j if form.grouped else 0, step))
        out = pl.BlockSpec((t.m, t.k), lambda i, j, step: (i, j))
    else:
        x = pl.BlockSpec((t.m, t.k), lambda i, j, step: (i, step))
        values = pl.BlockSpec((t.k // per, t.n), lambda i, j, step: (step, j))
        scales = pl.BlockSpec((b, t.n), lambda i, j, step: (step if form.grouped else 0, j))
        out = pl.BlockSpec((t.m, t.n), lambda i, j, step: (i, j))
    rows = pl.BlockSpec((t.m, 1), lambda i, j, step: (i, 0))
    inputs = [x, values, scales]
    inputs += [scales] if form.zeros else []
    inputs += [rows] if form.activations != "float" else []
    return inputs, out


def _accumulator(form: _Form):
    return jnp.int32 if form.native and form.activations == "int8" else jnp.float32


def _kernel(x_ref, values_ref, scales_ref, *rest, form: _Form):
    rest = list(rest)
    zeros_ref = rest.pop(0) if form.zeros else None
    rows_ref = rest.pop(0) if form.activations != "float" else None
    out_ref = rest.pop(0)
    scales = block_scales(scales_ref[...])
    zeros = None if zeros_ref is None else block_scales(zeros_ref[...])
    step = pl.program_id(2)
    part = (_dx_part if form.transposed else _part)(
        form, x_ref[...], block_values(values_ref[...], form.packed), scales, zeros, step,
        out_ref.dtype,
    )  # fmt: skip

    def finish(total):
        y = total.astype(jnp.float32)
        if not form.transposed and not form.grouped:
            y = y * scales
        if rows_ref is not None:
            y = y * rows_ref[...]
        out_ref[...] = y.astype(out_ref.dtype)

    if form.steps == 1:
        finish(part)
        return
    (sum_ref,) = rest

    @pl.when(step == 0)
    def _():
        sum_ref[...] = part

    @pl.when(step > 0)
    def _():
        sum_ref[...] += part

    @pl.when(step == form.steps - 1)
    def _():
        finish(sum_ref[...])


def _part(form: _Form, x, values, scales, zeros, step, floats):
    """Return this step's share of the accumulator."""
    t = form.tiles
    x = _inside(form, x, step, t.k, t.K, axis=1)
    if form.grouped:
        w = dequantize_block(values, scales, zeros, floats)
        # Past K there may be anything in the scales, and a NaN times zero is none.
        w = _inside(form, w, step, t.k, t.K, axis=0)
        return _dot(x.astype(floats), w)
    if form.native:
        # int8 and float8 codes are what the matrix unit multiplies; int4 widens to int8.
        w = values.astype(x.dtype)
    else:
        w = values.astype(floats)
        x = x.astype(floats)
    if jnp.issubdtype(values.dtype, jnp.floating):
        w = _inside(form, w, step, t.k, t.K, axis=0)
    part = _dot(x, w)
    if zeros is None:
        return part
    wide = jnp.int32 if part.dtype == jnp.int32 else jnp.float32
    return part - x.astype(wide).sum(axis=1, keepdims=True) * zeros.astype(wide)


def _dx_part(form: _Form, dy, values, scales, zeros, step, floats):
    """Return this step's share of dy W^T."""
    t = form.tiles
    if form.grouped:
        w = _inside(form, dequantize_block(values, scales, zeros, floats), step, t.n, t.N, axis=1)
        return _dot(_inside(form, dy, step, t.n, t.N, axis=1), w, ((1,), (1,)))
    scaled = _inside(form, dy.astype(jnp.float32) * scales, step, t.n, t.N, axis=1)
    w = values.astype(floats)
    if jnp.issubdtype(values.dtype, jnp.floating):
        w = _inside(form, w, step, t.n, t.N, axis=1)
    part = _dot(scaled.astype(floats), w, ((1,), (1,)))
    if zeros is None:
        return part
    shift = _inside(form, scaled * zeros, step, t.n, t.N, axis=1)
    return part - shift.sum(axis=1, keepdims=True)


def _dot(x, w, inner=((1,), (0,))):
    integer = jnp.issubdtype(w.dtype, jnp.integer)
    return jax.lax.dot_general(
        x,
        w,
        (inner, ((), ())),
        preferred_element_type=jnp.int32 if integer else jnp.float32,
        # Of float32 the matrix unit takes the leading bits alone unless it is told otherwise.
        precision=jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None,
    )


def _inside(form: _Form, block, step, tile: int, size: int, *, axis: int):
    """Zero what lies past the end of the inner axis."""
    if not form.ragged:
        return block
    at = jax.lax.broadcasted_iota(jnp.int32, block.shape, axis) + step * tile
    return jnp.where(at < size, block, jnp.zeros_like(block))


def hbm_bytes(x: Any, w: QuantizedMatrix, form: _Form, out: jax.ShapeDtypeStruct) -> int:
    """Return the bytes that the blocks move: an input block is fetched when its index changes."""
    t = form.tiles
    outer, inner = (t.inner, t.columns) if form.transposed else (t.columns, t.inner)
    whole = w.nbytes * t.rows
    # With one inner step the block of x stays while the columns pass.
    x_bytes = x.size * x.dtype.itemsize * (outer if inner > 1 else 1)
    return whole + x_bytes + out.size * out.dtype.itemsize
