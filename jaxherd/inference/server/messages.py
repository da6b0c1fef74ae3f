"""The `messages` of a chat request: roles, content parts, tool calls.

What comes out is what `jaxherd.data.chat.encode_chat` takes: `content` is a text, or a list of
`{"type": "text", "text": ...}` and `{"type": "image", "image": InlineImage}` if there are images.
Texts of one message are joined with nothing between.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxherd.core.errors import nearest
from jaxherd.inference.server.errors import bad_request
from jaxherd.inference.server.fields import shown
from jaxherd.inference.server.images import InlineImage, read_data_url
from jaxherd.inference.server.limits import Limits

# `developer` is OpenAI's newer word for the system's role; templates know the older one.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal")


def read_messages(value: Any, limits: Limits) -> list[dict[str, Any]]:
    """Return the messages of a request.

    Raises:
      ApiError: it names the message and what is wrong with it.
    """
    if not isinstance(value, list) or not value:
        raise bad_request("messages must be a list with at least one message.", "messages")
    budget = _Images(limits)
    return [_message(message, f"messages[{i}]", budget) for i, message in enumerate(value)]


def images_of(messages: list[dict[str, Any]]) -> list[InlineImage]:
    """Return the images of all messages in their order."""
    parts = (part for m in messages if isinstance(m["content"], list) for part in m["content"])
    return [part["image"] for part in parts if part["type"] == "image"]


class _Images:
    """Counts the images of a request while they are read."""

    def __init__(self, limits: Limits):
        self._limits, self._count = limits, 0

    def read(self, url: str) -> InlineImage:
        self._count += 1
        if self._count > self._limits.images:
            raise bad_request(
                f"a request may have {self._limits.images} images at most.",
                "messages",
                "too_many_images",
            )
        return read_data_url(url, self._limits.image_bytes)


def _message(message: Any, where: str, images: _Images) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise bad_request(f"{where} must be an object, not {shown(message)}.", where)
    for name in message:
        if name not in _FIELDS and message[name] is not None:
            raise bad_request(
                f"{where} has no field {name[:60]!r}: {nearest(name, _FIELDS)}", where
            )
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_request(
            f"{where}.role is {shown(role)}: {nearest(str(role)[:60], ROLES)}", f"{where}.role"
        )
    read: dict[str, Any] = {"role": ROLES[role]}
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            if not isinstance(message[name], str):
                raise bad_request(f"{where}.{name} must be a text.", f"{where}.{name}")
            read[name] = message[name]
    if message.get("tool_calls"):
        if role != "assistant":
            raise bad_request(f"{where}: only the assistant has tool_calls.", f"{where}.tool_calls")
        read["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    if message.get("refusal") is not None:
        raise bad_request(f"{where}.refusal is not served: write it as content.", where)
    content = message.get("content")
    if content is None and "tool_calls" in read:
        content = ""
    read["content"] = _content(content, f"{where}.content", images)
    return read


def _content(content: Any, where: str, images: _Images) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_request(f"{where} must be a text or a list of parts.", where)
    parts = [_part(part, f"{where}[{i}]", images) for i, part in enumerate(content)]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _part(part: Any, where: str, images: _Images) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{where}.text must be a text.", where)
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        link = part.get("image_url")
        url = link.get("url") if isinstance(link, Mapping) else None
        if not isinstance(url, str):
            raise bad_request(f"{where}.image_url must be an object with a url.", where)
        return {"type": "image", "image": images.read(url)}
    raise bad_request(
        f"{where} is no part that this server reads: its type must be text or image_url.", where
    )


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls with their arguments as objects, as chat templates take them."""
    if not isinstance(calls, list):
        raise bad_request(f"{where} must be a list.", where)
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise bad_request(f"{where} must have a function with a name.", where)
    try:
        arguments = json.loads(function.get("arguments", "{}"))
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(
            f"{where}.function.arguments must be JSON of an object, as a text.", where
        )
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return read | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})
