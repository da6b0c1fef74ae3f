"""Which tile of rows meets which matrix, in the order a kernel visits them.

A tile of rows that several groups share is visited once for each of them; an empty group has no
visit, so its matrix is never read.  The rows of the tail (of no group) form one more segment whose
visits write zeros and read nothing new.  Everything here is a handful of integers; the number of
visits is counted at run time and becomes the length of the kernel's grid.

Axis letters: G groups, S segments, V visits (an upper bound).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """Scalars that a kernel prefetches.

    Attributes:
      live_1: how many visits multiply; those after them are the tail's.
      tile_V: the tile of rows that visit v writes.
      source_V: the tile of rows it reads; for the tail the last one read, which costs no copy.
      group_V: the matrix it reads; for the tail the last one read.
      start_V, stop_V: the rows [start, stop) of the whole matrix that belong to the visit; both
        may lie outside of the tile.
      count: how many visits there are, a scalar.
    """

    live_1: jax.Array
    tile_V: jax.Array
    source_V: jax.Array
    group_V: jax.Array
    start_V: jax.Array
    stop_V: jax.Array
    count: jax.Array


def most_visits(rows: int, groups: int, tile: int) -> int:
    """Return the upper bound V: each border between segments can split one tile."""
    return -(-rows // tile) + groups


def forward_schedule(group_sizes_G: jax.Array, rows: int, tile: int) -> Schedule:
    """Return the visits of non-empty groups in order of rows, then those of the tail."""
    sizes_S, ends_S = _segments(group_sizes_G, rows)
    visits_S = jnp.where(sizes_S > 0, (ends_S - 1) // tile - (ends_S - sizes_S) // tile + 1, 0)
    schedule = _visits(sizes_S, ends_S, visits_S, tile, most_visits(rows, len(sizes_S) - 1, tile))
    live = visits_S[:-1].sum()
    last = jnp.maximum(live - 1, 0)
    tail_V = jnp.arange(schedule.tile_V.shape[0], dtype=jnp.int32) >= live
    # With nothing but a tail, the first tile and matrix stand in: some block must be named.
    some = (live > 0).astype(jnp.int32)
    return schedule._replace(
        live_1=live[None].astype(jnp.int32),
        source_V=jnp.where(tail_V, schedule.tile_V[last] * some, schedule.tile_V),
        group_V=jnp.where(tail_V, schedule.group_V[last] * some, schedule.group_V),
    )


def gradient_schedule(group_sizes_G: jax.Array, rows: int, tile: int) -> Schedule:
    """Return the visits of every group, one for an empty group (to write zeros), no tail."""
    sizes_S, ends_S = _segments(group_sizes_G, rows)
    sizes_G, ends_G = sizes_S[:-1], ends_S[:-1]
    visits_G = jnp.where(sizes_G > 0, (ends_G - 1) // tile - (ends_G - sizes_G) // tile + 1, 1)
    schedule = _visits(sizes_G, ends_G, visits_G, tile, most_visits(rows, len(sizes_G), tile))
    # An empty group that starts past the last row must still name a tile that exists.
    inside_V = jnp.minimum(schedule.tile_V, -(-rows // tile) - 1)
    return schedule._replace(tile_V=inside_V, source_V=inside_V)


def _segments(group_sizes_G, rows: int):
    """Return sizes and ends of the groups and, last, of the tail."""
    sizes_G = group_sizes_G.astype(jnp.int32)
    ends_G = jnp.cumsum(sizes_G)
    sizes_S = jnp.concatenate([sizes_G, jnp.maximum(rows - ends_G[-1:], 0)])
    return sizes_S, jnp.concatenate([ends_G, jnp.full(1, rows, jnp.int32)])


def _visits(sizes_S, ends_S, visits_S, tile: int, most: int) -> Schedule:
    last_S = jnp.cumsum(visits_S)
    number_V = jnp.arange(most, dtype=jnp.int32)
    # As many visits are past as there are segments that ended: no sort, no scatter.
    segment_V = (number_V[:, None] >= last_S[None, :]).sum(axis=1, dtype=jnp.int32)
    segment_V = jnp.minimum(segment_V, len(sizes_S) - 1)
    starts_S = ends_S - sizes_S
    first_V = (last_S - visits_S)[segment_V]
    tile_V = starts_S[segment_V] // tile + jnp.maximum(number_V - first_V, 0)
    live = last_S[-1].astype(jnp.int32)
    return Schedule(
        live[None], tile_V, tile_V, segment_V, starts_S[segment_V], ends_S[segment_V], live
    )
