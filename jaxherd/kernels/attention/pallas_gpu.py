"""jax's Triton attention (NVIDIA) behind our mask: causal order by index, and ids of documents.

Chunks become ids as for splash.  Key/value heads are repeated, since the kernel knows one per query
head.  It has no window and no second bound, so that sliding windows and prefixes are refused.
"""

from typing import Any

import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels.attention.mask import AttentionMask
from jaxherd.kernels.attention.splash import index_rule

_BLOCK = 64


def unsupported(q_BTNH, k_BSKH, mask: AttentionMask) -> str | None:
    """Return why the kernel cannot run for these arguments, or None if it can."""
    length = q_BTNH.shape[1]
    if not mask.self_attention or length != k_BSKH.shape[1]:
        return "queries and keys are not the same tokens"
    if mask.kind in ("sliding_window", "prefix"):
        return f"it knows no {mask.kind} rule"
    if length % _BLOCK:
        return f"the length {length} is no multiple of {_BLOCK}"
    return None


def attend(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, scale: float, *, interpret: bool = False):
    """Equal to `reference.attend` where `unsupported` returns None, but for padding's own queries.

    Raises:
      JaxherdError: the arguments are not supported; the sentence says why.
    """
    from jax.experimental.pallas.ops.gpu import attention as triton

    reason = unsupported(q_BTNH, k_BSKH, mask)
    if reason is not None:
        raise JaxherdError(f"attention: pallas_gpu cannot run because {reason}; use 'xla'.")
    batch, length, heads = q_BTNH.shape[:3]
    groups = heads // k_BSKH.shape[2]
    ids = index_rule(mask, length, length).q_ids_BT
    if ids is not None:
        ids = jnp.broadcast_to(jnp.asarray(ids), (batch, length))
    out_BTNH: Any = triton.mha(
        q_BTNH,
        jnp.repeat(k_BSKH, groups, axis=2),
        jnp.repeat(v_BSKH, groups, axis=2),
        ids,
        sm_scale=scale,
        causal=mask.kind != "bidirectional",
        block_sizes=triton.BlockSizes(
            block_q=_BLOCK, block_k=_BLOCK, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32,
            block_kv_dq=32,
        ),
        interpret=interpret,
    )  # fmt: skip
    return out_BTNH
