"""The host's arrays of a batch with a fixed number of slots, in and out of which requests go.

Axis letters: B slots, Q pages of a sequence.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.inference.sampling import RowSampling, Sampling
from jaxherd.inference.steps import DecodeState
from jaxherd.layers.paged_cache import CacheRule, PageTables


class Slots:
    """Where each slot stands, how it samples and which pages it has.

    The host is told every token, so that it knows each slot's position without asking; arrays of
    a few numbers a slot go to the device with every call, of those slots that take part.

    Attributes:
      token_B, position_B: the last token chosen, not in its page yet, and its position.
      remaining_B: tokens that may still be chosen.
      decoding_B: whether the slot takes part in decoding.
      tables: [B, Q] page of each rule, by `PageTables`.
    """

    def __init__(
        self,
        slots: int,
        pages: int,
        rules: Sequence[CacheRule],
        implementation: str | None,
        interpret: bool,
    ):
        self.token_B = np.zeros(slots, np.int32)
        self.position_B = np.zeros(slots, np.int32)
        self.remaining_B = np.zeros(slots, np.int32)
        self.decoding_B = np.zeros(slots, bool)
        self.tables: dict[CacheRule, np.ndarray] = {
            rule: np.zeros((slots, pages), np.int32) for rule in rules
        }
        self._rules, self._options = tuple(rules), (implementation, interpret)
        self._sampling = [Sampling()] * slots
        self._keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), slots)))
        self._keys = self._keys.copy()
        self._on_device: tuple[list[int], RowSampling] | None = None

    def set_sampling(self, slot: int, sampling: Sampling, key: np.ndarray) -> None:
        """Give a slot its way of choosing tokens; `key` is the data of its key."""
        self._sampling[slot], self._keys[slot] = sampling, key
        self._on_device = None

    def state(self, rows: Sequence[int], count: int) -> DecodeState:
        """Return where these slots stand, as `steps.decode` takes it; rows from `count` on idle."""
        which = list(rows)
        return DecodeState(
            jnp.array(self.token_B[which]),
            jnp.array(self.position_B[which]),
            jnp.arange(len(which)) >= count,
            jnp.array(self.remaining_B[which]),
        )

    def sampling(self, rows: Sequence[int]) -> RowSampling:
        """Return the settings of these slots."""
        if self._on_device is None or self._on_device[0] != list(rows):
            keys = jax.random.wrap_key_data(jnp.array(self._keys[list(rows)]))
            made = RowSampling.create([self._sampling[row] for row in rows], keys)
            self._on_device = (list(rows), made)
        return self._on_device[1]

    def page_tables(self, rows: Sequence[int], width: int) -> PageTables:
        """Return the first `width` columns of these slots' tables."""
        implementation, interpret = self._options
        return PageTables(
            tuple(jnp.array(self.tables[rule][list(rows), :width]) for rule in self._rules),
            self._rules,
            implementation,
            interpret,
        )


def totals(
    rules: Sequence[CacheRule],
    *,
    slots: int,
    cache_tokens: int,
    max_length: int,
    page_size: int,
    longest_call: int,
) -> Mapping[CacheRule, int]:
    """Return how many pages each rule gets.

    Full layers get `cache_tokens`.  Layers that lose sight of pages get what all slots can hold at
    once and as much again for prompts to take over, if that is less.
    """
    full = -(-cache_tokens // page_size)
    return {
        rule: min(full, 2 * slots * rule.most_pages(max_length, longest_call, page_size))
        for rule in rules
    }
