"""Other people's layouts of quantised weights, to and from `QuantizedMatrix`, bit for bit.

No value is rounded here: codes and scales are moved (but for the zero points of Q4_1, which the file
has as products with the scale).  Host arrays in and out (NumPy), except where
a function only transposes.  Axis letters: S stacked axes, K inner, N columns (outputs), B = K / group.

| format | values | scales | source |
|--------|--------|--------|--------|
| GGUF Q8_0 | [N, K / 32 blocks of 34 bytes]: 32 int8 | float16 before the values | gguf 0.19 |
| GGUF Q4_0 | blocks of 18 bytes: byte j holds q[j] low, q[j + 16] high, q = value + 8 | float16 | gguf 0.19 |
| GGUF Q4_1 | blocks of 20 bytes: as Q4_0, w = d q + m | float16 d, then m | gguf 0.19 |
| Llama 4 int4 | [N, K / 2] int8, even k in the low nibble | float32 [K / 128, N] | llama4.md section 9 |
| fbgemm fp8 (HF) | gate_up [E, D, 2F], down [E, F, D] | [E, 1, 2F], [E, D, 1] | llama4.md section 9 |
| compressed-tensors fp8 | [N, K] | per channel [N, 1] | llama4.md section 9 |
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, Shaped, UInt8

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix, pack_int4

GGUF_BLOCK = 32
# Bytes of a block: a float16 scale (in Q4_1 also a least value), then the codes.
GGUF_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def from_gguf(blocks: UInt8[np.ndarray, "*S N bytes"], kind: str) -> QuantizedMatrix:
    """Return the matrix [*S, K, N] of rows of GGUF blocks; Q4_0 and Q4_1 come packed.

    Q4_0 and Q8_0 are held exactly.  Q4_1 is w = d q + m: the codes q are kept (as q - 8) and the zero
    point -m / d - 8 is rounded to float32, so that a weight differs by at most a few units of
    float32's last place of the greatest weight of its block; blocks of one value are exact.

    Args:
      blocks: the raw bytes of a tensor [*S, N, K].
      kind: "Q4_0", "Q4_1" or "Q8_0".
    Raises:
      JaxherdError: another kind, or rows that are no whole number of blocks.
    """
    if kind not in GGUF_BYTES:
        raise JaxherdError(f"from_gguf: no block format {kind!r}; " + nearest(kind, GGUF_BYTES))
    if blocks.shape[-1] % GGUF_BYTES[kind]:
        raise JaxherdError(
            f"from_gguf: rows of {blocks.shape[-1]} bytes are no {kind} blocks of {GGUF_BYTES[kind]}."
        )
    parts = rearrange(blocks, "... n (b size) -> ... n b size", size=GGUF_BYTES[kind])
    head = GGUF_BYTES[kind] - (GGUF_BLOCK if kind == "Q8_0" else GGUF_BLOCK // 2)
    numbers = np.ascontiguousarray(parts[..., :head]).view("<f2")
    codes = np.ascontiguousarray(parts[..., head:])
    scales, zeros = numbers[..., 0], None
    if kind == "Q4_1":
        scales, zeros = _zero_points(numbers[..., 0], numbers[..., 1])
    if kind == "Q8_0":
        values = codes.view(np.int8)
    else:
        values = np.concatenate([codes & 0xF, codes >> 4], axis=-1).astype(np.int8) - 8
        if kind == "Q4_1":
            values = np.where(numbers[..., :1] == 0, np.int8(-8), values)
    values = jnp.asarray(rearrange(values, "... n b g -> ... (b g) n"))
    packed = kind != "Q8_0"
    return QuantizedMatrix(
        pack_int4(values) if packed else values,
        jnp.asarray(rearrange(scales, "... n b -> ... b n")),
        None if zeros is None else jnp.asarray(rearrange(zeros, "... n b -> ... b n")),
        packed=packed,
    )


def _zero_points(scales, least):
    """Return (scales, zeros) such that scale (q - 8 - zero) is scale q + least.

    A block of one value has the scale 0: it becomes least (0 - 8 - zero) with zero = -9.
    """
    flat = scales == 0
    whole = np.where(flat, np.float32(1), scales.astype(np.float32))
    zeros = np.where(flat, np.float32(-9), -8 - least.astype(np.float32) / whole)
    return np.where(flat, least, scales), zeros.astype(np.float32)


def to_gguf(w: QuantizedMatrix) -> tuple[str, UInt8[np.ndarray, "*S N bytes"]]:
    """Return (kind, blocks): the inverse of `from_gguf`.

    Raises:
      JaxherdError: a matrix that is no GGUF block format: it must be int4 or int8, symmetric, in
        groups of 32 with float16 scales.
    """
    w.check()
    fits = w.zeros is None and w.group == GGUF_BLOCK and w.scales.dtype == jnp.float16
    if not fits or w.code not in ("int4", "int8"):
        raise JaxherdError(
            f"to_gguf: {w.code} in groups of {w.group} with {w.scales.dtype} scales is no GGUF "
            "block; quantize with group=32 and convention 'q4_0' or 'q8_0'."
        )
    values = np.asarray(w.unpack().values).astype(np.int8)
    values = rearrange(values, "... (b g) n -> ... n b g", g=GGUF_BLOCK)
    if w.code == "int4":
        kind, q = "Q4_0", (values + 8).astype(np.uint8)
        codes = q[..., :16] | (q[..., 16:] << 4)
    else:
        kind, codes = "Q8_0", np.ascontiguousarray(values).view(np.uint8)
    scales = np.asarray(rearrange(w.scales, "... b n -> ... n b 1"))
    scales = np.ascontiguousarray(scales).astype("<f2").view(np.uint8)
    return kind, rearrange(np.concatenate([scales, codes], axis=-1), "... n b s -> ... n (b s)")


def from_llama4_int4(packed: Int[Any, "*S N P"], scales: Float[Any, "*S B N"]) -> QuantizedMatrix:
    """Return the packed matrix [*S, K, N] of Llama 4's int4_mixed tensors (P = K / 2 bytes)."""
    w = QuantizedMatrix(jnp.swapaxes(jnp.asarray(packed), -1, -2), jnp.asarray(scales), packed=True)
    w.check()
    return w


