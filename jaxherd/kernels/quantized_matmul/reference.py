"""The definition of products with quantised weights, and the plain XLA form.

Axis letters: M rows, K inner, N columns.
"""

import jax.numpy as jnp

from jaxherd.kernels.quantized_matmul.codes import quantize_rows
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix

# Llama 4 clips the row maximum that sets an fp8 activation scale (llama4.md section 9).
FP8_UPPER_BOUND = 1200.0


def activation_codes(x_MK, activations: str, across: tuple[str, ...] = ()):
    """Return (codes, scales) of rows for "int8" or "float8_e4m3fn"; see `quantize_rows`."""
    bound = FP8_UPPER_BOUND if activations == "float8_e4m3fn" else None
    return quantize_rows(x_MK, activations, upper_bound=bound, across=across)


def reference(x_MK, w: QuantizedMatrix, activations: str | None, across: tuple[str, ...] = ()):
    """Dequantise everything in float32, then multiply."""
    x = x_MK.astype(jnp.float32)
    if activations is not None:
        codes, scales_M1 = activation_codes(x_MK, activations, across)
        x = codes.astype(jnp.float32) * scales_M1
    return jnp.dot(x, w.dequantize(), precision="highest").astype(x_MK.dtype)


def xla(x_MK, w: QuantizedMatrix, activations: str | None, across: tuple[str, ...] = ()):
    """Multiply codes where a scale per column allows it, else dequantise to the dtype of x.

    Packed bytes and groups are expanded in a pass of their own, before the product.
    """
    plain = w.blocks == 1 and w.zeros is None
    x, scales_M1 = x_MK, None
    if activations is not None:
        x, scales_M1 = activation_codes(x_MK, activations, across)
        if not (plain and activations == "int8" and w.code != "float8_e4m3fn"):
            x = x.astype(x_MK.dtype)  # codes of eight bits are exact in bfloat16
    if plain:
        wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        values = w.unpack().values.astype(x.dtype)
        y_MN = jnp.dot(x, values, preferred_element_type=wide)
        y_MN = y_MN.astype(jnp.float32) * w.scales.astype(jnp.float32)
    else:
        y_MN = jnp.dot(x, w.dequantize(x.dtype), preferred_element_type=jnp.float32)
    if scales_M1 is not None:
        y_MN = y_MN * scales_M1
    return y_MN.astype(x_MK.dtype)
