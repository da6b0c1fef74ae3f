"""Scores of spans equal a plain forward pass, whatever the batch and the windows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.methods.scoring import Span, SpanScorer, continuation, rolling
from tests.methods.tiny_policy import log_probs, policy


def plain(tokens, scored):
    """Return (sum of log p, greedy) by a forward pass over this very row."""
    log_p = log_probs(tokens)
    places = range(len(tokens) - scored - 1, len(tokens) - 1)
    total = sum(log_p[place, tokens[place + 1]] for place in places)
    return total, all(log_p[place].argmax() == tokens[place + 1] for place in places)


@pytest.fixture(scope="module")
def spans():
    random = np.random.default_rng(0)
    made = []
    for length, scored in [(2, 1), (9, 3), (33, 32), (40, 5), (64, 63), (12, 0), (64, 1)]:
        made.append(Span(tuple(random.integers(0, 256, length).tolist()), scored))
    # One that the model would have said itself.
    tokens = [5, 6, 7]
    for _ in range(4):
        tokens.append(int(log_probs(tokens)[-1].argmax()))
    return [*made, Span(tuple(tokens), 4), Span((*tokens[:-1], (tokens[-1] + 1) % 256), 4)]


def test_equal_to_a_plain_forward(spans):
    told = []
    scorer = SpanScorer(policy(), rows=4)
    found = scorer.score(spans, report=lambda *given: told.append(given))
    for span, score in zip(spans, found):
        total, greedy = plain(list(span.tokens), span.scored)
        assert score.log_prob == pytest.approx(total, abs=1e-4)
        assert score.greedy == greedy
    assert [score.greedy for score in found[-2:]] == [True, False]
    again = scorer.score(spans[::-1][:5])
    assert [s.greedy for s in again] == [s.greedy for s in found[::-1][:5]]
    np.testing.assert_allclose(
        [s.log_prob for s in again], [s.log_prob for s in found[::-1][:5]], atol=1e-4
    )
    assert told[0] == ("texts scored", 0, len(spans)) and told[-1][1] == len(spans)


@given(st.integers(0, 40), st.integers(2, 9))
@settings(max_examples=80, deadline=None)
def test_windows_score_every_token_once(length, longest):
    tokens = list(range(1, length + 1))
    spans = rolling(tokens, 0, longest)
    scored = [token for span in spans for token in span.tokens[len(span.tokens) - span.scored :]]
    assert scored == tokens
    assert all(len(span.tokens) <= longest for span in spans)
    # All but the first see as much as fits.
    assert all(len(span.tokens) == longest for span in spans[1:])


def test_rolling_by_hand():
    # Four inputs a window: the last one reaches back.
    assert rolling([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0, 5) == [
        Span((0, 1, 2, 3, 4), 4), Span((4, 5, 6, 7, 8), 4), Span((6, 7, 8, 9, 10), 2),
    ]  # fmt: skip


def test_continuations_keep_the_end_of_their_context():
    assert continuation([1, 2, 3], [4, 5], 10) == Span((1, 2, 3, 4, 5), 2)
    assert continuation([1, 2, 3], [4, 5], 4) == Span((2, 3, 4, 5), 2)
    for wrong in (([], [4], 9), ([1], [], 9), ([1], [2, 3, 4], 3)):
        with pytest.raises(JaxherdError):
            continuation(*wrong)


def test_wrong_spans():
    scorer = SpanScorer(policy())
    with pytest.raises(JaxherdError, match="65 tokens and the model takes 64"):
        scorer.score([Span((1,) * 65, 1)])
    with pytest.raises(JaxherdError, match="outside the vocabulary"):
        scorer.score([Span((1, 999), 1)])
    with pytest.raises(JaxherdError, match="one at least"):
        Span((1, 2), 2)
    with pytest.raises(JaxherdError, match="rows=0"):
        SpanScorer(policy(), 0)
    with pytest.raises(JaxherdError, match="two at least"):
        rolling([1], 0, 1)
