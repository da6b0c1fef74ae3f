"""The products that the models make of quantised weights: what tests and measurements run over.

Shapes: llama4.md section 1 (D 5120, expert width 8192) and section 9; mobilellm-pro.md section 1
(d_model 1280, d_ff 6144, vocabulary 202,048) and section 6; SmolLM2-135M (576, 1536) for GGUF.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxherd.kernels.quantized_matmul.codes import quantize
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One product.

    Attributes:
      rows, inner, columns: M, K, N.
      code, packed, group, symmetric, convention, scale_dtype: as for `quantize`.
      activations: as for `quantized_matmul`.
    """

    rows: int
    inner: int
    columns: int
    code: str
    group: int | None = None
    packed: bool = False
    symmetric: bool = True
    convention: str | None = None
    scale_dtype: str = "float32"
    activations: str | None = None

    def resized(self, rows: int, inner: int, columns: int) -> "ArgSpec":
        """Return the same form of product with other sizes."""
        return dataclasses.replace(self, rows=rows, inner=inner, columns=columns)

    def quantize(self, w_KN: jax.Array) -> QuantizedMatrix:
        """Return the code of a matrix in this form."""
        return quantize(
            w_KN, dtype=self.code, group=self.group, packed=self.packed, symmetric=self.symmetric,
            convention=self.convention, scale_dtype=jnp.dtype(self.scale_dtype),
        )  # fmt: skip

    def abstract(self, dtype=jnp.bfloat16) -> tuple[jax.ShapeDtypeStruct, QuantizedMatrix]:
        """Return (x, weights) as shapes."""
        w = jax.ShapeDtypeStruct((self.inner, self.columns), jnp.float32)
        x = jax.ShapeDtypeStruct((self.rows, self.inner), dtype)
        return x, jax.eval_shape(self.quantize, w)


_LLAMA_INT4 = {"code": "int4", "group": 128, "packed": True, "convention": "absmax/8"}
_PRO_CPU = {"code": "int4", "group": 32, "packed": True, "scale_dtype": "bfloat16"}

ARG_SPECS: Mapping[str, ArgSpec] = {
    # Llama 4 int4_mixed: the shared expert of Scout and Maverick.
    "scout_int4_up_decode_16": ArgSpec(16, 5120, 8192, **_LLAMA_INT4),
    "scout_int4_down_decode_1": ArgSpec(1, 8192, 5120, **_LLAMA_INT4),
    "scout_int4_up_prefill_2048": ArgSpec(2048, 5120, 8192, **_LLAMA_INT4),
    # Maverick-FP8: per channel weights, per token activations; and weights alone.
    "maverick_fp8_up_decode_64": ArgSpec(
        64, 5120, 8192, "float8_e4m3fn", activations="float8_e4m3fn"
    ),
    "maverick_fp8_down_decode_64": ArgSpec(64, 8192, 5120, "float8_e4m3fn"),
    # MobileLLM-Pro for CPUs: groups of 32, int8 activations; and its tied head.
    "pro_g32_up_decode_1": ArgSpec(1, 1280, 6144, **_PRO_CPU),
    "pro_g32_down_decode_1_int8": ArgSpec(1, 6144, 1280, **_PRO_CPU, activations="int8"),
    "pro_g32_head_decode_1": ArgSpec(1, 1280, 202_048, **_PRO_CPU),
    # MobileLLM-Pro for accelerators: one scale per column.
    "pro_channel_up_decode_8": ArgSpec(8, 1280, 6144, "int4", packed=True),
    "pro_channel_down_decode_64": ArgSpec(64, 6144, 1280, "int4", packed=True),
    # GGUF blocks.
    "gguf_q8_0_decode_1": ArgSpec(
        1, 576, 1536, "int8", 32, convention="q8_0", scale_dtype="float16"
    ),
    "gguf_q4_0_decode_1": ArgSpec(
        1, 576, 576, "int4", 32, packed=True, convention="q4_0", scale_dtype="float16"
    ),
    # Integers on both sides, and the forms that no checkpoint above has.
    "int8_int8_4096": ArgSpec(4096, 4096, 4096, "int8", activations="int8"),
    "int8_int8_decode_16": ArgSpec(16, 5120, 8192, "int8", activations="int8"),
    "int4_int8_decode_16": ArgSpec(16, 5120, 8192, "int4", packed=True, activations="int8"),
    "int8_asymmetric_decode_33": ArgSpec(33, 5120, 8192, "int8", symmetric=False),
    "int8_asymmetric_int8_decode_8": ArgSpec(
        8, 5120, 8192, "int8", symmetric=False, activations="int8"
    ),
    "int4_asymmetric_g64_decode_8": ArgSpec(8, 1280, 6144, "int4", 64, symmetric=False),
    "int4_unpacked_decode_8": ArgSpec(8, 5120, 8192, "int4"),
}
