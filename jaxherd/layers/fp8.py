"""Matrix products whose operands are rounded to eight bits, for training.

    y = Q(x) Q(W),   dx = Q'(dy) Q(W)^T,   dW = Q(x)^T Q'(dy)

Q rounds to e4m3 (4 bits of exponent, greatest value 448), Q' to e5m2 (57,344), each row, or column of
W, divided by its own greatest value.  The rounded values are multiplied back before the product, the
form that XLA turns into products of eight bits where the hardware has them, and rounding itself has
the gradient of the identity.  That Llama 4 was trained in FP8 is disclosed, the recipe is not
(llama4.md section 7): this one is the usual one by rows.
"""

import functools

import jax
import jax.numpy as jnp

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


def rounded(x: jax.Array, axis: int, dtype=FORWARD) -> jax.Array:
    """Return x as eight bits would keep it, scaled by its greatest value along an axis.

    Args:
      x: floating values; what is not finite stays so.
      axis: along which values share a scale, the one that a product sums over.
      dtype: of eight bits.
    """
    wide = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    scale = jnp.where(most > 0, most / float(jnp.finfo(dtype).max), 1.0)
    return ((wide / scale).astype(dtype).astype(jnp.float32) * scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def operand(x: jax.Array, axis: int) -> jax.Array:
    """Return x rounded to e4m3; its gradient passes unchanged."""
    return rounded(x, axis)


operand.defvjp(lambda x, axis: (rounded(x, axis), None), lambda axis, _, dy: (dy,))


@jax.custom_vjp
def product(y: jax.Array) -> jax.Array:
    """Return y; its gradient is rounded to e5m2 by rows."""
    return y


product.defvjp(lambda y: (y, None), lambda _, dy: (rounded(dy, -1, GRADIENT),))