def to_llama4_int4(w: QuantizedMatrix) -> tuple[Int[Any, "*S N P"], Float[Any, "*S B N"]]:
    """Return (packed, scales): the inverse of `from_llama4_int4`.

    Raises:
      JaxherdError: a matrix that is not symmetric int4 with float32 scales.
    """
    if w.code != "int4" or w.zeros is not None or w.scales.dtype != jnp.float32:
        raise JaxherdError(
            f"to_llama4_int4: {w.code} with {w.scales.dtype} scales is not Llama 4's int4; quantize "
            "with dtype='int4', group=128, convention='absmax/8'."
        )
    return jnp.swapaxes(w.pack().values, -1, -2), w.scales


def from_fbgemm_fp8(weight: Shaped[Any, "*S K N"], scale: Float[Any, "*S A C"]) -> QuantizedMatrix:
    """Return the matrix of an inner-first fp8 tensor, for HF's fused experts.

    Scales come as [*S, 1, N] (gate_up_proj_scale) or as [*S, N, 1] (down_proj_scale).
    """
    weight, scale = jnp.asarray(weight), jnp.asarray(scale)
    if scale.shape[-2:] == (weight.shape[-1], 1):
        scale = jnp.swapaxes(scale, -1, -2)
    w = QuantizedMatrix(weight, scale)
    w.check()
    return w


def to_fbgemm_fp8(
    w: QuantizedMatrix, *, down: bool
) -> tuple[Shaped[Any, "*S K N"], Float[Any, "*S A C"]]:
    """Return (weight, scale): the inverse of `from_fbgemm_fp8`; `down` gives scales [*S, N, 1]."""
    _check_channel_fp8(w, "to_fbgemm_fp8")
    return w.values, jnp.swapaxes(w.scales, -1, -2) if down else w.scales


def from_compressed_tensors_fp8(
    weight: Shaped[Any, "*S N K"], weight_scale: Float[Any, "*S N 1"]
) -> QuantizedMatrix:
    """Return the matrix of a torch-ordered fp8 weight with one scale per output channel."""
    w = QuantizedMatrix(
        jnp.swapaxes(jnp.asarray(weight), -1, -2), jnp.swapaxes(jnp.asarray(weight_scale), -1, -2)
    )
    w.check()
    return w


def to_compressed_tensors_fp8(
    w: QuantizedMatrix,
) -> tuple[Shaped[Any, "*S N K"], Float[Any, "*S N 1"]]:
    """Return (weight, weight_scale): the inverse of `from_compressed_tensors_fp8`."""
    _check_channel_fp8(w, "to_compressed_tensors_fp8")
    return jnp.swapaxes(w.values, -1, -2), jnp.swapaxes(w.scales, -1, -2)


def _check_channel_fp8(w: QuantizedMatrix, who: str) -> None:
    if w.code != "float8_e4m3fn" or w.blocks != 1 or w.zeros is not None:
        raise JaxherdError(
            f"{who}: {w.code} with {w.blocks} scales along K is not fp8 per channel; quantize with "
            "dtype='float8_e4m3fn' and no group."
        )


def from_qwix(array: Any) -> QuantizedMatrix:
    """Return the matrix of a qwix `QArray` [*S, K, N] with scales [*S, B, N]."""
    w = QuantizedMatrix(array.qvalue, array.scale, array.zero_point)
    w.check()
    return w


def to_qwix(w: QuantizedMatrix) -> Any:
    """Return a qwix `QArray`, unpacked, its zero points in the dtype of the values.

    Raises:
      JaxherdError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise JaxherdError("to_qwix needs qwix: pip install qwix.") from error
    w = w.unpack()
    zeros = None if w.zeros is None else w.zeros.astype(w.values.dtype)
    return qwix.QArray(w.values, w.scales, zeros)
