"""A guard in the server: what it vetoes ends with content_filter, and is counted."""

import pytest

from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.inference.guards.guard import Verdict
from jaxherd.inference.server.service import Service

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello there, how are you?"}]


class Substring:
    """Vetoes texts with a part, as written."""

    name = "substring"

    def __init__(self, prompts=(), answers=(), reach=None):
        self.prompts, self.answers, self.reach = prompts, answers, reach
        self.seen: list = []

    def pre(self, conversation):
        self.seen.append([m["content"] for m in conversation])
        text = " ".join(self.seen[-1])
        return Verdict(any(part in text for part in self.prompts), {"S7": 1.0}, self.name)

    def post(self, conversation, answer, *, complete=True):
        return Verdict(any(part in answer for part in self.answers), {"S7": 1.0}, self.name)


@pytest.fixture
def guarded(serve, monkeypatch):
    """Return a function that starts a server behind a guard."""

    def start(guard):
        made = Service.__init__

        def with_guard(self, *given, **options):
            made(self, *given, **(options | {"guard": guard}))

        monkeypatch.setattr(Service, "__init__", with_guard)
        return serve()

    return start


def counts(handle):
    return handle.request("GET", "/health")[2]["guard"]


def test_what_passes_is_the_same(guarded, offline):
    handle = guarded(Substring(["zzz"], ["\0\0\0\0"]))
    _, _, wanted = offline(HELLO)
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 20}
    _, _, found = handle.post(CHAT, body)
    assert found["choices"][0]["message"] == {
        "role": "assistant",
        "content": wanted,
        "refusal": None,
    }
    events = list(handle.events(CHAT, body))[:-1]
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert text == wanted and events[-1]["choices"][0]["finish_reason"] == "length"
    assert counts(handle) == {
        "name": "substring", "prompts": 2, "vetoed_prompts": 0, "answers": 2, "vetoed_answers": 0,
    }  # fmt: skip


def test_a_vetoed_prompt_never_reaches_the_engine(guarded):
    guard = Substring(["how are"])
    handle = guarded(guard)
    before = handle.thread.counters
    status, _, body = handle.post(CHAT, {"model": "tiny", "messages": HELLO, "n": 2})
    assert status == 200 and guard.seen == [["Hello there, how are you?"]]
    for choice in body["choices"]:
        assert choice["finish_reason"] == "content_filter" and choice["message"]["content"] == ""
        assert (
            choice["message"]["refusal"]
            == "the prompt was vetoed by the guard 'substring' (S7 Privacy)."
        )
    assert body["usage"]["completion_tokens"] == 0 and body["usage"]["prompt_tokens"] > 0
    ids = ByteTokenizer().encode("how are things")
    _, _, body = handle.post(TEXT, {"model": "tiny", "prompt": ids, "max_tokens": 4})
    assert guard.seen[-1] == ["how are things"], "token ids are read as text"
    assert body["choices"][0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "content_filter",
    }  # fmt: skip
    events = list(handle.events(CHAT, {"model": "tiny", "messages": HELLO}))
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]][-1] == "content_filter"
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1]) == ""
    assert handle.thread.counters == before
    assert counts(handle)["vetoed_prompts"] == counts(handle)["prompts"] == 3


def test_one_prompt_of_several(guarded, offline):
    handle = guarded(Substring(["cd"]))
    _, _, body = handle.post(
        TEXT, {"model": "tiny", "prompt": ["ab", "cd", "ef"], "max_tokens": 20}
    )
    assert [c["text"] for c in body["choices"]] == [offline("ab")[2], "", offline("ef")[2]]
    reasons = [choice["finish_reason"] for choice in body["choices"]]
    assert reasons == ["length", "content_filter", "length"]


@pytest.mark.parametrize("reach", [None, 3])
def test_a_vetoed_answer_is_withheld(guarded, offline, reach):
    _, _, wanted = offline(HELLO, 200)
    part = wanted[100:106]
    at = wanted.index(part)
    handle = guarded(Substring(answers=[part], reach=reach))
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 200}
    _, _, found = handle.post(CHAT, body)
    [choice] = found["choices"]
    assert choice["finish_reason"] == "content_filter" and choice["message"]["content"] == ""
    assert "the answer was vetoed" in choice["message"]["refusal"]
    events = list(handle.events(CHAT, body))[:-1]
    shown = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
    assert wanted[:at].startswith(shown) and part not in shown
    assert (shown == "") == (reach is None)
    refusals = [e["choices"][0]["delta"].get("refusal") for e in events]
    assert any(r and "the answer was vetoed" in r for r in refusals)
    assert events[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert counts(handle)["vetoed_answers"] == 2
    # The engine does not go on for nobody; the fixture checks that all pages come back.
    handle.until(lambda c: c.running == 0)
