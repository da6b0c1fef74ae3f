"""Keys and values of attention layers in pages that sequences share out among each other.

A `LayerCache` reserves a row of slots for every sequence; here a sequence holds pages of a pool, as
many as it has tokens in sight.  Layers under the same rule keep the same positions in sight, so
they share one page table, and a page number stands for a page of each of them.

The pool of stacked layers is one array, the pages of layer l after those of layer l - 1.  It is
carried through the scan over the layers and never cut: a layer's slice of a stack would be copied
out and in again at every step.

Axis letters: B sequences, T new tokens, Q pages of a sequence, N query heads, K key/value heads, H
head size, S keys.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.kernels.attention import AttentionMask
from jaxherd.kernels.paged_attention import PagePool, paged_attention
from jaxherd.kernels.paged_attention.schedule import first_position, most_pages


class CacheRule(NamedTuple):
    """What layers keep in sight: the kind and size of their attention."""

    kind: Literal["causal", "chunked", "sliding_window"]
    size: int | None = None

    def first_page(self, position: int, page_size: int) -> int:
        """Return the first page that a query at `position` or later reads."""
        return first_position(position, self.kind, self.size) // page_size

    def most_pages(self, length: int, new_tokens: int, page_size: int) -> int:
        """Return the most pages that a sequence holds at once.

        Args:
          length: tokens of the whole sequence.
          new_tokens: written between two moments at which pages out of sight are given back.
        """
        return most_pages(-(-length // page_size), new_tokens, page_size, self.kind, self.size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTables:
    """Where the pages of each sequence are: one table for each rule.

    Attributes:
      tables: entry [b, i] is the page of positions [i p, (i + 1) p) of sequence b; entries out of
        a rule's sight may be anything.
      rules: of the tables.
      implementation, interpret: of `paged_attention`.
    """

    tables: tuple[Int[Array, "B Q"], ...]
    rules: tuple[CacheRule, ...] = dataclasses.field(metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})
    interpret: bool = dataclasses.field(default=False, metadata={"static": True})

    def of(self, rule: CacheRule) -> Int[Array, "B Q"]:
        """Return the table of one rule."""
        return self.tables[self.rules.index(rule)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """One layer's part of the pool of its stack.

    Attributes:
      pool: of all layers of the stack.
      layer: this layer's number in the stack.
      layers: how many there are.
    """

    pool: PagePool
    layer: Int[Array, ""]
    layers: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    def empty(
        layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: Any
    ) -> PagePool:
        """Return the pool of a stack of layers with `pages` pages each."""
        return PagePool.empty(layers * pages, page_size, kv_heads, head_dim, dtype)

    def write(
        self,
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        positions_BT: Int[Array, "B T"],
        page_table_BQ: Int[Array, "B Q"],
    ) -> "PagedCache":
        """Return the cache with the new tokens in their pages; negative positions are skipped."""
        pool = self.pool.write(k_BTKH, v_BTKH, self._own(page_table_BQ), positions_BT)
        return dataclasses.replace(self, pool=pool)

    def rows(
        self,
        positions_BT: Int[Array, "B T"],
        page_table_BQ: Int[Array, "B Q"],
        rule: CacheRule,
        head_dim: int,
        dtype: Any,
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"], AttentionMask]:
        """Return (keys, values, mask) of all that a piece of a prompt sees, itself included.

        The pages are copied to rows, for causal layers as many as the table is wide, for local ones
        as many as T tokens can reach: a piece of T tokens behind L others reads, writes and reads
        again L keys and values where attention would read them once, little beside the T L products
        while T is in the hundreds.  Pages lie in order of position, so that the attention kernel
        takes them, from the first one in sight on.
        """
        page = self.pool.page_size
        earliest_B = jnp.where(positions_BT >= 0, positions_BT, 2**30).min(axis=1)
        earliest_B = jnp.where(earliest_B < 2**30, earliest_B, 0)
        k_BSKH, v_BSKH, seen_BS = self.pool.gather(
            self._own(page_table_BQ),
            first_position(earliest_B, rule.kind, rule.size) // page,
            positions_BT.max(axis=1) + 1,
            width=rule.most_pages(page_table_BQ.shape[1] * page, positions_BT.shape[1], page),
            head_dim=head_dim,
            dtype=dtype,
        )
        mask = AttentionMask(
            positions_BT,
            seen_BS,
            kind=rule.kind,
            size=rule.size,
            keys_by_position=True,
        )
        return k_BSKH, v_BSKH, mask

    def attend(
        self,
        q_B1NH: Float[Array, "B 1 N H"],
        positions_B1: Int[Array, "B 1"],
        tables: PageTables,
        rule: CacheRule,
        *,
        scale: float | None,
        temperature_B1: Float[Array, "B 1"] | None,
    ) -> Float[Array, "B 1 N H"]:
        """Attend from the newest token of each sequence; a row at a negative position is idle."""
        return paged_attention(
            q_B1NH,
            self.pool,
            self._own(tables.of(rule)),
            positions_B1[:, 0] + 1,
            kind=rule.kind,
            size=rule.size,
            scale=scale,
            temperature_BT=temperature_B1,
            implementation=tables.implementation,
            interpret=tables.interpret,
        )

    def _own(self, page_table_BQ):
        return page_table_BQ + self.layer * (self.pool.k_PpD.shape[0] // self.layers)
