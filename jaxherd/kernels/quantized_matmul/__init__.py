"""Matrix products with quantised weights."""

from jaxherd.kernels.quantized_matmul.api import quantized_matmul
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix, quantize

__all__ = ["QuantizedMatrix", "quantize", "quantized_matmul"]
