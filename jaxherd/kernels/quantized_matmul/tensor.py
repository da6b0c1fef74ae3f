"""A weight matrix in few bits, as a pytree.

Axis letters: K inner, N columns, B = K / group blocks along K.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.core.errors import JaxherdError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """w[k, n] = scales[k // group, n] * (values[k, n] - zeros[k // group, n]).

    Attributes:
      values_KN: integers, in int4 or int8.
      scales_BN: float32, one for each group of K and column; B = 1 is one per column.
      zeros_BN: zero points, or None for a symmetric code.
    """

    values_KN: Int[Array, "K N"]
    scales_BN: Float[Array, "B N"]
    zeros_BN: Float[Array, "B N"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N)."""
        return self.values_KN.shape

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "K N"]:
        """Return the matrix in floating point."""
        rows, columns = self.values_KN.shape
        blocks = self.scales_BN.shape[0]
        values = self.values_KN.astype(jnp.float32).reshape(blocks, rows // blocks, columns)
        if self.zeros_BN is not None:
            values = values - self.zeros_BN[:, None]
        return (values * self.scales_BN[:, None]).reshape(rows, columns).astype(dtype)


def quantize(
    w_KN: Float[Array, "K N"], *, bits: int = 8, group: int | None = None, symmetric: bool = True
) -> QuantizedMatrix:
    """Return the nearest code of a matrix.

    Symmetric: scale = max |w| / (2^(bits-1) - 1/2), values clipped to the integer range.
    Asymmetric: scale = (max - min) / (2^bits - 1) and a zero point.

    Args:
      w_KN: weights, inner axis first.
      bits: 4 or 8.
      group: rows of K that share a scale; None takes one scale per column.
      symmetric: without a zero point.
    Raises:
      JaxherdError: other bits, or a group that does not divide K.
    """
    rows, columns = w_KN.shape
    if bits not in (4, 8):
        raise JaxherdError(f"quantize: bits must be 4 or 8, got {bits}.")
    group = rows if group is None else group
    if group < 1 or rows % group:
        raise JaxherdError(f"quantize: a group of {group} does not divide K = {rows}.")
    dtype = jnp.int4 if bits == 4 else jnp.int8
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w = w_KN.astype(jnp.float32).reshape(rows // group, group, columns)
    if symmetric:
        scales = jnp.maximum(jnp.abs(w).max(axis=1), 1e-12) / (high + 0.5)
        values = jnp.round(w / scales[:, None])
        zeros = None
    else:
        least, most = jnp.minimum(w.min(axis=1), 0.0), jnp.maximum(w.max(axis=1), 0.0)
        scales = jnp.maximum(most - least, 1e-12) / (high - low)
        zeros = jnp.round(low - least / scales)
        values = jnp.round(w / scales[:, None]) + zeros[:, None]
    values = jnp.clip(values, low, high).astype(dtype).reshape(rows, columns)
    return QuantizedMatrix(values, scales, zeros)
