"""Attention of a few new tokens over a paged cache."""

from jaxherd.kernels.paged_attention.api import paged_attention
from jaxherd.kernels.paged_attention.pool import PagePool

__all__ = ["PagePool", "paged_attention"]
