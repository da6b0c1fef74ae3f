"""Paged attention for CPU: one sequence after the other, a few of its pages at a time.

The reference copies every sequence's pages to rows as long as the longest may be, and moves their
heads apart, before it multiplies.  Here what is copied stays in the processor's cache until it is
used, heads stay where they are (`wide`), and a sequence costs the pages that it has.

Axis letters: T new tokens, N query heads, K key/value heads, H head size, D = K H, R = T N rows, S
keys of a block, w pages of a block of p tokens, Q pages of a sequence.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxherd.kernels.attention import AttentionMask
from jaxherd.kernels.paged_attention.pool import PagePool
from jaxherd.kernels.paged_attention.schedule import most_pages, page_range
from jaxherd.kernels.paged_attention.wide import own_part, widen

_MASKED = -1e30
# Keys and values of a few hundred tokens fit in the second level of cache.
_BLOCK_TOKENS, _BLOCK_PAGES = 256, 8


def attend(q_BTNH, pool: PagePool, page_table_BQ, lengths_B, kind, size, scale: float):
    """Return [B, T, N, H]; see `api.paged_attention`."""
    new, heads, head_dim = q_BTNH.shape[1:]
    page, dtype = pool.page_size, q_BTNH.dtype
    kv_heads = pool.k_PpD.shape[2] // head_dim
    most = most_pages(page_table_BQ.shape[1], new, page, kind, size)
    width = max(1, min(_BLOCK_TOKENS // page, _BLOCK_PAGES, most))
    first_B, count_B = page_range(lengths_B, new, page, kind, size)
    q_BRD = widen((q_BTNH * scale).astype(dtype), kv_heads)

    def one(sequence):
        q_RD, table_Q, length, first, count = sequence
        queries_T = length - new + jnp.arange(new)

        def block(number, carry):
            peak_R1, total_R1, out_RD = carry
            index_w = first + number * width + jnp.arange(width)
            pages_w = table_Q[jnp.clip(index_w, 0, table_Q.shape[0] - 1)]
            positions_S = rearrange(index_w[:, None] * page + jnp.arange(page), "w p -> (w p)")
            stored_S = positions_S < length
            k_SD = _rows(pool.k_PpD, pool.k_scale_PKp, pages_w, dtype)
            v_SD = _rows(pool.v_PpD, pool.v_scale_PKp, pages_w, dtype)
            # What was never written may be no number at all, which a weight of zero keeps.
            v_SD = jnp.where(stored_S[:, None], v_SD, 0)
            positions_1S = jnp.where(stored_S, positions_S, -1)[None]
            seen_TS = AttentionMask(queries_T[None], positions_1S, kind=kind, size=size).dense()[0]
            seen_RS = jnp.repeat(seen_TS, heads, axis=0)
            scores = jnp.einsum("RD,SD->RS", q_RD, k_SD, preferred_element_type=jnp.float32)
            scores = jnp.where(seen_RS, scores, _MASKED)
            now_R1 = jnp.maximum(peak_R1, scores.max(axis=1, keepdims=True))
            weights = jnp.exp(scores - jnp.maximum(now_R1, _MASKED / 2))
            shrink_R1 = jnp.exp(peak_R1 - now_R1)
            added = jnp.einsum(
                "RS,SD->RD", weights.astype(dtype), v_SD, preferred_element_type=jnp.float32
            )
            total_R1 = shrink_R1 * total_R1 + weights.sum(axis=1, keepdims=True)
            return now_R1, total_R1, shrink_R1 * out_RD + added

        rows = q_RD.shape[0]
        start = (
            jnp.full((rows, 1), _MASKED, jnp.float32),
            jnp.zeros((rows, 1), jnp.float32),
            jnp.zeros(q_RD.shape, jnp.float32),
        )
        _, total_R1, out_RD = jax.lax.fori_loop(0, -(-count // width), block, start)
        return (out_RD * (1.0 / jnp.where(total_R1 > 0, total_R1, 1.0))).astype(dtype)

    out_BRD = jax.lax.map(one, (q_BRD, page_table_BQ, lengths_B, first_B, count_B))
    return own_part(out_BRD, new, kv_heads)


def _rows(store_PpD, scale_PKp, pages_w, dtype):
    """Return [S, D]: a few pages one after the other; on CPU slices are faster than a gather."""
    found = []
    for page in pages_w:
        x_pD = jax.lax.dynamic_index_in_dim(store_PpD, page, 0, keepdims=False)
        if scale_PKp is not None:
            scale_Kp = jax.lax.dynamic_index_in_dim(scale_PKp, page, 0, keepdims=False)
            heads = rearrange(x_pD.astype(jnp.float32), "p (K H) -> p K H", K=scale_Kp.shape[0])
            x_pD = rearrange(heads * scale_Kp.T[..., None], "p K H -> p (K H)")
        found.append(x_pD.astype(dtype))
    return jnp.concatenate(found)
