"""Matrix products of consecutive groups of rows, each with its own matrix."""

from jaxherd.kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu

__all__ = ["grouped_matmul", "grouped_swiglu"]
