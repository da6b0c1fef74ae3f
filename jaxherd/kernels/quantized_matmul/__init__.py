"""Matrix products with quantised weights."""

from jaxherd.kernels.quantized_matmul.api import quantized_matmul
from jaxherd.kernels.quantized_matmul.codes import quantize, quantize_rows
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix

__all__ = ["QuantizedMatrix", "quantize", "quantize_rows", "quantized_matmul"]
