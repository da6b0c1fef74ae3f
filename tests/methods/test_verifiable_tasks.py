"""Problems with answers that a program checks: what they ask, who is held out, exact rewards."""

import json

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.methods.verifiable_tasks import (
    CAPABILITIES,
    AnswerFile,
    TaggedAnswer,
    VerifiableTasks,
)

ALL = tuple((name, level) for name in CAPABILITIES for level in (1, 2, 3))


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("<answer>42</answer>", 1.0),
        ("<answer> 42 </answer>\n", 1.0),
        ("6 * 7, so <answer>42</answer>", 1.0),
        ("<answer>43</answer>", 0.1),
        ("<answer>4 2</answer>", 0.1),
        ("<answer></answer>", 0.1),
        ("42", 0.0),
        ("", 0.0),
        ("<answer>42", 0.0),
        ("42</answer>", 0.0),
        ("</answer>42<answer>", 0.0),
        ("<answer>42</answer>.", 0.0),
        ("<answer>42</answer><answer>42</answer>", 0.0),
        ("<answer>41</answer> or <answer>42</answer>", 0.0),
        ("<answer><answer>42</answer>", 0.0),
        ("<Answer>42</Answer>", 0.0),
    ],
)
def test_rewards_are_exact(completion, reward):
    assert TaggedAnswer().reward(completion, "42") == reward


def solved(prompt: str) -> str:
    """Solve a terse prompt anew."""
    if prompt.endswith("="):
        return str(eval(prompt[:-1]))
    *words, last = prompt[:-1].split()
    if words == ["a", "in"]:
        return str(sum(letter == "a" for letter in last))
    for word in words:
        last = {
            "reverse": lambda w: "".join(reversed(w)),
            "sort": lambda w: "".join(sorted(w)),
            "caps": lambda w: w.upper(),
            "twice": lambda w: w * 2,
            "dashes": lambda w: "-".join(w),
            "quotes": lambda w: '"' + w + '"',
            "brackets": lambda w: "[" + w + "]",
        }[word](last)
    return last


def test_answers_are_right_and_levels_are_what_they_say():
    tasks = VerifiableTasks(ALL, per_task=30)
    problems = tasks.problems("train")
    assert {(p.capability, p.level) for p in problems} == set(ALL)
    for p in problems:
        assert p.answer == solved(str(p.prompt)), p
        assert tasks.reward(p, tasks.answer.wrap(p.answer)) == 1.0
        if p.capability in ("addition", "subtraction"):
            numbers = str(p.prompt)[:-1].replace("-", "+").split("+")
            assert [len(n) for n in numbers] == [p.level, p.level]
        if p.capability in ("reversal", "sorting"):
            assert len(p.answer) == p.level + 1
        if p.capability == "instructions":
            assert len(str(p.prompt).split()) == p.level + 1


@pytest.mark.parametrize("wording", ["terse", "words"])
def test_no_prompt_is_on_both_sides(wording):
    tasks = VerifiableTasks(ALL, per_task=100, heldout_per_task=20, wording=wording)
    train, heldout = ([p.prompt for p in tasks.problems(s)] for s in ("train", "heldout"))
    assert not set(train) & set(heldout)
    assert len(set(train)) == len(train) and len(set(heldout)) == len(heldout)
    # The easiest tasks have fewer prompts than are wanted.
    assert len(train) > 100 * (len(ALL) - 5) and len(heldout) > 20 * (len(ALL) - 5)
    again = VerifiableTasks(ALL, per_task=100, heldout_per_task=20, wording=wording)
    assert again.problems("train") == tasks.problems("train")
    other = VerifiableTasks(ALL, per_task=100, heldout_per_task=20, wording=wording, seed=1)
    assert other.problems("train") != tasks.problems("train")
    if wording == "words":
        assert all(str(p).endswith("Write the answer as <answer>...</answer>.") for p in train)


def test_transcripts_teach_the_answer_and_reject_a_worse_one():
    tasks = VerifiableTasks(ALL, per_task=40)
    problems, examples = tasks.problems("train"), tasks.examples("train")
    rejected = []
    for p, e in zip(problems, examples):
        assert (e.prompt, e.capability, e.difficulty) == (p.prompt, p.capability, float(p.level))
        assert tasks.reward(p, e.answer) == 1.0
        rejected.append(tasks.reward(p, e.rejected or ""))
    # Wrong inside the tags, or of the wrong form: both kinds are there.
    assert set(rejected) == {0.0, 0.1} and 0.2 < rejected.count(0.1) / len(rejected) < 0.5


def test_a_share_of_transcripts_can_be_spoiled():
    tasks = VerifiableTasks(ALL, per_task=60, spoiled=0.3)
    problems, examples = tasks.problems("train"), tasks.examples("train")
    rewards = [tasks.reward(p, e.answer) for p, e in zip(problems, examples)]
    assert 0.25 < sum(reward < 1 for reward in rewards) / len(rewards) < 0.35
    assert all(e.answer == e.rejected for e, reward in zip(examples, rewards) if reward < 1)
    assert problems == VerifiableTasks(ALL, per_task=60).problems("train")


def test_problems_of_a_file(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [{"prompt": f"{n} twice?", "answer": str(2 * n)} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = AnswerFile(str(path), heldout_fraction=0.3)
    train, heldout = file.problems("train"), file.problems("heldout")
    assert len(train) + len(heldout) == 60 and len(heldout) > 5
    assert file.reward(train[0], f"so <answer>{train[0].answer}</answer>") == 1.0
    with path.open("a") as more:
        more.write('{"prompt": "a", "answer": 3}\n')
    with pytest.raises(JaxherdError, match=r"Line 61 of '.*p\.jsonl' needs texts in 'answer'"):
        file.problems("train")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"tasks": (("adition", 1),)}, "did you mean 'addition'"),
        ({"tasks": (("addition", 0),)}, "levels 1 to 12"),
        ({"tasks": (("instructions", 6),)}, "levels 1 to 5"),
        ({"tasks": ()}, "at least one"),
        ({"tasks": (("addition", 1), ("addition", 1))}, "none twice"),
        ({"heldout_fraction": 1.0}, "between 0 and 1"),
        ({"spoiled": 1.5}, "spoiled=1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, words):
    with pytest.raises(JaxherdError, match=words):
        VerifiableTasks(**settings)
    with pytest.raises(JaxherdError, match="no split 'test'"):
        VerifiableTasks().problems("test")
    with pytest.raises(JaxherdError, match="format_weight"):
        TaggedAnswer(format_weight=1.0)
