"""Llama 4's chat format: messages to token ids (llama4.md 5).

    begin_of_text, then for each message
    header_start ROLE header_end "\\n\\n" CONTENT eot
    and, for the model to answer: header_start "assistant" header_end "\\n\\n"

Text is encoded piece by piece and always as text, so that nothing in a message can end a turn.

Two styles differ where tools are used, and in what is encoded together:

- "meta", that of Meta's own code: the result of a tool has the role `ipython`, its content as it
  is, and ends with eom; so does a message of the assistant with tool calls.  Header, texts and
  calls are encoded apart.
- "hf", that of the chat template in transformers: the result of a tool is written as JSON and ends
  with eot; tool calls are JSON behind an empty or other content between python_start and
  python_end, and end with eot.  The first message loses its outer white space if it is the
  system's.  What stands between two control tokens is encoded together.  (The template would take
  the name of a control token in a message for the token; here it stays text.  The template can
  write definitions of tools into the first message; here the caller does.)
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.chat_parts import (
    ImageTokenIds,
    image_ids,
    is_image,
    parts_of,
    text_of,
    with_parts,
)
from jaxherd.data.pythonic_calls import ToolCall, format_tool_calls
from jaxherd.data.tokenizers.base import Tokenizer

STYLES, CALL_FORMATS = ("meta", "hf"), ("pythonic", "json")

_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "ipython": "ipython",
}


def encode_dialog(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    image_token_ids: ImageTokenIds | None = None,
    style: str = "meta",
    call_format: str = "pythonic",
) -> list[int]:
    """Return the prompt's token ids.

    Args:
      tokenizer: with Llama 4's control tokens.
      messages: mappings with `role` (system, user, assistant, tool) and `content`, a text or a
        list of parts (`chat_parts`), and perhaps `images` before it.  The assistant's may have `tool_calls`, each `{"name": ..., "arguments": {...}}` or OpenAI's
        `{"function": {...}}`, and `end_of_message`: true, which in style "meta" ends it with eom.
      add_generation_prompt: end with the header of the assistant's turn.
      image_token_ids: gives the ids of an image part that has none; from image_start to image_end.
      style: "meta" or "hf", see above.
      call_format: of tool calls in style "meta": "pythonic", one list as the instruct models write
        it, or "json", one object a call.  Style "hf" has its own.
    Raises:
      JaxherdError: it names the message and what is wrong with it.
    """
    options = ("style", style, STYLES), ("call format", call_format, CALL_FORMATS)
    for name, value, known in options:
        if value not in known:
            raise JaxherdError(
                f"Llama 4's chats have no {name} {value!r}: {nearest(str(value), known)}"
            )
    writer = _Writer(tokenizer, image_token_ids, together=style == "hf")
    writer.control("begin_of_text")
    for number, message in enumerate(map(with_parts, messages)):
        try:
            if style == "hf":
                _hf_message(writer, message, first=number == 0)
            else:
                _meta_message(writer, message, call_format)
        except JaxherdError as error:
            raise JaxherdError(f"message {number + 1} of the chat: {error}") from None
    if add_generation_prompt:
        _header(writer, "assistant")
    return writer.finish()


class _Writer:
    """Collects ids; `together` encodes all text between two control tokens in one piece."""

    def __init__(self, tokenizer: Tokenizer, images: ImageTokenIds | None, *, together: bool):
        self._tokenizer, self._images, self._together = tokenizer, images, together
        self._special = tokenizer.special_tokens()
        self._ids: list[int] = []
        self._text = ""

    def _flush(self) -> None:
        if self._text:
            self._ids += self._tokenizer.encode(self._text)
            self._text = ""

    def _id(self, name: str) -> int:
        found = self._special.get(f"<|{name}|>")
        if found is None:
            raise JaxherdError(f"the tokenizer has no token <|{name}|>, so it is not Llama 4's.")
        return found

    def control(self, name: str) -> None:
        """Add a control token."""
        self._flush()
        self._ids.append(self._id(name))

    def text(self, text: str) -> None:
        """Add text."""
        self._text += text
        if not self._together:
            self._flush()

    def content(self, content: Any) -> None:
        """Add a content with its images.

        Raises:
          JaxherdError: it is none, or has an image that nobody lays out.
        """
        if isinstance(content, str):
            self.text(content)
            return
        if not isinstance(content, list | tuple):
            raise JaxherdError("its content must be a text or a list of parts.")
        for part in parts_of(content):
            if is_image(part):
                self._flush()
                self._ids += self._image(part)
            else:
                self.text(text_of(part))

    def _image(self, part: Mapping[str, Any]) -> list[int]:
        ids = image_ids(part, self._images)
        if [*ids[:1], *ids[-1:]] != [self._id("image_start"), self._id("image_end")]:
            raise JaxherdError("an image's tokens must go from image_start to image_end.")
        return ids

    def finish(self) -> list[int]:
        """Return all ids."""
        self._flush()
        return self._ids


def _header(writer: _Writer, role: str) -> None:
    writer.control("header_start")
    writer.text(role)
    writer.control("header_end")
    writer.text("\n\n")


def _role(message: Mapping[str, Any]) -> str:
    role = message.get("role")
    if role not in _ROLES:
        raise JaxherdError(f"its role is {role!r}: {nearest(str(role), _ROLES)}")
    if message.get("tool_calls") and role != "assistant":
        raise JaxherdError("only the assistant has tool_calls.")
    return _ROLES[role]


def _meta_message(writer: _Writer, message: Mapping[str, Any], call_format: str) -> None:
    role, calls = _role(message), _calls(message)
    _header(writer, role)
    writer.content(_content(message, calls))
    if calls and call_format == "pythonic":
        writer.text(format_tool_calls(calls))
    for call in calls if call_format == "json" else ():
        parameters = {"type": "function", "name": call.name, "parameters": dict(call.arguments)}
        writer.text(json.dumps(parameters))
    goes_on = role == "ipython" or (role == "assistant" and message.get("end_of_message"))
    writer.control("eom" if calls or goes_on else "eot")


def _hf_message(writer: _Writer, message: Mapping[str, Any], *, first: bool) -> None:
    role, calls = _role(message), _calls(message)
    content = _content(message, calls)
    _header(writer, role)
    if calls:
        writer.control("python_start")
        writer.content(content)
        writer.control("python_end")
        for call in calls:
            arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
            writer.text(f'{{"name": "{call.name}", "parameters": {arguments}}}')
    elif role == "ipython":
        writer.text(json.dumps(content, ensure_ascii=False))
    elif role == "system" and first:
        writer.text(_only_text(content).strip())
    else:
        writer.content(content)
    writer.control("eot")


def _only_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(is_image(part) for part in parts_of(content)):
        raise JaxherdError("a system message has no images.")
    return "".join(map(text_of, parts_of(content)))


def _content(message: Mapping[str, Any], calls: Sequence[ToolCall]) -> Any:
    content = message.get("content")
    return "" if content is None and calls else content


def _calls(message: Mapping[str, Any]) -> list[ToolCall]:
    found = []
    for call in message.get("tool_calls") or ():
        if isinstance(call, ToolCall):
            found.append(call)
            continue
        inner = call.get("function", call) if isinstance(call, Mapping) else {}
        name, arguments = inner.get("name"), inner.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise JaxherdError("a tool call needs a name and an object of arguments.")
        found.append(ToolCall(name, arguments))
    return found
