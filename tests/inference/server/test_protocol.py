"""What a request may say, without a server."""

import dataclasses
from typing import Any

import pytest

from jaxherd.inference.sampling import Sampling
from jaxherd.inference.server.errors import ApiError
from jaxherd.inference.server.limits import Limits
from jaxherd.inference.server.messages import images_of, read_messages
from jaxherd.inference.server.protocol import read_chat, read_completion
from jaxherd.inference.server.replies import Replies, Usage

LIMITS = Limits(new_tokens=100, images=2)
DEFAULTS = Sampling(temperature=0.6, top_p=0.9, top_k=40)
USER = [{"role": "user", "content": "Hi"}]


def chat(**fields):
    return read_chat({"model": "m", "messages": USER} | fields, LIMITS, DEFAULTS)


def completion(**fields):
    return read_completion({"model": "m", "prompt": "Hi"} | fields, LIMITS, DEFAULTS)


def test_defaults_and_fields():
    options = chat().options
    assert options.sampling == DEFAULTS and options.max_tokens is None and options.n == 1
    assert options.seed is None and not options.stream and options.stop == ()
    assert completion().options.max_tokens == 16
    assert completion(max_tokens=3).options.max_tokens == 3
    given = chat(
        temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=-5, n=2, stop="end", stream=True,
        stream_options={"include_usage": True}, max_completion_tokens=9,
    ).options  # fmt: skip
    assert given.sampling == Sampling(0.0, 3, 0.5, 0.1)
    assert (given.seed, given.n, given.stop, given.max_tokens) == (-5, 2, ("end",), 9)
    assert given.stream and given.include_usage
    assert chat(temperature=1e-40).options.sampling.temperature == 0
    nothing = dict.fromkeys(
        ["temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "max_tokens",
         "tools", "logprobs", "user", "response_format"]
    )  # fmt: skip
    assert chat(**nothing) == chat(), "null is as good as absent"


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"temperature": 2.5}, "temperature", "at least 0 and at most 2"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"temperature": 10**400}, "temperature", "at most 2"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": 1.5}, "top_k", "whole number"),
        ({"min_p": -1}, "min_p", "at least 0"),
        ({"n": 0}, "n", "from 1"),
        ({"n": True}, "n", "whole number"),
        ({"n": 9}, "n", "8 answers"),
        ({"max_tokens": 101}, "max_tokens", "from 1 to 100"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "give one"),
        ({"seed": 2**63}, "seed", "must be from"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "4 texts"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": ["a", 1]}, "stop", "list of texts"),
        ({"stop": "x" * 513}, "stop", "512 characters"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true alone"),
        ({"stream": True, "stream_options": {"usage": 1}}, "usage", "include_usage"),
        ({"stream": True, "stream_options": 1}, "stream_options", "an object"),
        ({"model": 5}, "model", "must be a text"),
        ({"model": None}, "model", "must be a text"),
        ({"logprobs": True}, "logprobs", "not served"),
        ({"top_logprobs": 3}, "top_logprobs", "not served"),
        ({"tools": [{"type": "function"}]}, "tools", "not served"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not served"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not served"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "not served"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "Hi"}, "messages", "list"),
    ],
)
def test_what_a_chat_may_not_say(fields, param, words):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    error = caught.value
    assert (error.status, error.param) == (400, param) and words in error.message
    assert error.body()["error"]["type"] == "invalid_request_error"


