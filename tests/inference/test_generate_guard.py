"""A guard around generation: vetoed prompts do not run, vetoed answers are not shown."""

import pytest

import jaxherd
from jaxherd.core.errors import JaxherdError
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.inference import steps
from jaxherd.inference.generate import Generator, Request
from jaxherd.inference.guards.guard import Guard, Verdict
from jaxherd.inference.requests import GuardVeto
from tests.methods.tiny_policy import policy


class Words(ByteTokenizer):
    stop_ids = ()


class Substring:
    """Vetoes texts with a given part, as written; says what it was asked."""

    name = "substring"

    def __init__(self, prompts=(), answers=(), reach: int | None = None):
        self.prompts, self.answers, self.reach = prompts, answers, reach
        self.asked: list[str] = []

    def pre(self, conversation):
        text = conversation[-1]["content"]
        self.asked.append(text)
        return Verdict(any(part in text for part in self.prompts), {}, self.name)

    def post(self, conversation, answer, *, complete=True):
        return Verdict(any(part in answer for part in self.answers), {}, self.name)


WORDS = Words()
PROMPTS = ["first prompt", "other one", "third"]


@pytest.fixture(scope="module")
def plain():
    requests = [Request(tuple(WORDS.encode(p)), 20) for p in PROMPTS]
    # Two rows: the shapes of a batch of three of which one is vetoed.
    first, last = Generator(policy(), WORDS, prepare=False).run(requests[::2])
    return requests, [first, None, last]


def guarded(guard):
    assert isinstance(guard, Guard)
    return Generator(policy(), WORDS, prepare=False, guard=guard)


def test_other_rows_are_not_touched(plain):
    requests, wanted = plain
    part = wanted[2].text[4:9]
    guard = Substring(prompts=["other"], answers=[part])
    found = guarded(guard).run(requests)
    assert guard.asked == PROMPTS, "the guard reads what the model reads"
    assert found[0] == wanted[0]
    assert (found[1].tokens, found[1].text, found[1].reason) == ([], "", "content_filter")
    assert found[1].veto == "the prompt was vetoed by the guard 'substring'."
    assert found[2].reason == "content_filter" and found[2].text == "" and not found[2].tokens
    assert found[2].veto == "the answer was vetoed by the guard 'substring'."


def test_a_vetoed_prompt_never_reaches_the_model(plain, monkeypatch):
    def never(*given, **more):
        raise AssertionError("the model ran")

    monkeypatch.setattr(steps, "prefill", never)
    requests, _ = plain
    [found] = guarded(Substring(prompts=["first"])).run(requests[:1])
    assert found.reason == "content_filter"


@pytest.mark.parametrize("reach", [None, 4])
def test_streams(plain, reach):
    requests, wanted = plain
    generator = guarded(Substring(reach=reach))
    assert "".join(generator.stream(requests[0])) == wanted[0].text
    vetoing = guarded(Substring(answers=[wanted[0].text[10:14]], reach=reach))
    shown = []
    with pytest.raises(GuardVeto, match="the answer was vetoed"):
        shown.extend(vetoing.stream(requests[0]))
    assert wanted[0].text[:10].startswith("".join(shown))


def test_tokens_in_tokens_out(plain):
    requests, wanted = plain
    tokens = [list(request.tokens) for request in requests]
    guard = Substring(prompts=["other"])
    found = jaxherd.generate(policy(), tokens, max_new_tokens=20, tokenizer=WORDS, guard=guard)
    assert found == [wanted[0].tokens, [], wanted[2].tokens]
    with pytest.raises(JaxherdError, match="give a tokenizer"):
        jaxherd.generate(policy(), tokens, max_new_tokens=20, guard=guard)
