"""One entry to products with quantised weights; `implementation` says which code runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix

IMPLEMENTATIONS = ("reference", "xla")


def quantized_matmul(
    x_MK: Float[Array, "M K"],
    quantized_w_KN: QuantizedMatrix,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Multiply activations by a weight-only quantised matrix.

    Args:
      x_MK: activations.
      quantized_w_KN: see `QuantizedMatrix`.
      implementation: "reference" (dequantise in float32, then multiply), "xla" (dequantise to the
        activations' dtype; a scale per column is applied after the product), or None for xla.
      interpret: for Pallas implementations, of which there is none yet.
    Returns:
      [M, N] in the dtype of `x_MK`, accumulated in float32.
    Raises:
      JaxherdError: an unknown implementation, or inner dimensions that differ.
    """
    if x_MK.shape[1] != quantized_w_KN.shape[0]:
        raise JaxherdError(
            f"quantized_matmul: x has K = {x_MK.shape[1]} and the weights {quantized_w_KN.shape[0]}."
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise JaxherdError(
            f"quantized_matmul: no implementation {implementation!r}; "
            + nearest(implementation, IMPLEMENTATIONS)
        )
    quantized_w_KN.check()
    w = quantized_w_KN
    if implementation == "reference":
        y_MN = jnp.dot(x_MK.astype(jnp.float32), w.dequantize())
    elif w.blocks == 1 and w.zeros is None:
        y_MN = jnp.dot(
            x_MK, w.unpack().values.astype(x_MK.dtype), preferred_element_type=jnp.float32
        )
        y_MN = y_MN * w.scales.astype(jnp.float32)
    else:
        y_MN = jnp.dot(x_MK, w.dequantize(x_MK.dtype), preferred_element_type=jnp.float32)
    return y_MN.astype(x_MK.dtype)
