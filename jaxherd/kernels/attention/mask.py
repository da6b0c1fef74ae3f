"""Which keys a query sees, as a rule over positions and segments rather than as an array.

Axis letters: B batch, T queries, S keys.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

MaskKind = Literal["bidirectional", "causal", "chunked", "prefix", "sliding_window"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A mask over positions that kernels evaluate block by block.

    A query at position p of segment s sees a key at position r of segment s' when s = s', r >= 0,
    p >= 0 and

    - bidirectional: always;
    - causal: r <= p;
    - chunked: r <= p and p // size = r // size (block-diagonal, Llama 4);
    - sliding_window: p - size < r <= p (`size` keys with the query's own);
    - prefix: r <= p or r < prefix_length (a prompt that sees itself whole, text after it).

    Attributes:
      q_positions_BT, k_positions_BS: positions inside the document; a negative one marks padding.
      q_segments_BT, k_segments_BS: document of each token; None means one document a row.
      prefix_length_B: of a prefix rule, in positions; each row has its own.
      kind, size: the rule; `size` is in positions.
      self_attention: queries and keys are the same tokens in the same order, positions never
        decrease by array index inside a segment, so a local rule needs only neighbouring blocks.
      contiguous: in addition every row is positions 0..T-1 of one segment, so that the rule holds
        for array indices and whole blocks can be skipped when compiling.
      keys_by_position: key s holds position o + s of the row's one document, o being a number of
        the row's own, or is empty (-1): a full layer's cache, or the pages that a piece of a prompt
        sees.  Every position that a query sees is there, and under a local rule the queries are
        consecutive tokens.
      finite_padding: padding holds numbers, as the tokens of a batch do, and nobody reads what its
        queries give: neither is set to zero, which would cost passes over all arrays.
    """

    q_positions_BT: Int[Array, "B T"]
    k_positions_BS: Int[Array, "B S"]
    q_segments_BT: Int[Array, "B T"] | None = None
    k_segments_BS: Int[Array, "B S"] | None = None
    prefix_length_B: Int[Array, "B"] | None = None
    kind: MaskKind = dataclasses.field(default="causal", metadata={"static": True})
    size: int | None = dataclasses.field(default=None, metadata={"static": True})
    self_attention: bool = dataclasses.field(default=False, metadata={"static": True})
    contiguous: bool = dataclasses.field(default=False, metadata={"static": True})
    keys_by_position: bool = dataclasses.field(default=False, metadata={"static": True})
    finite_padding: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def is_local(self) -> bool:
        """Whether a query sees at most `size` keys."""
        return self.kind in ("chunked", "sliding_window")

    def dense(self) -> Bool[Array, "B T S"]:
        """Return the mask as an array."""
        p, r = self.q_positions_BT[:, :, None], self.k_positions_BS[:, None, :]
        seen = (p >= 0) & (r >= 0)
        if self.kind == "prefix" and self.prefix_length_B is not None:
            seen &= (r <= p) | (r < self.prefix_length_B[:, None, None])
        elif self.kind != "bidirectional":
            seen &= r <= p
        if self.kind == "chunked" and self.size:
            seen &= p // self.size == r // self.size
        elif self.kind == "sliding_window" and self.size:
            seen &= r > p - self.size
        if self.q_segments_BT is not None and self.k_segments_BS is not None:
            seen &= self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
        return seen

    def without_padding(self, q_BTNH, k_BSKH, v_BSKH):
        """Return them with zeros at negative positions, which may hold anything, also no number.

        A weight of zero would not do: zero times what is no number is none, and scores of padding
        with itself may overflow in the gradient.
        """
        if self.contiguous or self.finite_padding:
            return q_BTNH, k_BSKH, v_BSKH

        def kept(x, positions):
            return jnp.where((positions >= 0)[:, :, None, None], x, 0)

        k_positions = self.k_positions_BS
        return (
            kept(q_BTNH, self.q_positions_BT),
            kept(k_BSKH, k_positions),
            kept(v_BSKH, k_positions),
        )

    def keys(self, start, length: int) -> "AttentionMask":
        """Return the mask of `length` keys from index `start` (may be traced)."""

        def cut(x):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)

        return dataclasses.replace(
            self,
            k_positions_BS=cut(self.k_positions_BS),
            k_segments_BS=cut(self.k_segments_BS),
            self_attention=False,
            contiguous=False,
            keys_by_position=False,
            finite_padding=False,
        )

    def queries(self, start, length: int) -> "AttentionMask":
        """Return the mask of `length` queries from index `start` (may be traced)."""

        def cut(x):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)

        return dataclasses.replace(
            self,
            q_positions_BT=cut(self.q_positions_BT),
            q_segments_BT=cut(self.q_segments_BT),
            self_attention=False,
            contiguous=False,
        )


def allowed_pairs(kind: MaskKind, size: int | None, length: int, prefix: int = 0) -> int:
    """Return how many (query, key) pairs the rule allows in one document of `length` tokens."""
    if kind == "bidirectional":
        return length * length
    if kind == "prefix":
        prefix = min(prefix, length)
        return length * (length + 1) // 2 + prefix * (prefix - 1) // 2
    if kind == "causal" or size is None or size >= length:
        return length * (length + 1) // 2
    if kind == "chunked":
        whole, rest = divmod(length, size)
        return whole * size * (size + 1) // 2 + rest * (rest + 1) // 2
    # A window: a triangle while it fills, then `size` keys a query.
    return size * (size + 1) // 2 + (length - size) * size
