"""Patterns: the same finds as Python's `re`, in time that no text can blow up."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.data.folded_text import letters_for_figures
from jaxherd.inference.guards.patterns import Pattern

atoms = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\s", "7", " ", r"\b", r"\W"]
)


def groups(inner):
    counts = st.sampled_from(["?", "{2}", "{0,2}", "{1,3}", "{,2}"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, counts).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


@given(st.recursive(atoms, groups, max_leaves=8), st.text("ab7 _!", max_size=12))
@settings(max_examples=400, deadline=None)
def test_finds_what_re_finds(source, text):
    text = " ".join(text.split(" ")) if "  " not in text else re.sub(" +", " ", text)
    theirs = re.compile(source.replace("{,", "{0,"))
    try:
        ours = Pattern(source)
    except JaxherdError as error:
        assert "matches where there is nothing" in str(error)
        # An empty match, or one that edges alone decide.
        assert theirs.search("") or theirs.search("a") or theirs.search("!a")
        return
    found = theirs.search(text)
    assert (ours.search(text) is not None) == (found is not None)
    if found:
        assert found.end() - found.start() <= ours.longest


def test_where_the_first_match_ends():
    assert Pattern("ab").search("xxabab") == 4
    assert Pattern(r"\bcat\b").search("concat cat") == len("concat cat")
    assert Pattern(r"\bcat\b").search("concat cats") is None
    assert Pattern("Straße").search("die strasse") is not None, "literals are folded too"


@pytest.mark.parametrize(
    "source, text",
    [
        ("(a{0,30}){0,30}c", "a" * 20_000),
        ("(a|a){0,200}b", "a" * 20_000),
        ("(.{0,20}x){0,20}y", "x" * 20_000),
        (r"(\w{0,30}\s?){0,30}!", "word " * 4_000),
    ],
)
def test_hostile_text_takes_few_steps(source, text):
    """Steps are counted, not seconds: each set of states and character is worked out once."""
    pattern = Pattern(source)
    steps = []
    step = pattern._step
    pattern._step = lambda *given: steps.append(given) or step(*given)  # type: ignore[method-assign]
    assert pattern.search(text) is None
    assert len(steps) < 4_000 < len(text)


def test_what_is_remembered_is_bounded(monkeypatch):
    from jaxherd.inference.guards import patterns

    monkeypatch.setattr(patterns, "_MOST_KNOWN", 50)
    pattern = Pattern("(a.{0,6}b){2}c")
    text = "".join(chr(0x4E00 + i % 700) + "ab"[i % 2] for i in range(5_000))
    assert pattern.search(text) is None
    assert len(pattern._states) <= 51
    assert pattern.search(text + "a1b a2bc") is not None


def test_loose_reading():
    loose = Pattern("secret word", letters=letters_for_figures, loose=True)
    assert loose.search(letters_for_figures("my 5ecretw0rd is")) is not None
    assert loose.search(letters_for_figures("my secret word is")) is not None
    assert Pattern("a[bc]").plain is False and Pattern("don't tell").plain is True
    assert Pattern(r"\d{4}").plain is False and Pattern("r2d2").plain is False


WRONG = {
    "star": ("a*", "repeats without end: write {0,40}"),
    "plus": ("(ab)+", "repeats without end"),
    "open group": ("(ab", "never closed"),
    "closed too often": ("ab)", "a ) too many"),
    "look-ahead": ("(?=a)b", "other than (?:...)"),
    "reference": (r"(a)\1", "means nothing here"),
    "two repeats": ("a{2}{3}", "two repeats"),
    "wrong way round": ("a{3,2}", "wrong way round"),
    "no numbers": ("a{x}", "not {n}"),
    "anchors": ("^a", "leave it away"),
    "nothing before": ("?a", "nothing before it"),
    "range": ("[z-a]", "is no range"),
    "open class": ("[ab", "ends too early"),
    "huge": ("(a{1000}){1000}", "more than 2000 states"),
    "empty": ("", "is empty"),
    "matches nothing": ("a?", "where there is nothing"),
    "edge alone": (r"\b", "where there is nothing"),
    "unseen": ("a\u200bb", "never seen"),
    "deep": ("(" * 60 + "a" + ")" * 60, "50 deep"),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_wrong_patterns_are_told(what):
    source, told = WRONG[what]
    with pytest.raises(JaxherdError) as caught:
        Pattern(source)
    assert told in str(caught.value)
