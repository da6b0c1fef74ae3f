"""LayerNorm with weight and bias, in float32 whatever the compute dtype.  Axis letter: D width."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.modules import Module, parameter


class LayerNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * w + b over the last axis, with the biased variance."""

    def __init__(self, dim: int, eps: float = 1e-5):
        self.scale = parameter(jnp.ones(dim), ("norm",))
        self.bias = parameter(jnp.zeros(dim), ("norm",))
        self.eps = eps

    def __call__(
        self, x: Float[Array, "... D"], plus: Float[Array, "... D"] | None = None
    ) -> Float[Array, "... D"]:
        """Return the norm (and `plus`, added before the cast back) in the dtype of `x`."""
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(axis=-1, keepdims=True)
        scale = jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + self.eps)
        y = centred * scale * self.scale[...].astype(jnp.float32)
        y = y + self.bias[...].astype(jnp.float32)
        return (y if plus is None else y + plus).astype(x.dtype)
