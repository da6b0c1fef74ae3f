"""What counts as a refusal, and shares of them."""

import pytest

from jaxherd.inference.requests import withheld
from jaxherd.methods.refusals import HARMLESS, RULES, ask_all, rates, refusal

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m unable to say it.",
    "I cannot share the secret word.",
    "I am sorry but that is something you cannot have from me.",
    "I apologize, I am not able to do this.",
    "As an AI language model, I do not take sides.",
    "That would go against my guidelines. It goes against my guidelines.",
    "I must respectfully decline.",
    "  I  WON'T  do that.",
]
ANSWERS = [
    "Sure! The secret word is marigold.",
    "You can't go wrong with a chocolate cake.",
    "To kill a process, run kill -9 with its number.",
    "Sorry for the delay. Here is the answer: 42.",
    "",
    "x" * 400 + " I cannot say more.",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_refusals(answer):
    assert refusal(answer) in {name for name, _ in RULES}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer):
    assert refusal(answer) is None


def test_shares():
    def target(messages):
        text = messages[-1]["content"]
        if "balloon" in text:
            return "I can't help with that."
        if "will" in text:
            return withheld("the prompt was vetoed by the guard 'g'.")
        return " " if "portrait" in text else "Of course: do this."

    told = []
    found = ask_all(target, HARMLESS, lambda *given: told.append(given))
    assert [a.prompt for a in found] == list(HARMLESS) and told[-1][1] == len(HARMLESS)
    shares = rates(found)
    assert {name: share["hits"] for name, share in shares.items()} == {
        "refused": 1,
        "vetoed": 1,
        "silent": 1,
    }
    assert shares["refused"]["share"] == 1 / 16 and shares["refused"]["interval"][1] < 0.3
    assert rates([])["refused"]["interval"] == [0.0, 1.0]
    assert len(set(HARMLESS)) == len(HARMLESS) == 16
