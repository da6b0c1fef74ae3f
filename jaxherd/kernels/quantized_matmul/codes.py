"""From floating point to codes: the conventions for scales, weights and dynamic activations.

Axis letters as in `tensor.py`; M rows of activations.

Three conventions for int4 are in use and must not be mixed in a comparison (mobilellm-pro.md
section 6).  With a = max |w| over a group or column, q = clip(round_half_even(w / scale)):

| name         | scale | used by                                         |
|--------------|-------|-------------------------------------------------|
| absmax/7.5   | a/7.5 | torchao and qwix; the largest |w| saturates at 7 |
| absmax/7     | a/7   | symmetric range, -8 unused                      |
| absmax/8     | max(a, 1e-6)/8 | Llama 4 files; a positive maximum saturates at 7 |
| q4_0         | signed a/-8 in float16, q = floor(w/scale + 8.5) - 8 | llama.cpp |

For int8: absmax/127.5, absmax/127, absmax/128 and q8_0 (a/127 in float16, halves away from zero);
for float8_e4m3fn: absmax/448, its largest finite value.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Shaped

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.kernels.quantized_matmul.tensor import CODES, QuantizedMatrix

CONVENTIONS = {
    "int4": ("absmax/7.5", "absmax/7", "absmax/8", "q4_0"),
    "int8": ("absmax/127.5", "absmax/127", "absmax/128", "q8_0"),
    "float8_e4m3fn": ("absmax/448",),
}
RANGE = {"int4": (-8, 7), "int8": (-128, 127), "float8_e4m3fn": (-448, 448)}
_FLOOR = 1e-12


def quantize(
    w: Float[Array, "*S K N"],
    *,
    bits: int | None = None,
    dtype: Any = None,
    group: int | None = None,
    symmetric: bool = True,
    convention: str | None = None,
    scale_dtype: Any = None,
    packed: bool = False,
) -> QuantizedMatrix:
    """Return the code of a matrix, or of a stack of them.

    Symmetric: the scale of `convention`, values rounded and clipped to the integer range.
    Asymmetric (int4 and int8): scale = (max - min) / (2^bits - 1) over a range widened to hold
    zero, and the zero point round(low - min / scale).

    Args:
      w: weights, inner axis first.
      bits: 4 or 8, for integers; 8 if neither it nor `dtype` is given.
      dtype: "int4", "int8" or "float8_e4m3fn", in place of `bits`.
      group: rows of K that share a scale; None takes one scale per column.
      symmetric: without a zero point.
      convention: of symmetric scales, one of `CONVENTIONS`; None takes the first.
      scale_dtype: float32 for None.  Scales are rounded to it before the values are computed, so
        that the values suit the scales that are kept; q4_0 and q8_0 are defined with float16
        scales, rounded after.
      packed: two int4 values a byte.
    Raises:
      JaxherdError: other bits or dtypes, a group that does not divide K, an unknown convention.
    """
    code = _code(bits, dtype)
    if scale_dtype is None:
        scale_dtype = jnp.float16 if convention in ("q4_0", "q8_0") else jnp.float32
    rows = w.shape[-2]
    group = rows if group is None else group
    if group < 1 or rows % group:
        raise JaxherdError(f"quantize: a group of {group} does not divide K = {rows}.")
    if not symmetric and (code == "float8_e4m3fn" or convention is not None):
        raise JaxherdError(
            "quantize: an asymmetric code is int4 or int8 and has no convention; use symmetric=True."
        )
    w_BgN = rearrange(w.astype(jnp.float32), "... (b g) n -> ... b g n", g=group)
    if symmetric:
        values, scales = _symmetric(w_BgN, code, convention, scale_dtype)
        zeros = None
    else:
        values, scales, zeros = _asymmetric(w_BgN, code, scale_dtype)
    values = rearrange(values, "... b g n -> ... (b g) n").astype(jnp.dtype(code))
    matrix = QuantizedMatrix(values, scales, zeros)
    return matrix.pack() if packed else matrix


def _code(bits: int | None, dtype: Any) -> str:
    if dtype is not None and bits is not None:
        raise JaxherdError("quantize: give bits or dtype, not both.")
    if dtype is None:
        if bits not in (None, 4, 8):
            raise JaxherdError(f"quantize: bits must be 4 or 8, got {bits}.")
        return "int4" if bits == 4 else "int8"
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in CODES:
        raise JaxherdError(f"quantize: no code {name!r}; " + nearest(name, CODES))
    return name


def check_convention(code: str, convention: str | None) -> str:
    """Return the convention, or the code's first for None.

    Raises:
      JaxherdError: one that this code does not have.
    """
    if convention is None:
        return CONVENTIONS[code][0]
    if convention not in CONVENTIONS[code]:
        raise JaxherdError(
            f"quantize: {code} has no convention {convention!r}; "
            + nearest(convention, CONVENTIONS[code])
        )
    return convention


def _symmetric(w_BgN, code, convention, scale_dtype):
    convention = check_convention(code, convention)
    low, high = RANGE[code]
    most_BN = jnp.abs(w_BgN).max(axis=-2)
    if convention == "q4_0":
        first = jnp.abs(w_BgN).argmax(axis=-2)[..., None, :]
        scales = jnp.take_along_axis(w_BgN, first, axis=-2)[..., 0, :] / -8  # exact
        values = jnp.trunc(w_BgN * _inverse(scales)[..., None, :] + 8.5)
        return jnp.clip(values, 0, 15) - 8, scales.astype(scale_dtype)
    if convention == "q8_0":
        scales = _divide(most_BN, 127)
        x = w_BgN * _inverse(scales)[..., None, :]
        whole = jnp.floor(jnp.abs(x))
        values = jnp.sign(x) * (whole + jnp.floor(2 * (jnp.abs(x) - whole)))
        return values, scales.astype(scale_dtype)
    floor = 1e-6 if convention == "absmax/8" else _FLOOR
    scales = _divide(jnp.maximum(most_BN, floor), float(convention.removeprefix("absmax/")))
    scales = _kept(scales, scale_dtype)
    values = _divide(w_BgN, scales.astype(jnp.float32)[..., None, :])
    if code != "float8_e4m3fn":
        values = jnp.round(values)
    return jnp.clip(values, low, high), scales


def _divide(a, b):
    """Return a / b rounded once, whatever is broadcast.

    XLA turns a division by something broadcast into a product with its reciprocal, which rounds
    twice: one value in four differs in the last bit, and ties fall to the other side than in the
    formats to be met bit for bit.  A choice by `a == a` is a broadcast that it cannot see.
    """
    return a / jnp.where(a == a, b, a)


def _kept(scales, dtype):
    """Round to the dtype that is stored, never to zero, by which the values are divided."""
    return jnp.maximum(scales, jnp.finfo(dtype).tiny).astype(dtype)


def _inverse(scales):
    return jnp.where(scales == 0, 0, 1 / jnp.where(scales == 0, 1, scales))


def _asymmetric(w_BgN, code, scale_dtype):
    low, high = RANGE[code]
    least, most = jnp.minimum(w_BgN.min(axis=-2), 0.0), jnp.maximum(w_BgN.max(axis=-2), 0.0)
    scales = _kept(_divide(jnp.maximum(most - least, _FLOOR), high - low), scale_dtype)
    scales32 = scales.astype(jnp.float32)
    zeros = jnp.clip(jnp.round(low - _divide(least, scales32)), low, high)
    values = jnp.round(_divide(w_BgN, scales32[..., None, :])) + zeros[..., None, :]
    return jnp.clip(values, low, high), scales, zeros.astype(scale_dtype)


def quantize_rows(
    x_MK: Float[Array, "*S M K"],
    dtype: str = "int8",
    *,
    convention: str = "absmax/127",
    upper_bound: float | None = None,
    across: tuple[str, ...] = (),
) -> tuple[Shaped[Array, "*S M K"], Float[Array, "*S M 1"]]:
    """Return dynamic symmetric codes of activations, a scale per token: x = scale * values.

    Args:
      x_MK: activations.
      dtype: "int8" or "float8_e4m3fn".
      convention: of int8 scales; float8_e4m3fn uses absmax/448.
      upper_bound: of the row maximum that sets the scale (Llama 4's fp8_mixed: 1200); what is
        larger saturates.
      across: mesh axes over which K is split, inside `shard_map`: the maximum is of whole rows.
    Raises:
      JaxherdError: another dtype or convention.
    """
    if dtype not in ("int8", "float8_e4m3fn"):
        raise JaxherdError(
            f"activations are quantised to int8 or float8_e4m3fn, not {dtype}: change `dtype`."
        )
    convention = check_convention(dtype, convention if dtype == "int8" else None)
    x = x_MK.astype(jnp.float32)
    most = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), _FLOOR)
    if across:
        most = jax.lax.pmax(most, across)
    if upper_bound is not None:
        most = jnp.minimum(most, upper_bound)
    scales = _divide(most, float(convention.removeprefix("absmax/")))
    low, high = RANGE[dtype]
    values = _divide(x, scales)
    values = jnp.clip(jnp.round(values) if dtype == "int8" else values, low, high)
    return values.astype(jnp.dtype(dtype)), scales
