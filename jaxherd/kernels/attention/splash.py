"""jax's splash attention (TPU) behind our mask.

Splash decides by array index which blocks exist and inside a block compares segment ids.  Every
rule over positions becomes one over indices once the segment ids are refined:

- causal: the same, since positions grow with the index inside a segment;
- sliding window: a local mask by index, same segments;
- chunked: segment ids that also count the chunk, under a local mask of the chunk's length, so
  that far blocks are still skipped; rows that are one whole document use a static chunk mask.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxherd.core import sharding
from jaxherd.core.errors import JaxherdError
from jaxherd.kernels.attention.mask import AttentionMask, allowed_pairs

_LANES = 128


def unsupported(q_BTNH, k_BSKH, mask: AttentionMask) -> str | None:
    """Return why splash attention cannot run for these arguments, or None if it can."""
    length = q_BTNH.shape[1]
    if not mask.self_attention or length != k_BSKH.shape[1]:
        return "queries and keys are not the same tokens"
    if length % _LANES:
        return f"the length {length} is no multiple of {_LANES}"
    if mask.kind == "bidirectional" and mask.q_segments_BT is None and not mask.contiguous:
        return "bidirectional attention with padding needs segment ids"
    partitioner = sharding.active()
    if partitioner is not None and partitioner.mesh_axes("length"):
        return "the length is sharded"
    return None


def attend(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, scale: float, *, interpret: bool = False):
    """Equal to `reference.attend` where `unsupported` returns None.

    Raises:
      JaxherdError: the arguments are not supported; the sentence says why.
    """
    reason = unsupported(q_BTNH, k_BSKH, mask)
    if reason is not None:
        raise JaxherdError(f"attention: splash cannot run because {reason}; use 'xla'.")
    segments_BT = _segments(mask)
    local = functools.partial(_attend_local, mask=mask, interpret=interpret)
    partitioner = sharding.active()
    if partitioner is None or partitioner.mesh.size == 1:
        return _without_padding(local(q_BTNH * scale, k_BSKH, v_BSKH, segments_BT), mask)
    heads = partitioner.spec(("batch", None, "act_heads", None))
    kv_heads = partitioner.spec(("batch", None, "act_kv_heads", None))
    rows = partitioner.spec(("batch", None))
    out_BTNH = jax.shard_map(
        local,
        mesh=partitioner.mesh,
        in_specs=(heads, kv_heads, kv_heads, rows if segments_BT is not None else None),
        out_specs=heads,
        check_vma=False,
    )(q_BTNH * scale, k_BSKH, v_BSKH, segments_BT)
    return _without_padding(out_BTNH, mask)


def _without_padding(out_BTNH, mask: AttentionMask):
    """Padding attends to padding in splash; the definition gives zeros."""
    if mask.contiguous:
        return out_BTNH
    return jnp.where((mask.q_positions_BT >= 0)[:, :, None, None], out_BTNH, 0)


def _segments(mask: AttentionMask):
    if mask.contiguous:
        return None
    segments = mask.q_segments_BT
    if segments is None:
        segments = jnp.zeros_like(mask.q_positions_BT)
    if mask.kind == "chunked" and mask.size:
        chunks = mask.q_positions_BT // mask.size
        # Chunks of one document are consecutive, so (segment, chunk) pairs need only differ from
        # their neighbours within reach of the local mask.
        segments = segments * (jnp.max(chunks) + 2) + chunks
    return jnp.where(mask.q_positions_BT >= 0, segments, -1)


def _block(length: int, most: int) -> int:
    block = most
    while length % block:
        block //= 2
    return block


def _attend_local(q_BTNH, k_BSKH, v_BSKH, segments_BT, *, mask: AttentionMask, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q_BTNH.shape[1], q_BTNH.shape[2]
    shape = (length, length)
    if mask.kind == "causal":
        rule = masks.CausalMask(shape)
    elif mask.kind == "bidirectional":
        rule = masks.FullMask(shape)
    elif mask.size is None or mask.size >= length:
        rule = masks.CausalMask(shape)
    elif mask.kind == "chunked" and mask.contiguous:
        rule = masks.ChunkedCausalMask(shape, mask.size)
    else:
        rule = masks.LocalMask(shape, (mask.size - 1, 0), offset=0)
    block = _block(length, 1024)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([rule] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=_block(length, 512),
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=_block(length, 512),
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention_residuals",
        interpret=interpret,
    )
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    q, k, v = (rearrange(x, "B T N H -> B N T H") for x in (q_BTNH, k_BSKH, v_BSKH))
    forward = (
        4.0
        * allowed_pairs(mask.kind, mask.size, length)
        * q_BTNH.shape[0]
        * heads
        * q_BTNH.shape[3]
    )
    # jax's kernels carry no cost estimate: the scope's name tells `planning/costs.py` what one
    # pass needs, two matmuls forward and five backward.
    with jax.named_scope(f"kernel_flops_forward_{forward:.6e}_backward_{2.5 * forward:.6e}"):
        out: Any = jax.vmap(kernel)(q, k, v, segments)
    return rearrange(out, "B N T H -> B T N H").astype(q_BTNH.dtype)
