"""What a request may say, checked before anything else happens.

As OpenAI does it, a field that the endpoint does not know is refused, and null is as good as
absent.  Three sorts of fields are known:

- those that are served, `top_k` and `min_p` among them, which OpenAI does not have;
- those that say who asks or how to bill it: taken and without effect;
- those that would change the answer and are not served (tools, log-probabilities, penalties):
  taken with the value that changes nothing, else refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxherd.inference.sampling import Sampling
from jaxherd.inference.server.errors import bad_request
from jaxherd.inference.server.fields import (
    boolean,
    check_names,
    integer,
    neutral,
    number,
    shown,
    text,
)
from jaxherd.inference.server.limits import Limits
from jaxherd.inference.server.messages import read_messages

_MOST_STOPS, _LONGEST_STOP = 4, 512
_SEEDS = 2**63
# Colder than this, scores divided by the temperature leave float32; it means the likeliest token.
_COLDEST = 1e-6

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "stop")
_STREAM = ("stream", "stream_options")
_WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
_CHAT_NEUTRAL = _NEUTRAL | {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "prompt_cache_retention": (),
}
_COMPLETION_NEUTRAL = _NEUTRAL | {
    "logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
_CHAT_FIELDS = (
    "model", "messages", "max_tokens", "max_completion_tokens", *_SAMPLING, *_STREAM,
    *_WITHOUT_EFFECT, *_CHAT_NEUTRAL,
)  # fmt: skip
_COMPLETION_FIELDS = (
    "model", "prompt", "max_tokens", *_SAMPLING, *_STREAM, *_WITHOUT_EFFECT, *_COMPLETION_NEUTRAL,
)  # fmt: skip

# What OpenAI's completions give when a request does not say.
_COMPLETION_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Options:
    """What both endpoints take.

    Attributes:
      model: as the client names it.
      max_tokens: None gives as many as the server allows and the model has room for.
      sampling: how.
      seed: None draws one.
      n: answers for each prompt.
      stop: strings that end an answer.
      stream: answer in pieces.
      include_usage: end a stream with the counts.
    """

    model: str
    max_tokens: int | None
    sampling: Sampling
    seed: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request for /v1/chat/completions; `messages` as of `read_messages`."""

    options: Options
    messages: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request for /v1/completions; a prompt is a text or token ids."""

    options: Options
    prompts: tuple[str | tuple[int, ...], ...]


def read_chat(data: Mapping[str, Any], limits: Limits, defaults: Sampling) -> ChatRequest:
    """Return a chat request.

    Args:
      data: the body's object.
      limits: of the server.
      defaults: for what the request does not say.
    Raises:
      ApiError: the first thing that is wrong.
    """
    check_names(data, _CHAT_FIELDS, "a chat completion")
    neutral(data, _CHAT_NEUTRAL, "chat completions")
    old, new = data.get("max_tokens"), data.get("max_completion_tokens")
    if old is not None and new is not None:
        raise bad_request(
            "max_tokens and max_completion_tokens are the same thing: give one.", "max_tokens"
        )
    name = "max_tokens" if new is None else "max_completion_tokens"
    options = _options(data, name, limits, defaults, prompts=1)
    return ChatRequest(options, read_messages(data.get("messages"), limits))


def read_completion(
    data: Mapping[str, Any], limits: Limits, defaults: Sampling
) -> CompletionRequest:
    """Return a completion request; arguments and errors as of `read_chat`."""
    check_names(data, _COMPLETION_FIELDS, "a completion")
    if data.get("best_of") is not None and data.get("best_of") == data.get("n"):
        # The best n of n are all of them.
        data = {**data, "best_of": None}
    neutral(data, _COMPLETION_NEUTRAL, "completions")
    prompts = _prompts(data.get("prompt"))
    options = _options(data, "max_tokens", limits, defaults, prompts=len(prompts))
    if options.max_tokens is None:
        options = dataclasses.replace(
            options, max_tokens=min(_COMPLETION_TOKENS, limits.new_tokens)
        )
    return CompletionRequest(options, prompts)


def _options(
    data: Mapping[str, Any], max_tokens: str, limits: Limits, defaults: Sampling, *, prompts: int
) -> Options:
    n = integer(data, "n", 1, least=1, most=128) or 1
    if n * prompts > limits.choices:
        raise bad_request(
            f"{prompts} prompts times n = {n} are more than the {limits.choices} answers that one "
            "request may ask for.",
            "n",
        )
    temperature = number(data, "temperature", defaults.temperature, least=0.0, most=2.0)
    top_p = number(data, "top_p", defaults.top_p, least=0.0, most=1.0, above=True)
    top_k = integer(data, "top_k", defaults.top_k, least=0, most=2**31 - 1)
    min_p = number(data, "min_p", defaults.min_p, least=0.0, most=1.0)
    assert temperature is not None and top_p is not None
    assert top_k is not None and min_p is not None
    if temperature < _COLDEST:
        temperature = 0.0
    stream = boolean(data, "stream")
    return Options(
        model=text(data, "model"),
        max_tokens=integer(data, max_tokens, None, least=1, most=limits.new_tokens),
        sampling=Sampling(temperature, top_k, top_p, min_p),
        seed=integer(data, "seed", None, least=-_SEEDS, most=_SEEDS - 1),
        n=n,
        stop=_stop(data.get("stop")),
        stream=stream,
        include_usage=_include_usage(data.get("stream_options"), stream),
    )


def _stop(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise bad_request("stop must be a text, or a list of texts, none of them empty.", "stop")
    if len(strings) > _MOST_STOPS or any(len(s) > _LONGEST_STOP for s in strings):
        raise bad_request(
            f"stop may have {_MOST_STOPS} texts of {_LONGEST_STOP} characters at most.", "stop"
        )
    return tuple(strings)


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise bad_request("stream_options are for stream = true alone.", "stream_options")
    if not isinstance(value, dict):
        raise bad_request("stream_options must be an object.", "stream_options")
    # Obfuscation pads pieces against onlookers of encrypted traffic; here it has no effect.
    check_names(value, ("include_usage", "include_obfuscation"), "stream_options")
    boolean(value, "include_obfuscation")
    return boolean(value, "include_usage")


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Return the prompts of a text, a list of texts, token ids, or a list of lists of them."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if _are_tokens(value):
            return (tuple(value),)
        if all(isinstance(item, list) and _are_tokens(item) for item in value):
            return tuple(tuple(item) for item in value)
    raise bad_request(
        f"prompt must be a text, token ids, or a list of either, not {shown(value)}.", "prompt"
    )


def _are_tokens(value: list[Any]) -> bool:
    return bool(value) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31 for item in value
    )
