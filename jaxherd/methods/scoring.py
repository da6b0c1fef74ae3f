"""How likely a model finds given texts: log-probabilities of continuations and of whole documents.

What an evaluation asks for are spans: tokens of which the last few are scored, given those before.  Spans
are sorted by length and scored in batches of fixed shapes (rows times a power of two), so that few programs
are compiled; results come in the order of the asking.  A document longer than the model's sequence is cut
into windows that each see as much as fits; every token is scored once.

Axis letters: B rows, T tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import split
from jaxherd.core.reports import Report
from jaxherd.inference.requests import bucket
from jaxherd.methods.token_scores import forward_batch
from jaxherd.training.losses import token_nll
from jaxherd.training.positions import CHUNK_BYTES, over_positions

_SMALLEST = 32


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens of which the last `scored` are scored, each given all before it.

    The first token is never scored: nothing is before it.
    """

    tokens: tuple[int, ...]
    scored: int

    def __post_init__(self):
        if not 0 <= self.scored < len(self.tokens):
            raise JaxherdError(
                f"a span of {len(self.tokens)} tokens cannot have {self.scored} scored: one at least "
                "comes before them."
            )


@dataclasses.dataclass(frozen=True)
class SpanScore:
    """What a model makes of a span.

    Attributes:
      log_prob: sum over the scored tokens, in nats.
      greedy: whether each of them is the most probable one in its place.
    """

    log_prob: float
    greedy: bool


@jax.jit
def _score(
    model: Any, tokens_BT: jax.Array, targets_BT: jax.Array
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return log p of every target, and whether it is the most probable token."""
    hidden_BTD = forward_batch(model, {"tokens": tokens_BT}).hidden_BTD
    score, head = model.head()
    definition, arrays, _ = split(head)

    def function(arrays, hidden_BtD, targets_Bt):
        logits_BtV = score(definition.merge(arrays), hidden_BtD)
        return -token_nll(logits_BtV, targets_Bt)[0], logits_BtV.argmax(axis=-1) == targets_Bt

    return over_positions(
        function,
        arrays,
        (hidden_BTD, targets_BT),
        bytes_per_position=4 * model.config.vocab_size,
        chunk_bytes=CHUNK_BYTES,
        axes=definition.axes()[0],
    )


@dataclasses.dataclass(frozen=True)
class SpanScorer:
    """Scores spans with one model.

    Attributes:
      model: a decoder.
      rows: spans that are scored at once.
      max_length: longest span; the model's own when None.
    """

    model: Any
    rows: int = 8
    max_length: int | None = None

    def __post_init__(self):
        if self.rows < 1 or (self.max_length is not None and self.max_length < 2):
            raise JaxherdError(
                f"rows={self.rows} must be at least 1 and max_length={self.max_length} at least 2."
            )

    @property
    def longest(self) -> int:
        """Return the tokens of the longest span."""
        own = self.model.config.max_length
        return min(self.max_length or own, own)

    def score(self, spans: Sequence[Span], report: Report | None = None) -> list[SpanScore]:
        """Return the score of every span.

        Raises:
          JaxherdError: a span that is too long, or holds no tokens of the model.
        """
        vocabulary = self.model.config.vocab_size
        for span in spans:
            if len(span.tokens) > self.longest:
                raise JaxherdError(
                    f"a span has {len(span.tokens)} tokens and the model takes {self.longest}: cut it."
                )
            if min(span.tokens) < 0 or max(span.tokens) >= vocabulary:
                raise JaxherdError(f"a span has tokens outside the vocabulary of {vocabulary}.")
        found: list[SpanScore | None] = [None] * len(spans)
        # Longest first: memory that does not suffice is told at once.
        order = sorted(range(len(spans)), key=lambda i: (-len(spans[i].tokens), i))
        if report is not None:
            report("texts scored", 0, len(spans))
        for begin in range(0, len(order), self.rows):
            some = order[begin : begin + self.rows]
            for place, score in zip(some, self._batch([spans[i] for i in some])):
                found[place] = score
            if report is not None:
                report("texts scored", begin + len(some), len(spans))
        return [score for score in found if score is not None]

    def _batch(self, spans: Sequence[Span]) -> Iterator[SpanScore]:
        longest = max(len(span.tokens) for span in spans) - 1
        width = min(bucket(longest, _SMALLEST), max(longest, self.longest - 1))
        tokens = np.zeros((self.rows, width), np.int32)
        targets = np.zeros((self.rows, width), np.int32)
        for row, span in enumerate(spans):
            tokens[row, : len(span.tokens) - 1] = span.tokens[:-1]
            targets[row, : len(span.tokens) - 1] = span.tokens[1:]
        log_probs, greedy = map(np.asarray, _score(self.model, jnp.asarray(tokens), targets))
        for row, span in enumerate(spans):
            end = len(span.tokens) - 1
            part = slice(end - span.scored, end)
            total = float(log_probs[row, part].astype(np.float64).sum())
            yield SpanScore(total, bool(greedy[row, part].all()))


def continuation(context: Sequence[int], tokens: Sequence[int], longest: int) -> Span:
    """Return the span that scores a continuation, with as much context as fits.

    Args:
      context: tokens before it, one at least (what begins a text, where there is nothing else).
      tokens: of the continuation.
      longest: tokens of the longest span.
    Raises:
      JaxherdError: no context, no continuation, or one that does not fit.
    """
    if not context or not tokens:
        raise JaxherdError("a continuation to be scored needs a token, and one before it.")
    if len(tokens) >= longest:
        raise JaxherdError(
            f"a continuation of {len(tokens)} tokens and one before it are more than the model's "
            f"{longest}: shorten it."
        )
    return Span((*context, *tokens)[-longest:], len(tokens))


def rolling(tokens: Sequence[int], begin: int, longest: int) -> list[Span]:
    """Return the spans that score every token of a document once.

    The first window begins with `begin`; later ones are full, and score what no window did before.

    Args:
      tokens: of the document.
      begin: the token before its first, such as the one that begins texts.
      longest: tokens of a span.
    """
    if longest < 2:
        raise JaxherdError(f"windows of {longest} tokens score nothing: two at least.")
    whole = (begin, *tokens)
    spans, done, width = [], 0, longest - 1
    while done < len(tokens):
        new = min(width, len(tokens) - done)
        end = done + new + 1
        # The last window reaches back over tokens that are scored already, so that it is full too.
        spans.append(Span(whole[max(0, end - longest) : end], new))
        done += new
    return spans
