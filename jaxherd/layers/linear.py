"""Linear maps, embeddings and normalisations.

Axis letters: D width in, F width out, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.core.modules import Axes, Module, parameter
from jaxherd.core.sharding import shard


def normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype=jnp.float32) -> jax.Array:
    """Return Gaussian values of standard deviation `std`."""
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)


class Linear(Module):
    """y = x W (+ b) with W stored as [in, out]."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: Axes,
        *,
        key: jax.Array,
        bias: bool = False,
        std: float = 0.02,
    ):
        self.kernel = parameter(normal(key, (in_dim, out_dim), std), axes)
        self.bias = parameter(jnp.zeros(out_dim), (axes[1],)) if bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Return x W (+ b)."""
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class Embedding(Module):
    """A table of vocabulary entries, used to read tokens and, when tied, to score them."""

    def __init__(self, vocab_size: int, dim: int, *, key: jax.Array, std: float = 0.02):
        self.table = parameter(normal(key, (vocab_size, dim), std), ("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Return the rows of the table for these tokens."""
        return jnp.take(self.table[...], tokens, axis=0)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return logits x E^T."""
        return jnp.einsum("...D,VD->...V", x, self.table[...])


class RMSNorm(Module):
    """y = (x / sqrt(mean(x^2) + eps)) * w, computed in float32 and cast back before w.

    Source: llama4.md 2.1.
    """

    def __init__(self, dim: int, eps: float):
        self.scale = parameter(jnp.ones(dim), ("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Return the scaled norm over the last axis."""
        return unit_rms(x, self.eps) * self.scale[...]


def unit_rms(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """Return x / sqrt(mean(x^2) + eps) over the last axis, in float32, cast back."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def residual(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Constrain the residual stream to the active layout."""
    return shard(x_BTD, "batch", "length", "act_embed")
