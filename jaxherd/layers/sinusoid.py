"""Sinusoidal features of a real number, cosines first.  Axis letters: D width, h = D / 2."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num


def sinusoid(
    x: Num[Array, "..."],
    dim: int,
    *,
    max_period: float = 10000.0,
    include_last: bool = False,
) -> Float[Array, "... D"]:
    """Return [cos(x w_k), sin(x w_k)] in float32, w_k = max_period^(-k / h), k = 0..h-1.

    Args:
      x: times or positions, used as they are.
      dim: even number of features.
      include_last: w_k = max_period^(-k / (h - 1)) instead, so that the slowest wave has the full
        period; audiocraft's positions are made so, its time embedding is not
        (melodyflow.md 3.2 and 3.3).
    """
    half = dim // 2
    divisor = max(half - 1, 1) if include_last else half
    w_h = np.power(max_period, -np.arange(half, dtype=np.float64) / divisor).astype(np.float32)
    phase = x.astype(jnp.float32)[..., None] * w_h
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
