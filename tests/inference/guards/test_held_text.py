"""Streamed answers: nothing of what a guard finds is shown, and everything that it does not."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxherd.inference.guards import HeldText, Rule, RuleGuard

GUARD = RuleGuard([Rule("r", (r"\bbad{1,4} (wo)?rd\b", "xyz"), "own")])
WHOLE = RuleGuard([Rule("r", ("bad word",), "own")])
WHOLE.reach = None  # type: ignore[assignment]


def streamed(guard, text, sizes):
    held, shown, begin = HeldText(guard, []), [], 0
    for size in sizes:
        shown.append(held.push(text[begin : begin + size]))
        begin += size
    shown.append(held.push(text[begin:]))
    shown.append(held.finish())
    return "".join(shown), held


words = st.sampled_from(
    [
        "bad",
        "badd",
        "word",
        "rd",
        "xyz",
        "x y z w",
        "some",
        "b\u200bad",
        "ｂａｄ",
        "words",
        ",",
        "plain text here",
    ]
)


@given(st.lists(words, max_size=120).map(" ".join), st.lists(st.integers(1, 90), max_size=30))
@settings(max_examples=120, deadline=None)
def test_streams_agree_with_the_whole_answer(text, sizes):
    shown, held = streamed(GUARD, text, sizes)
    verdict = GUARD.post([], text)
    assert held.vetoed == verdict.vetoed
    if not verdict.vetoed:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not GUARD.post([], shown).vetoed
        # By another engine, on what it can read as it is.
        for match in re.finditer(r"\bbad{1,4} (wo)?rd\b|xyz", text):
            assert match.start() >= len(shown)


def test_a_long_answer_is_shown_while_it_is_written():
    text = "harmless words, one after the other. " * 60
    held = HeldText(GUARD, [])
    first = held.push(text)
    assert len(text) - 2 * GUARD.reach < len(first) < len(text)
    assert first + held.finish() == text
    blocked = HeldText(GUARD, [])
    shown = blocked.push(text) + blocked.push("bad word") + blocked.finish() + blocked.push("more")
    assert shown == first and blocked.vetoed and blocked.verdict is not None
    assert blocked.verdict.scores == {"own": 1.0}


def test_a_guard_that_needs_all_holds_all():
    held = HeldText(WHOLE, [])
    assert held.push("fine words " * 500) == ""
    assert held.finish() == "fine words " * 500


def test_characters_that_are_not_seen_do_not_stretch_a_finding():
    """A thousand zero-width marks inside a word: it is held as a whole."""
    hidden = "ba" + "\u200b" * 3000 + "d word"
    text = "fine text. " * 40
    shown, held = streamed(GUARD, text + hidden, [len(text) + n for n in (0, 1500)])
    assert held.vetoed and text.startswith(shown)


def test_looks_are_few():
    calls = []

    class Counting(RuleGuard):
        def post(self, conversation, answer, *, complete=True):
            calls.append(len(answer))
            return super().post(conversation, answer, complete=complete)

    guard = Counting([Rule("r", ("bad word",), "own")])
    text = "x" * 9 + " "
    _, held = streamed(guard, text * 1000, [10] * 1000)
    assert not held.vetoed
    # One token at a time, and yet all looks together read little more than sixteen whole texts.
    assert sum(calls) < 20 * 10_000
