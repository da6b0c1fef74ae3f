"""The definition of attention in plain XLA, and a blocked form of it for long sequences.

Axis letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head size.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxherd.kernels.attention.mask import AttentionMask

# Finite, so that a row without any key gives zeros instead of NaN in values and gradients.
_MASKED = -1e30


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: AttentionMask,
    scale: float,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T + mask) v with scores and softmax in float32.

    Query head h uses key/value head h // (N / K).  A query that sees no key gives zeros.
    """
    kv_heads, groups = k_BSKH.shape[2], q_BTNH.shape[2] // k_BSKH.shape[2]
    # One batch axis and two matrix axes: the form that every backend has a fast product for.
    q_bmH = rearrange(q_BTNH * scale, "B T (K G) H -> (B K) (G T) H", K=kv_heads)
    k_bSH = rearrange(k_BSKH, "B S K H -> (B K) S H")
    v_bSH = rearrange(v_BSKH, "B S K H -> (B K) S H")
    scores_bmS = jnp.einsum("bmH,bSH->bmS", q_bmH, k_bSH, preferred_element_type=jnp.float32)
    scores = rearrange(scores_bmS, "(B K) (G T) S -> B (K G) T S", K=kv_heads, G=groups)
    scores = jnp.where(mask.dense()[:, None], scores, _MASKED)
    peak = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), _MASKED / 2))
    # Masked scores underflow to exactly zero, also in rows without any key.
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights * (1.0 / jnp.where(total > 0, total, 1.0))
    weights_bmS = rearrange(weights, "B (K G) T S -> (B K) (G T) S", K=kv_heads)
    out_bmH = jnp.einsum(
        "bmS,bSH->bmH", weights_bmS.astype(v_bSH.dtype), v_bSH, preferred_element_type=jnp.float32
    )
    out_BTNH = rearrange(out_bmH, "(B K) (G T) H -> B T (K G) H", K=kv_heads, G=groups)
    return out_BTNH.astype(q_BTNH.dtype)


def attend_local(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, scale: float):
    """Equal to `attend` for self-attention under a local rule, in time and memory O(T size).

    Queries are cut to blocks of `size`, each with the keys of its own and the block before; with
    contiguous rows a chunk is a block and needs no other.
    """
    assert mask.self_attention and mask.size is not None
    batch, length = q_BTNH.shape[:2]
    size = mask.size
    alone = mask.kind == "chunked" and mask.contiguous
    pad = -length % size
    mask = padded(mask, pad, 0 if alone else size, pad)
    widths = ((0, 0), (0 if alone else size, pad), (0, 0), (0, 0))
    q = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
    k, v = jnp.pad(k_BSKH, widths), jnp.pad(v_BSKH, widths)

    def own(x) -> Any:
        return None if x is None else x.reshape(-1, size, *x.shape[2:])

    def seen(x) -> Any:
        if x is None or alone:
            return own(x)
        blocks = x.reshape(batch, -1, size, *x.shape[2:])
        pairs = jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2)
        return pairs.reshape(-1, 2 * size, *x.shape[2:])

    blocked = dataclasses.replace(
        mask,
        q_positions_BT=own(mask.q_positions_BT),
        q_segments_BT=own(mask.q_segments_BT),
        k_positions_BS=seen(mask.k_positions_BS),
        k_segments_BS=seen(mask.k_segments_BS),
        self_attention=False,
        contiguous=False,
    )
    out = attend(own(q), seen(k), seen(v), blocked, scale)
    return out.reshape(batch, length + pad, *out.shape[2:])[:, :length]


def attend_blocked(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, scale: float, block: int = 512):
    """Equal to `attend`, one block of queries at a time; scores are recomputed in the gradient.

    Memory is O(block * S) instead of O(T * S).  In self-attention under a local rule each block
    reads only the keys that it can see, so the cost is O(T * size).
    """
    batch, length = q_BTNH.shape[:2]
    block = min(block, length)
    local = mask.is_local and mask.self_attention
    reach = _reach(mask, block) if local else 0
    pad = -length % block
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
    mask = padded(mask, pad, reach, pad if local else 0)
    if local:
        widths = ((0, 0), (reach, pad), (0, 0), (0, 0))
        k_BSKH, v_BSKH = jnp.pad(k_BSKH, widths), jnp.pad(v_BSKH, widths)

    @jax.checkpoint
    def one(start):
        q = jax.lax.dynamic_slice_in_dim(q_BTNH, start, block, axis=1)
        part = mask.queries(start, block)
        k, v = k_BSKH, v_BSKH
        if local:
            part = part.keys(start, reach + block)
            k = jax.lax.dynamic_slice_in_dim(k, start, reach + block, axis=1)
            v = jax.lax.dynamic_slice_in_dim(v, start, reach + block, axis=1)
        return attend(q, k, v, part, scale)

    out = jax.lax.map(one, jnp.arange(0, length + pad, block))
    return rearrange(out, "n B t N H -> B (n t) N H")[:, :length]


def _reach(mask: AttentionMask, block: int) -> int:
    """How many keys before its own block a block of queries can see, at most."""
    assert mask.size is not None
    if mask.kind == "chunked" and mask.contiguous and mask.size % block == 0:
        return mask.size - block
    return math.ceil((mask.size - 1) / block) * block


def padded(mask: AttentionMask, q_after: int, k_before: int, k_after: int) -> AttentionMask:
    """Return the mask with that many tokens of padding more."""

    def pad(x, before, after, value):
        if x is None:
            return None
        return jnp.pad(x, ((0, 0), (before, after)), constant_values=value)

    return dataclasses.replace(
        mask,
        q_positions_BT=pad(mask.q_positions_BT, 0, q_after, -1),
        q_segments_BT=pad(mask.q_segments_BT, 0, q_after, 0),
        k_positions_BS=pad(mask.k_positions_BS, k_before, k_after, -1),
        k_segments_BS=pad(mask.k_segments_BS, k_before, k_after, 0),
    )
