"""Attention with lazily computed masks."""

from jaxherd.kernels.attention.api import attention
from jaxherd.kernels.attention.mask import AttentionMask

__all__ = ["AttentionMask", "attention"]
