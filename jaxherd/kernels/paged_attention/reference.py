"""The definition of paged attention: gather the pages that can be seen, then attend.

Axis letters: B sequences, T new tokens, N query heads, K key/value heads, H head size, Q pages of a
sequence, S keys.
"""

import jax.numpy as jnp

from jaxherd.kernels.attention import AttentionMask, reference
from jaxherd.kernels.paged_attention.pool import PagePool
from jaxherd.kernels.paged_attention.schedule import most_pages, page_range


def attend(q_BTNH, pool: PagePool, page_table_BQ, lengths_B, kind, size, scale: float):
    """Return [B, T, N, H]; see `api.paged_attention`."""
    new, page = q_BTNH.shape[1], pool.page_size
    first_B, _ = page_range(lengths_B, new, page, kind, size)
    k_BSKH, v_BSKH, positions_BS = pool.gather(
        page_table_BQ,
        first_B,
        lengths_B,
        width=most_pages(page_table_BQ.shape[1], new, page, kind, size),
        head_dim=q_BTNH.shape[3],
        dtype=q_BTNH.dtype,
    )
    queries_BT = lengths_B[:, None] - new + jnp.arange(new)
    mask = AttentionMask(queries_BT, positions_BS, kind=kind, size=size)
    return reference.attend(q_BTNH, k_BSKH, v_BSKH, mask, scale)
