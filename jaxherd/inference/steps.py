"""The compiled programs of generation: prefill a piece, start, and decode several steps.

All are pure functions of (module, state) with fixed shapes: one compilation for each bucket of
prompt pieces, one for decoding.  The cache is donated, so it is updated in place; it holds rows of
slots (`Decoder.init_cache`) or pages (`Decoder.init_pages`, with page tables).

Axis letters: B rows, T tokens of a piece, D width, S stop tokens, K steps of one call.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxherd.inference.sampling import RowSampling, sample
from jaxherd.layers.paged_cache import PageTables

# How often each program was traced (that is, compiled), by name; for tests and reports.
traces: dict[str, int] = {"prefill": 0, "start": 0, "decode": 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where each row stands.

    Attributes:
      token_B: the last token chosen, not in the cache yet.
      position_B: its position.
      done_B: the row has ended.
      remaining_B: tokens that may still be chosen.
    """

    token_B: Int[Array, "B"]
    position_B: Int[Array, "B"]
    done_B: Bool[Array, "B"]
    remaining_B: Int[Array, "B"]


@functools.partial(jax.jit, static_argnames="cache_is_empty", donate_argnames="cache")
def prefill(
    module: Any,
    cache: Any,
    last_BD: Float[Array, "B D"],
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    page_tables: PageTables | None = None,
    features: Any = None,
    *,
    cache_is_empty: bool,
) -> tuple[Any, Float[Array, "B D"]]:
    """Run a piece of the prompts; returns the cache and the hidden state of each last token.

    Args:
      last_BD: hidden states so far; a row's entry changes when its last token is in this piece.
      tokens_BT, positions_BT: the piece; position -1 is padding.
      lengths_B: of the whole prompts.
      page_tables: where the rows' pages are, if the cache is of pages.
      features: of images, in place of some tokens' embeddings; for models that read images.
    """
    traces["prefill"] += 1
    output = module.forward(
        tokens_BT,
        positions=positions_BT,
        cache=cache,
        cache_is_empty=cache_is_empty,
        page_tables=page_tables,
        **({} if features is None else {"features": features}),
    )
    is_last_BT = positions_BT == lengths_B[:, None] - 1
    here_BD = jnp.einsum(
        "BT,BTD->BD", is_last_BT.astype(output.hidden_BTD.dtype), output.hidden_BTD
    )
    ends_B1 = is_last_BT.any(axis=1, keepdims=True)
    return output.cache, jnp.where(ends_B1, here_BD.astype(last_BD.dtype), last_BD)


@jax.jit
def start(
    module: Any,
    last_BD: Float[Array, "B D"],
    lengths_B: Int[Array, "B"],
    remaining_B: Int[Array, "B"],
    stop_S: Int[Array, "S"],
    rows: RowSampling,
) -> DecodeState:
    """Choose the first token of every row."""
    traces["start"] += 1
    token_B = sample(module.unembed(last_BD), rows, lengths_B)
    return _advance(token_B, lengths_B, jnp.zeros_like(lengths_B, bool), remaining_B, stop_S)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames=("cache", "state"))
def decode(
    module: Any,
    cache: Any,
    state: DecodeState,
    stop_S: Int[Array, "S"],
    rows: RowSampling,
    page_tables: PageTables | None = None,
    fewest: Any = 1,
    most: Any = 2**30,
    *,
    steps: int,
) -> tuple[Any, DecodeState, Int[Array, "B K"]]:
    """Choose up to `steps` further tokens a row without the host; -1 where a row had ended.

    Returns sooner when fewer than `fewest` rows are left, or after `most` steps.
    """
    traces["decode"] += 1

    def more(carry):
        step, _, state, _ = carry
        return (step < jnp.minimum(steps, most)) & ((~state.done_B).sum() >= fewest)

    def body(carry):
        step, cache, state, chosen_BK = carry
        # A row that has ended is padding: it writes nothing and sees nothing.
        positions_B1 = jnp.where(state.done_B, -1, state.position_B)[:, None]
        output = module.forward(
            state.token_B[:, None], positions=positions_B1, cache=cache, page_tables=page_tables
        )
        logits_BV = module.unembed(output.hidden_BTD[:, 0])
        token_B = sample(logits_BV, rows, state.position_B + 1)
        token_B = jnp.where(state.done_B, -1, token_B)
        chosen_BK = jax.lax.dynamic_update_slice_in_dim(chosen_BK, token_B[:, None], step, axis=1)
        new = _advance(token_B, state.position_B + 1, state.done_B, state.remaining_B, stop_S)
        return step + 1, output.cache, new, chosen_BK

    chosen_BK = jnp.full((state.token_B.shape[0], steps), -1, jnp.int32)
    carry = (jnp.int32(0), cache, state, chosen_BK)
    _, cache, state, chosen_BK = jax.lax.while_loop(more, body, carry)
    return cache, state, chosen_BK


def _advance(token_B, position_B, done_B, remaining_B, stop_S) -> DecodeState:
    remaining_B = remaining_B - ~done_B
    stops_B = (token_B[:, None] == stop_S).any(axis=1)
    return DecodeState(
        jnp.maximum(token_B, 0), position_B, done_B | stops_B | (remaining_B <= 0), remaining_B
    )
