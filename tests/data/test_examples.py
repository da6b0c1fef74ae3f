"""Lines of examples, what is wrong with them, and the filter for the hardest."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.data.examples import Example, ExampleFile, hardest_examples, keep_hardest


def write(path, *entries):
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return str(path)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.floats(0, 1, exclude_min=True),
)
def test_exactly_the_hardest_fraction_stays(difficulty, fraction):
    kept = keep_hardest(difficulty, fraction)
    assert len(kept) == max(1, int(fraction * len(difficulty) + 0.5))
    assert kept == sorted(set(kept))
    left = [place for place in range(len(difficulty)) if place not in kept]
    for dropped in left:
        for stays in kept:
            # No dropped one is harder; of two alike the first stays.
            assert (difficulty[stays], -stays) > (difficulty[dropped], -dropped)


def test_the_disclosed_shares():
    assert keep_hardest([1, 3, 2, 3, 1, 2], 0.5) == [1, 2, 3]  # the first 2 of the two stays
    assert len(keep_hardest(range(1000), 0.05)) == 50
    with pytest.raises(JaxherdError, match="keep_hardest=0.0"):
        keep_hardest([1.0], 0.0)


def test_three_forms_of_a_line(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+1=", "completion": "2", "difficulty": 3, "capability": "addition"},
        "",
        {"messages": turns},
        {"prompt": turns[:1], "chosen": "good", "rejected": "bad"},
    )
    one, two, three = ExampleFile(path, heldout_fraction=0.0).examples("train")
    assert (one.prompt, one.answer, one.rejected) == ("1+1=", "2", None)
    assert (one.difficulty, one.capability) == (3.0, "addition")
    assert (two.prompt, two.answer) == (turns[:1], "Ho") and two.where.startswith("Line 3 of")
    assert (three.prompt, three.answer, three.rejected) == (turns[:1], "good", "bad")


def test_a_prompt_is_on_one_side_whatever_else_is_there(tmp_path):
    lines = [{"prompt": f"{n}", "completion": "x"} for n in range(200)]
    file = ExampleFile(write(tmp_path / "a.jsonl", *lines), heldout_fraction=0.3)
    train, heldout = ({e.prompt for e in file.examples(s)} for s in ("train", "heldout"))
    assert not train & heldout and len(train | heldout) == 200 and 30 < len(heldout) < 90
    fewer = ExampleFile(write(tmp_path / "b.jsonl", *lines[::2]), heldout_fraction=0.3)
    assert {e.prompt for e in fewer.examples("heldout")} <= heldout


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "is no JSON"),
        ("[1]", "no JSON object"),
        ({"completion": "x"}, "'prompt' is neither"),
        ({"prompt": "a"}, "no text in the field 'completion'"),
        ({"prompt": "a", "completion": 3}, "no text in the field 'completion'"),
        ({"prompt": "a", "chosen": "b"}, "no text in the field 'rejected'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "last, the assistant's answer"),
        ({"messages": [{"role": "user"}]}, "'messages' is neither"),
        ({"prompt": "a", "completion": "b", "difficulty": "hard"}, "'hard' is no number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, "", line)
    with pytest.raises(JaxherdError, match=rf"Line 3 of '.*a\.jsonl'.*{words}"):
        ExampleFile(path, heldout_fraction=0.0).examples("train")


def test_unjudged_examples_are_named_where_the_hardest_are_wanted():
    examples = [Example("a", "b", difficulty=1.0), Example("c", "d", where="Line 7 of 'x'")]
    with pytest.raises(JaxherdError, match="Line 7 of 'x' has no difficulty"):
        hardest_examples(examples, 0.5)
    assert hardest_examples(examples, 1.0) == examples
