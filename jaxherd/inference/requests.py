"""Requests and results of generation, and the host's side of a row that is being served."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError
from jaxherd.data.tokenizers import DecodeStream
from jaxherd.inference.sampling import Sampling
from jaxherd.inference.stop_strings import StopStrings

_STOP_SLOTS = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """One row of a batch.

    Attributes:
      tokens: the prompt.
      max_new_tokens: at most so many tokens are chosen.
      sampling: how.
      seed: of this row; equal seeds give equal tokens whatever else is in the batch.
      stop_strings: the text ends before the first of them (needs a tokenizer).
      images: tiles [N, Y, X, C] with colours in [-1, 1] (`jaxherd.data.images`) that fill the
        prompt's placeholders in order.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    images: Any = dataclasses.field(default=None, compare=False, repr=False)

    def check(self, vocabulary: int, max_length: int, tokenizer: Any) -> None:
        """Raise JaxherdError if a model cannot serve this.

        Args:
          vocabulary: tokens that it knows.
          max_length: its longest prompt and continuation together.
          tokenizer: None if it has none.
        """
        if not self.tokens:
            raise JaxherdError("a prompt is empty: give at least one token.")
        if min(self.tokens) < 0 or max(self.tokens) >= vocabulary:
            raise JaxherdError(f"a prompt has tokens outside the vocabulary of {vocabulary}.")
        if self.max_new_tokens < 1:
            raise JaxherdError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if len(self.tokens) + self.max_new_tokens > max_length:
            raise JaxherdError(
                f"a prompt of {len(self.tokens)} tokens and {self.max_new_tokens} new "
                f"ones are more than the model's {max_length}: shorten either."
            )
        if self.stop_strings and tokenizer is None:
            raise JaxherdError("stop strings need a tokenizer.")


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a request.

    Attributes:
      tokens: chosen, the one that stopped the row included.
      text: of them, without a stop string; None without a tokenizer.
      reason: "stop" (token or string), "length", "cancelled", or "content_filter" where a guard
        vetoed; then there are neither tokens nor text.
      veto: the guard's sentence.
    """

    tokens: list[int]
    text: str | None
    reason: str
    veto: str | None = None


class GuardVeto(JaxherdError):
    """A guard vetoed a prompt or an answer."""

    exit_status = 3


def withheld(sentence: str) -> Result:
    """Return the result of a prompt or answer that a guard vetoed."""
    return Result([], "", "content_filter", sentence)


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step brought for one request.

    Attributes:
      id: of the request, from `PagedEngine.add`.
      tokens: new ones.
      text: new text that is certain.
      result: once the request has ended.
      reused_tokens: of its prompt, taken over from pages of others.
    """

    id: int
    tokens: list[int]
    text: str
    result: Result | None
    reused_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Counters:
    """What the engine has done and holds.

    Attributes:
      waiting, running: requests now.
      finished, cancelled: requests so far.
      prompt_tokens: computed.
      reused_tokens: of prompts, taken over from pages of others.
      new_tokens: chosen.
      pages, pages_held, pages_cached: of each kind of layer.
    """

    waiting: int
    running: int
    finished: int
    cancelled: int
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    pages: dict[str, int]
    pages_held: dict[str, int]
    pages_cached: dict[str, int]


class Row:
    """The host's side of one row: its tokens, its text, and whether it has ended."""

    def __init__(self, request: Request, tokenizer: Any, stop_ids: tuple[int, ...]):
        self.request, self.stop_ids = request, stop_ids
        self.tokens: list[int] = []
        self.text = ""
        self.result: Result | None = None
        self._stream = None if tokenizer is None else DecodeStream(tokenizer)
        self._stops = StopStrings(request.stop_strings)

    def push(self, tokens: list[int], ended: bool) -> tuple[list[int], str]:
        """Add tokens; return those that count and the text that became certain."""
        new, shown = [], ""
        for token in tokens:
            self.tokens.append(token)
            new.append(token)
            if token in self.stop_ids:
                break
            if self._stream is not None:
                shown += self._stops.push(self._stream.push(token))
            if self._stops.found is not None:
                break
        stopped = self._stops.found is not None or self.tokens[-1] in self.stop_ids
        if ended or stopped:
            if self._stream is not None:
                shown += self._stops.push(self._stream.finish()) + self._stops.finish()
            self.text += shown
            text = None if self._stream is None else self.text
            self.result = Result(self.tokens, text, "stop" if stopped else "length")
        else:
            self.text += shown
        return new, shown

    def cancel(self) -> Result:
        """End the row where it stands; text that was still held back is dropped."""
        text = None if self._stream is None else self.text
        self.result = Result(self.tokens, text, "cancelled")
        return self.result


def stop_tokens(stop_ids: Sequence[int] | None, tokenizer: Any) -> tuple[tuple[int, ...], Any]:
    """Return the tokens that end a row, and the same as an array of fixed length.

    Args:
      stop_ids: the tokenizer's when None.
    Raises:
      JaxherdError: too many.
    """
    if stop_ids is None:
        stop_ids = tokenizer.stop_ids if tokenizer is not None else ()
    found = tuple(dict.fromkeys(int(i) for i in stop_ids or ()))
    if len(found) > _STOP_SLOTS:
        raise JaxherdError(f"at most {_STOP_SLOTS} stop tokens, got {len(found)}.")
    return found, jnp.asarray([*found, *[-2] * (_STOP_SLOTS - len(found))], jnp.int32)


def bucket(length: int, smallest: int) -> int:
    """Return the power of two, at least `smallest`, that holds `length`."""
    return max(smallest, 1 << (length - 1).bit_length())


def row_keys(key: jax.Array | None, seeds: Sequence[int]) -> jax.Array:
    """Return one key a row, which depends on `key` and the row's seed alone."""
    base = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(base.dtype, jax.dtypes.prng_key):
        base = jax.random.wrap_key_data(base)
    seeds_B = jnp.asarray([seed & 0xFFFFFFFF for seed in seeds], jnp.uint32)
    return jax.vmap(lambda seed: jax.random.fold_in(base, seed))(seeds_B)
