"""Which blocks of queries and keys must meet: the work of a blocked attention, counted exactly.

A block pair is needed when the rule lets any of its queries see any of its keys.  Under every rule
the keys of a run of queries form one run of array indices, so a block of queries needs consecutive
blocks of keys and no pair is ever looked at by itself: the count costs O(blocks), not O(T^2).

Axis letters: T queries, S keys, q blocks of queries, s blocks of keys, w visits of one block.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxherd.kernels.attention.mask import MaskKind


def needed_blocks(
    kind: MaskKind,
    size: int | None,
    length: int,
    block_q: int,
    block_kv: int,
    *,
    keys: int | None = None,
    offset: int = 0,
    prefix: int = 0,
) -> np.ndarray:
    """Return [q, s] bool of one document: queries at offset + 0..length-1, keys at 0..keys-1.

    Args:
      kind, size, prefix: the rule.
      length, keys: numbers of queries and keys; keys = offset + length by default.
      block_q, block_kv: tokens of a block; the last one may be part filled.
      offset: position of the first query (earlier ones are in a cache).
    """
    keys = offset + length if keys is None else keys
    first = offset + np.arange(0, length, block_q)
    last = np.minimum(first + block_q, offset + length) - 1
    low, high = np.zeros_like(first), last
    if kind == "bidirectional":
        high = np.full_like(last, keys - 1)
    elif kind == "prefix":
        high = np.maximum(last, prefix - 1)
    elif kind == "chunked" and size:
        low = first // size * size
    elif kind == "sliding_window" and size:
        low = np.maximum(first - size + 1, 0)
    starts = np.arange(0, keys, block_kv)
    return (starts <= high[:, None]) & (starts + block_kv > low[:, None])


def most_visits(block_q: int, block_kv: int, reach: int) -> int:
    """Return the most key blocks that a block of queries can need when none sees over `reach` keys.

    Its queries see at most block_q + reach - 1 consecutive keys, anywhere on the grid of blocks.
    """
    return (block_q + reach - 3) // block_kv + 2


def needed_by_tokens(
    top_T: Any,
    reach: int | None,
    q_ids_T: Any,
    k_ids_S: Any,
    block_q: int,
    block_kv: int,
    keys: int,
) -> Any:
    """Return [q, s] bool from each token's data, traced or not.

    Exact when ids never decrease along the row (documents one after another) and no padding is
    inside; with ids in any other order it may name a block too many, never one too few.

    Args:
      top_T: index of the last key that each query may see; None for no bound.
      reach: how many keys up to that one it may see; None for all.
      q_ids_T, k_ids_S: document of each token, negative for padding, or None.  A query sees keys
        of its own id alone.
      block_q, block_kv, keys: divide T and S = `keys`.
    """
    xp = np if all(x is None or isinstance(x, np.ndarray) for x in (top_T, q_ids_T)) else jnp
    starts_s = np.arange(0, keys, block_kv)
    rows = (top_T if top_T is not None else q_ids_T).shape[0] // block_q
    needed = xp.ones((rows, len(starts_s)), bool)
    real = None if q_ids_T is None else (q_ids_T >= 0).reshape(rows, block_q)
    if top_T is not None:
        tops = top_T.reshape(rows, block_q)
        high = tops if real is None else xp.where(real, tops, -1)
        needed &= starts_s <= high.max(axis=1)[:, None]
        if reach is not None:
            low = tops if real is None else xp.where(real, tops, 2**30)
            needed &= starts_s + block_kv > (low.min(axis=1) - reach + 1)[:, None]
    if q_ids_T is not None:
        # Blocks meet when their runs of ids overlap.
        q_low, q_high = _runs(q_ids_T, block_q, xp)
        k_low, k_high = _runs(k_ids_S, block_kv, xp)
        needed &= (q_low[:, None] <= k_high) & (k_low <= q_high[:, None])
    return needed


def _runs(ids, block, xp):
    ids = ids.reshape(-1, block)
    return xp.where(ids < 0, 2**30, ids).min(axis=1), ids.max(axis=1)


def visits(needed_qs: Any, width: int) -> tuple[Any, Any]:
    """Return ([q, w] the key blocks to visit, in order, [q, w] whether a visit does work).

    After its last block a row names the first one of the next row, so that it is fetched early.
    A row that needs nothing visits nothing.
    """
    xp = np if isinstance(needed_qs, np.ndarray) else jnp
    order = xp.argsort(~needed_qs, axis=1, stable=True)
    count = needed_qs.sum(axis=1)
    following = xp.concatenate([order[1:, :1], order[-1:, :1]])
    step = np.arange(width)
    works = step < count[:, None]
    return xp.where(works, order[:, :width], following), works
