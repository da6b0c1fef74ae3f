"""Which pages each sequence needs, and the list of the kernel's steps over them.

Axis letters: B sequences, Q pages of a sequence, S steps, n pages of a step.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

PagedRule = Literal["causal", "chunked", "sliding_window"]


class Schedule(NamedTuple):
    """The steps in order; a sequence's steps follow each other, and each has at least one.

    Attributes:
      total_1: how many steps there are; later entries mean nothing.
      row_S: sequence of the step.
      first_S: its first page, counted within the sequence.
      pages_Sn: pages of the pool to hold during the step.  Where a step needs fewer than n, an
        entry repeats the one before it, so that nothing is read for it.
    """

    total_1: jax.Array
    row_S: jax.Array
    first_S: jax.Array
    pages_Sn: jax.Array


def first_position(positions, kind: PagedRule, size: int | None):
    """Return the first position that a query at `positions` sees; of an int an int."""
    if kind == "chunked" and size:
        return positions // size * size
    if kind == "sliding_window" and size:
        return (positions - size + 1) * (positions >= size)
    return positions * 0


def page_range(lengths_B, new_tokens: int, page_size: int, kind: PagedRule, size: int | None):
    """Return (first page [B], number of pages [B]) that the new tokens of each sequence see."""
    earliest_B = jnp.maximum(lengths_B - new_tokens, 0)
    first_B = first_position(earliest_B, kind, size) // page_size
    last_B = -(-lengths_B // page_size)
    return first_B, jnp.where(lengths_B > 0, last_B - first_B, 0)


def most_pages(pages: int, new_tokens: int, page_size: int, kind: PagedRule, size: int | None):
    """Return the most pages that one sequence can need, of `pages` in its table."""
    if kind == "causal" or size is None:
        return pages
    reach = size + new_tokens - 1
    if kind == "chunked" and new_tokens == 1 and size % page_size == 0:
        return min(pages, size // page_size)
    return min(pages, (reach - 2) // page_size + 2)


def schedule(
    page_table_BQ, lengths_B, new_tokens: int, page_size: int, kind: PagedRule, size, n: int
) -> Schedule:
    """Return the steps, of n pages each."""
    batch, pages = page_table_BQ.shape
    each = -(-most_pages(pages, new_tokens, page_size, kind, size) // n)
    first_B, count_B = page_range(lengths_B, new_tokens, page_size, kind, size)
    steps_B = jnp.maximum(-(-count_B // n), 1)
    ends_B = jnp.cumsum(steps_B)
    step_S = jnp.arange(batch * each, dtype=jnp.int32)
    row_S = jnp.minimum(jnp.searchsorted(ends_B, step_S, side="right"), batch - 1)
    row_S = row_S.astype(jnp.int32)
    first_S = first_B[row_S] + (step_S - (ends_B - steps_B)[row_S]) * n
    page_Sn = first_S[:, None] + jnp.arange(n)
    needed_Sn = page_Sn < (first_B + count_B)[row_S][:, None]
    found_Sn = page_table_BQ[row_S[:, None], jnp.clip(page_Sn, 0, pages - 1)]
    # Of each column the latest entry that is needed.
    latest_Sn = jax.lax.cummax(jnp.where(needed_Sn, step_S[:, None], 0), axis=0)
    found_Sn = jnp.where(needed_Sn, found_Sn, 0)
    pages_Sn = jnp.take_along_axis(found_Sn, latest_Sn, axis=0)
    return Schedule(ends_B[-1:].astype(jnp.int32), row_S, first_S.astype(jnp.int32), pages_Sn)