def test_values_that_change_nothing():
    neutral = dict(
        frequency_penalty=0, presence_penalty=0.0, logit_bias={}, logprobs=False, tools=[],
        tool_choice="auto", response_format={"type": "text"}, store=False, user="me",
        metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True,
    )  # fmt: skip
    assert chat(**neutral) == chat()
    assert completion(best_of=1, echo=False, suffix="", logprobs=None) == completion()
    assert completion(best_of=2, n=2).options.n == 2
    # False is no zero here, and zero no false.
    for fields in ({"frequency_penalty": False}, {"logprobs": 0}, {"store": True}):
        with pytest.raises(ApiError, match="not served"):
            chat(**fields)
    for fields in ({"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"logprobs": 0}):
        with pytest.raises(ApiError, match="not served"):
            completion(**fields)


def test_prompts():
    assert completion(prompt="a").prompts == ("a",)
    assert completion(prompt=["a", "b"]).prompts == ("a", "b")
    assert completion(prompt=[1, 2]).prompts == ((1, 2),)
    assert completion(prompt=[[1], [2, 3]]).prompts == ((1,), (2, 3))
    for prompt in (None, 5, [], [[]], ["a", 1], [1, -1], [1, True], [1.0], {"a": 1}, [2**31]):
        with pytest.raises(ApiError, match="token ids"):
            completion(prompt=prompt)
    with pytest.raises(ApiError, match="5 prompts times n = 2 are more than the 8"):
        completion(prompt=list("abcde"), n=2)


def test_messages():
    read = read_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "2", "name": "f"},
        ],
        LIMITS,
    )  # fmt: skip
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "id": "c1"}
    assert read == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2", "name": "f"},
    ]


PNG = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0K", "detail": "low"}}


def test_images_stay_in_their_place():
    parts = [{"type": "text", "text": "a"}, PNG, {"type": "text", "text": "b"}]
    read = read_messages([{"role": "user", "content": parts}], LIMITS)
    assert [part["type"] for part in read[0]["content"]] == ["text", "image", "text"]
    [image] = images_of(read)
    assert image.media_type == "image/png" and image.data.startswith(b"\x89PNG")
    assert "PNG" not in repr(image).replace("png", "")


@pytest.mark.parametrize(
    "message, words",
    [
        ("Hi", "messages[0] must be an object"),
        ({"content": "Hi"}, "messages[0].role is null"),
        ({"role": "sytem", "content": "Hi"}, "did you mean 'system'"),
        ({"role": "user"}, "messages[0].content must be a text or a list"),
        ({"role": "user", "content": 5}, "messages[0].content must be a text or a list"),
        ({"role": "user", "content": []}, "messages[0].content must be a text or a list"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "text or image_url"),
        ({"role": "user", "content": ["x"]}, "text or image_url"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "an object with a url"),
        ({"role": "user", "content": [PNG] * 3}, "2 images at most"),
        ({"role": "user", "content": "Hi", "name": 5}, "messages[0].name must be a text"),
        ({"role": "user", "content": "Hi", "contnt": "x"}, "did you mean 'content'"),
        ({"role": "user", "content": "Hi", "tool_calls": [1]}, "only the assistant"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "a function with a name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "JSON of an object",
        ),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "refusal is not served"),
    ],
)
def test_messages_that_are_wrong(message, words):
    with pytest.raises(ApiError) as caught:
        read_messages([message], LIMITS)
    assert caught.value.status == 400 and words in caught.value.message


def test_limits():
    from jaxherd.core.errors import JaxherdError

    for field in dataclasses.fields(Limits):
        least = 0 if field.name in ("waiting", "images") else 1
        low: Any = float(least - 1) if field.name.endswith("_seconds") else least - 1
        with pytest.raises(JaxherdError, match=f"limit {field.name} must be at least {least}"):
            Limits(**{field.name: low})
    with pytest.raises(JaxherdError, match="request_seconds"):
        Limits(request_seconds=float("nan"))


def test_shapes_of_pieces():
    replies = Replies("chat", "m", include_usage=True)
    opening = replies.opening(1)
    assert opening is not None and opening["choices"][0]["delta"]["role"] == "assistant"
    both = replies.piece(1, "end", "stop")
    assert [piece["choices"][0]["delta"] for piece in both] == [{"content": "end"}, {}]
    assert [piece["choices"][0]["finish_reason"] for piece in both] == [None, "stop"]
    closing = replies.closing(Usage(5, 3, 2))
    assert closing is not None and closing["choices"] == []
    assert closing["usage"]["total_tokens"] == 7
    assert Replies("completion", "m", include_usage=False).closing(Usage(5, 3, 2)) is None
    [piece] = Replies("completion", "m", include_usage=False).piece(0, "end", "stop")
    assert piece["choices"][0] == {
        "index": 0, "text": "end", "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
