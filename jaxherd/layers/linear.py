"""Linear maps, embeddings and normalisations.

Axis letters: D width in, F width out, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.core.matmul_format import active_format
from jaxherd.core.modules import Axes, Module, axes_of, parameter
from jaxherd.core.platform import platform
from jaxherd.core.sharding import shard
from jaxherd.kernels import QuantizedMatrix
from jaxherd.layers import fp8
from jaxherd.layers.coded_product import coded_product, coded_rows
from jaxherd.layers.lookup import lookup


def normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype=jnp.float32) -> jax.Array:
    """Return Gaussian values of standard deviation `std`."""
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)


def matmul(
    x: Float[Array, "... D"],
    w_DF: Float[Array, "D F"] | QuantizedMatrix,
    axes: Axes | None = None,
) -> Float[Array, "... F"]:
    """Return x W; a quantised W is read as it is and gets no gradient (`quantized_matmul`).

    `axes` are the logical names of W's dimensions, which a quantised W needs on a mesh.

    Inside of `core.matmul_format` "fp8" the operands are rounded (`jaxherd.layers.fp8`).

    On CPU the gradient of W is asked for as x^T dy, already in W's own order.  The general rule
    forms its transpose, for which XLA on CPU recomputes dy element by element in transposed order,
    slower than the product itself.
    """
    if isinstance(w_DF, QuantizedMatrix):
        return coded_product(x, w_DF, axes)
    if active_format() != "fp8":
        return _plain(x, w_DF)
    return fp8.product(_plain(fp8.operand(x, -1), fp8.operand(w_DF, 0)))


def _plain(x, w_DF):
    return _matmul(x, w_DF) if platform() == "cpu" else x @ w_DF


@jax.custom_vjp
def _matmul(x, w_DF):
    return x @ w_DF


def _matmul_forward(x, w_DF):
    return _matmul(x, w_DF), (x, w_DF)


def _matmul_backward(saved, dy):
    x, w_DF = saved
    rows = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(dy, w_DF, (((dy.ndim - 1,), (1,)), ((), ())))
    return dx, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward)


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
        y = matmul(x, self.kernel[...], axes_of(self.kernel))
        return y if self.bias is None else y + self.bias[...]


class Embedding(Module):
    """A table of vocabulary entries, used to read tokens and, when tied, to score them.

    In few bits the table is a matrix [D, V], as scoring reads it.
    """

    def __init__(self, vocab_size: int, dim: int, *, key: jax.Array, std: float = 0.02):
        self.table = parameter(normal(key, (vocab_size, dim), std), ("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "..."], dtype=jnp.float32) -> Float[Array, "... D"]:
        """Return the rows of the table for these tokens; of a table in few bits in `dtype`."""
        table = self.table[...]
        if isinstance(table, QuantizedMatrix):
            return coded_rows(table, tokens, dtype)
        return lookup(table, tokens)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return logits x E^T."""
        table = self.table[...]
        if isinstance(table, QuantizedMatrix):
            return coded_product(x, table, ("embed", "vocab"))
        return jnp.einsum("...D,VD->...V", x, table)


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
