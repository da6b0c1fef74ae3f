"""The definition of paged attention: gather the pages that can be seen, then attend.

Axis letters: B sequences, T new tokens, N query heads, K key/value heads, H head size, Q pages of a
sequence, w pages gathered, S keys.
"""

import jax.numpy as jnp
from einops import rearrange

from jaxherd.kernels.attention import AttentionMask, reference
from jaxherd.kernels.paged_attention.pool import PagePool
from jaxherd.kernels.paged_attention.schedule import most_pages, page_range


def attend(q_BTNH, pool: PagePool, page_table_BQ, lengths_B, kind, size, scale: float):
    """Return [B, T, N, H]; see `api.paged_attention`."""
    new, head_dim, page = q_BTNH.shape[1], q_BTNH.shape[3], pool.page_size
    width = most_pages(page_table_BQ.shape[1], new, page, kind, size)
    first_B, count_B = page_range(lengths_B, new, page, kind, size)
    index_Bw = first_B[:, None] + jnp.arange(width)
    inside_Bw = jnp.arange(width) < count_B[:, None]
    safe_Bw = jnp.clip(index_Bw, 0, page_table_BQ.shape[1] - 1)
    pages_Bw = jnp.where(inside_Bw, jnp.take_along_axis(page_table_BQ, safe_Bw, axis=1), 0)
    positions_BS = rearrange(index_Bw[..., None] * page + jnp.arange(page), "B w p -> B (w p)")
    stored_BS = (positions_BS < lengths_B[:, None]) & jnp.repeat(inside_Bw, page, axis=1)

    def gathered(store, scales):
        x = rearrange(store[pages_Bw], "B w p (K H) -> B (w p) K H", H=head_dim)
        if scales is not None:
            x = x.astype(jnp.float32) * rearrange(scales[pages_Bw], "B w K p -> B (w p) K 1")
        # What was never written may be no number at all.
        return jnp.where(stored_BS[:, :, None, None], x, 0).astype(q_BTNH.dtype)

    queries_BT = lengths_B[:, None] - new + jnp.arange(new)
    mask = AttentionMask(queries_BT, jnp.where(stored_BS, positions_BS, -1), kind=kind, size=size)
    k_BSKH = gathered(pool.k_PpD, pool.k_scale_PKp)
    v_BSKH = gathered(pool.v_PpD, pool.v_scale_PKp)
    return reference.attend(q_BTNH, k_BSKH, v_BSKH, mask, scale)
