"""The snake activation, with a frequency learnt for each channel.  C channels."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.modules import Module, parameter


class Snake(Module):
    """y = x + sin^2(alpha x) / (alpha + 1e-9), computed in float32 and cast back.

    Source: melodyflow.md 2.1.
    """

    def __init__(self, channels: int):
        self.alpha = parameter(jnp.ones(channels), ("norm",))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Return the activation of every channel."""
        x32, alpha = x.astype(jnp.float32), self.alpha[...].astype(jnp.float32)
        return (x32 + jnp.square(jnp.sin(alpha * x32)) / (alpha + 1e-9)).astype(x.dtype)
