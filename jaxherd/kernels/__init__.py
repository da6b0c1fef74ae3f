"""Numerical kernels behind one call each; every one has an XLA reference that defines it."""

from jaxherd.kernels.attention import AttentionMask, attention
from jaxherd.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from jaxherd.kernels.paged_attention import PagePool, paged_attention
from jaxherd.kernels.quantized_matmul import QuantizedMatrix, quantize, quantized_matmul

__all__ = [
    "AttentionMask",
    "PagePool",
    "QuantizedMatrix",
    "attention",
    "grouped_matmul",
    "grouped_swiglu",
    "paged_attention",
    "quantize",
    "quantized_matmul",
]
