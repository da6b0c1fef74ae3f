"""Inside a Pallas TPU kernel: from a block of codes to a block of floats.

Shared by every kernel that reads a `QuantizedMatrix`.  Axis letters: k, n of a tile, b = k / group.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu


def block_values(values: jax.Array, packed: bool) -> jax.Array:
    """Return int4, int8 or float8 values [k, n] of a block as stored.

    Packed bytes are reinterpreted, not computed on: a register of int8 rows read as int4 has the
    low nibble of row i at row 2 i and the high one at 2 i + 1, which is the order of `pack_int4`.
    """
    return pltpu.bitcast(values, jnp.int4) if packed else values


def scale_bits(scales: jax.Array) -> jax.Array:
    """Outside of the kernel: float16, which Mosaic does not load, as its bits."""
    if scales.dtype == jnp.float16:
        return jax.lax.bitcast_convert_type(scales, jnp.int16)
    return scales


def block_scales(scales: jax.Array) -> jax.Array:
    """Return float32 scales of a block given as `scale_bits`.

    A float16 is placed on the exponent of a float32, off by 2^112, which a product corrects.
    Subnormal ones are 2^-24 times an integer.  Infinities and NaN are no scales.
    """
    if scales.dtype != jnp.int16:
        return scales.astype(jnp.float32)
    bits = scales.astype(jnp.int32)
    normal = jax.lax.bitcast_convert_type((bits & 0x7FFF) << 13, jnp.float32) * 2.0**112
    subnormal = (bits & 0x3FF).astype(jnp.float32) * 2.0**-24
    size = jnp.where((bits & 0x7C00) == 0, subnormal, normal)
    return jnp.where(bits < 0, -size, size)


def dequantize_block(
    values_kn: jax.Array, scales_bn: jax.Array, zeros_bn: jax.Array | None, dtype
) -> jax.Array:
    """Return scales * (values - zeros) of a block whose groups are whole."""
    (k, n), b = values_kn.shape, scales_bn.shape[0]
    w = values_kn.astype(jnp.float32).reshape(b, k // b, n)
    if zeros_bn is not None:
        w = w - zeros_bn[:, None, :]
    return (w * scales_bn[:, None, :]).reshape(k, n).astype(dtype)
