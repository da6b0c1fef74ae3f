"""Rotary position embedding, half-split form, with the published frequency scalings.

Pair (m, m + H/2) of a head is rotated by p * w_m, w_m = theta^(-2m/H).  Checkpoints in the
interleaved form (pairs 2m, 2m+1) differ by a fixed permutation of each head's query and key
columns, which the mapping tables in `jaxherd.weights` apply; scores are the same.

Axis letters: B batch, T time, N heads, H head size, h = H / 2, g = H / 4.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are changed for contexts longer than the original one.

    Kinds, with the fields that they use:

    - linear: w / factor.
    - dynamic: NTK-aware growth of theta once `context_length` passes `original_length`, times
      `factor`.
    - llama3: wavelengths above original_length / low_freq_factor are divided by `factor`, those
      below original_length / high_freq_factor kept, a linear blend between.  Llama 4 Scout has
      factor 16 and low = high = 1, where the band between is empty.
    - yarn: blend by rotations at the original length, between `beta_fast` and `beta_slow`, with
      cos and sin multiplied by `attention_factor` (0.1 ln(factor) + 1 when None).
    - longrope: w / short_factor or w / long_factor per frequency, by whether `context_length`
      passes `original_length`; cos and sin multiplied by `attention_factor`.

    Source: llama4.md 2.4 for llama3; the methods' papers for the others.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    context_length: int | None = None


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """theta, an optional scaling, and the fraction of the head that is rotated."""

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    partial: float = 1.0


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Return (w [h] float32, factor on cos and sin) for heads of `head_dim`."""
    rotated = int(head_dim * rope.partial)
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    w = (1.0 / (np.float32(rope.theta) ** exponents)).astype(np.float32)
    scaling = rope.scaling
    if scaling is None:
        return w, 1.0
    if scaling.kind == "linear":
        return (w / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "dynamic":
        length = max(scaling.context_length or 0, scaling.original_length)
        stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
        theta = rope.theta * stretch ** (rotated / (rotated - 2))
        return (1.0 / (theta**exponents)).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        return _llama3(w, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(w, scaling, rope.theta, rotated)
    return _longrope(w, scaling)


def _llama3(w: np.ndarray, s: RopeScaling) -> np.ndarray:
    wavelength = 2 * math.pi / w
    low, high = s.original_length / s.low_freq_factor, s.original_length / s.high_freq_factor
    divided = w / s.factor
    scaled = np.where(wavelength > low, divided, w)
    band = (wavelength <= low) & (wavelength >= high)
    # With low = high the band is a single wavelength at most; dividing by zero is never evaluated.
    if s.high_freq_factor != s.low_freq_factor and band.any():
        width = s.high_freq_factor - s.low_freq_factor
        smooth = (s.original_length / wavelength - s.low_freq_factor) / width
        scaled = np.where(band, (1 - smooth) * divided + smooth * w, scaled)
    return scaled.astype(np.float32)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(w: np.ndarray, s: RopeScaling, theta: float, dim: int) -> tuple[np.ndarray, float]:
    def index(rotations: float) -> float:
        return dim * math.log(s.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(s.beta_fast), index(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1).astype(np.float32)
    blended = (w / s.factor) * ramp + w * (1 - ramp)
    attention = s.attention_factor
    if attention is None:
        if s.mscale and s.mscale_all_dim:
            attention = _mscale(s.factor, s.mscale) / _mscale(s.factor, s.mscale_all_dim)
        else:
            attention = _mscale(s.factor)
    return blended.astype(np.float32), float(attention)


def _longrope(w: np.ndarray, s: RopeScaling) -> tuple[np.ndarray, float]:
    context = s.context_length or s.original_length
    factors = s.long_factor if context > s.original_length else s.short_factor
    attention = s.attention_factor
    if attention is None:
        ratio = s.factor if s.factor > 1 else context / s.original_length
        attention = (
            1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(s.original_length))
        )
    return (w / np.asarray(factors, np.float32)).astype(np.float32), float(attention)


def angles(
    rope: RopeConfig, head_dim: int, positions_BT: Int[Array, "B T"], *, rounded_to: Any = None
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """Return float32 (cos, sin) of every position and frequency.

    Args:
      rope: of the frequencies.
      head_dim: H.
      positions_BT: p.
      rounded_to: a dtype that the frequencies have gone through on their way, as those of a table
        that was stored in it; None for none.
    """
    w_h, factor = frequencies(rope, head_dim)
    if rounded_to is not None:
        w_h = w_h.astype(jnp.dtype(rounded_to)).astype(np.float32)
    phase_BTh = positions_BT.astype(jnp.float32)[..., None] * jnp.asarray(w_h)
    return jnp.cos(phase_BTh) * factor, jnp.sin(phase_BTh) * factor


def grid_angles(
    rope: RopeConfig, head_dim: int, columns: Sequence[int], rows: Sequence[int]
) -> tuple[Float[Array, "T h"], Float[Array, "T h"]]:
    """Return float32 (cos, sin) for patches on a grid: pairs below h/2 turn by column, others by row.

    With g = h/2 = H/4 frequencies w_j = theta^(-2j / (H/2)), pair j turns by column * w_j and pair
    g + j by row * w_j.  Coordinates count from 1; column 0 of row 0 does not turn at all, which is
    where a class token stands (llama4.md 4).

    Args:
      rope: gives theta.
      head_dim: H, a multiple of 4.
      columns, rows: of every patch.
    """
    w_g, factor = frequencies(rope, head_dim // 2)
    places_TP = np.stack([np.asarray(columns), np.asarray(rows)], axis=-1).astype(np.float32)
    phase_Th = (places_TP[:, :, None] * w_g).reshape(len(columns), -1)
    return jnp.cos(phase_Th) * factor, jnp.sin(phase_Th) * factor


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    cos_sin: tuple[Float[Array, "B T h"], Float[Array, "B T h"]],
) -> Float[Array, "B T N H"]:
    """Rotate each head; computed in float32, returned in the dtype of `x_BTNH`."""
    cos, sin = (table[:, :, None, :] for table in cos_sin)
    half = cos.shape[-1]
    x = x_BTNH.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    parts = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(parts, axis=-1).astype(x_BTNH.dtype)


def interleaved_to_half(rows: Any, head_dim: int, axis: int = 0) -> Any:
    """Reorder flattened heads along `axis` from pairs (2m, 2m+1) to pairs (m, m + H/2)."""
    return _regroup(rows, axis, (head_dim // 2, 2))


def half_to_interleaved(rows: Any, head_dim: int, axis: int = 0) -> Any:
    """Invert `interleaved_to_half`."""
    return _regroup(rows, axis, (2, head_dim // 2))


def _regroup(rows, axis: int, grouping: tuple[int, int]):
    shape = rows.shape
    before, size, after = shape[:axis], shape[axis], shape[axis + 1 :]
    split = rows.reshape(*before, size // math.prod(grouping), *grouping, *after)
    return split.swapaxes(axis + 1, axis + 2).reshape(shape)
