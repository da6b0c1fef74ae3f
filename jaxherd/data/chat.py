"""Chat templates: messages to the prompt text a model was trained on.

The template comes with a checkpoint, so it is untrusted: it runs in Jinja's immutable sandbox,
where it can reach neither attributes of Python objects nor files.
"""

import datetime
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError, missing_extra
from jaxherd.data.chat_parts import (
    ImageTokenIds,
    image_ids,
    is_image,
    parts_of,
    text_of,
    with_parts,
)
from jaxherd.data.llama4_chat import encode_dialog
from jaxherd.data.tokenizers.base import Tokenizer
from jaxherd.data.tokenizers.llama4 import CHAT_FORMAT as LLAMA4


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Render a chat template.

    Args:
        template: Jinja source; `raise_exception`, `strftime_now` and `tojson` are available to it.
        messages: mappings with `role` and `content`.
        add_generation_prompt: end with the opening of the assistant's turn.
        variables: further names for the template (bos_token, tools, ...).

    Raises JaxherdError if the template is invalid, refuses the messages, or leaves the sandbox.
    """
    try:
        import jinja2
        import jinja2.sandbox
        from jinja2.ext import loopcontrols
    except ImportError as error:
        raise missing_extra("jinja2", "text", "A chat template") from error

    for message in messages:
        if "role" not in message or "content" not in message:
            raise JaxherdError(f"A chat message needs a role and a content: {dict(message)!r}.")

    def refuse(reason: str) -> None:
        raise JaxherdError(f"The chat template refuses these messages: {reason}.")

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    # Jinja's own tojson escapes for HTML, which is no part of a prompt.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except jinja2.TemplateError as error:
        raise JaxherdError(f"The chat template failed: {error}.") from error
    except (TypeError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise JaxherdError(f"The chat template does not fit these messages: {error}.") from error


def can_chat(tokenizer: Tokenizer) -> bool:
    """Return whether `encode_chat` knows the format of a tokenizer's chats."""
    return tokenizer.chat_template is not None or _format(tokenizer) is not None


def _format(tokenizer: Tokenizer) -> str | None:
    """Return the chat format that a tokenizer has instead of a template."""
    name = getattr(tokenizer, "chat_format", None)
    if name not in (None, LLAMA4):
        raise JaxherdError(f"The tokenizer has an unknown chat format {name!r}.")
    return name


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    image_token_ids: ImageTokenIds | None = None,
    **variables: Any,
) -> list[int]:
    """Return the prompt's token ids; control tokens come from the template only.

    A tokenizer with a chat format of its own and no template (Llama 4's rank file) is served by
    that format (`jaxherd.data.llama4_chat`), of which `variables` are the options.

    The rendered text is encoded in one piece, as the model was trained.  If a message contains
    the name of a control token, its content is encoded apart and as plain text, so that a user
    cannot end a turn or speak as the system.  The same name inside another field of a message (the
    arguments of a tool call, say) is encoded as plain text as well.

    Args:
      tokenizer: of the model.
      messages: mappings with `role` and `content`, a text or a list of parts, and perhaps `images`
        (`jaxherd.data.chat_parts`).  A template is shown neither images nor a list that has some.
      template: Jinja source; the tokenizer's own when None.
      add_generation_prompt: end with the opening of the assistant's turn.
      image_token_ids: gives the ids of an image part that has none.
      variables: further names for the template (bos_token, tools, ...).
    Raises:
      JaxherdError: there is no template, it does not fit the messages, or shows a message with
        images not exactly once.
    """
    template = template or tokenizer.chat_template
    if template is None and _format(tokenizer) == LLAMA4:
        return encode_dialog(
            tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            image_token_ids=image_token_ids,
            **variables,
        )
    template = _template(tokenizer, template)
    variables = {**_control_tokens(tokenizer), **variables}
    marks = _Marks(tokenizer, image_token_ids)
    rest = render(
        template,
        [marks.disarm(with_parts(message)) for message in messages],
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    if any(rest.count(mark) != 1 for mark in marks.images):
        raise JaxherdError("The chat template does not show each message once: it takes no images.")
    if not marks.ids:
        return tokenizer.encode(rest, parse_special=True)
    ids: list[int] = []
    for part in re.split(f"({marks.pattern})", rest):
        if part in marks.ids:
            ids += marks.ids[part]
        elif part:
            ids += tokenizer.encode(part, parse_special=True)
    return ids


class _Marks:
    """Stand-ins for images and for what must not be read as control tokens.

    They are numbers in brackets, which no filter of a template changes.  The number is drawn anew
    each time, so that no message can contain one by intent.
    """

    def __init__(self, tokenizer: Tokenizer, image_token_ids: ImageTokenIds | None):
        names = sorted(tokenizer.special_tokens(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._tokenizer, self._image_token_ids = tokenizer, image_token_ids
        self._secret = f"{secrets.randbits(64):020d}"
        self.pattern = f"⟦{self._secret}[0-9]+⟧"
        # What each mark stands for, and which of them are images.
        self.ids: dict[str, list[int]] = {}
        self.images: list[str] = []

    def _mark(self, ids: list[int]) -> str:
        mark = f"⟦{self._secret}{len(self.ids)}⟧"
        self.ids[mark] = ids
        return mark

    def disarm(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message without names of control tokens, and without images."""
        clean = {name: self._within(value) for name, value in message.items() if name != "content"}
        content = message.get("content")
        if isinstance(content, str):
            clean["content"] = self._text(content)
        elif any(map(is_image, parts_of(content))):
            clean["content"] = "".join(map(self._part, parts_of(content)))
        elif "content" in message:
            clean["content"] = self._within(content)
        return clean

    def _text(self, text: str) -> str:
        """Return a whole text, or the mark of one that has to be encoded apart."""
        return self._mark(self._tokenizer.encode(text)) if self._special.search(text) else text

    def _part(self, part: Any) -> str:
        if not is_image(part):
            return self._text(text_of(part))
        self.images.append(self._mark(image_ids(part, self._image_token_ids)))
        return self.images[-1]

    def _within(self, value: Any) -> Any:
        if isinstance(value, str):
            encode = self._tokenizer.encode
            return self._special.sub(lambda found: self._mark(encode(found[0])), value)
        if isinstance(value, Mapping):
            return {self._within(k): self._within(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._within(item) for item in value]
        return value


# A private-use character that stands for an answer while the template is asked what follows it.
_ANSWER = "\ue004"


def encode_answer(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    answer: str,
    *,
    template: str | None = None,
    **variables: Any,
) -> list[int]:
    """Return the token ids of the assistant's answer to `messages`, its stop token included.

    `encode_chat(tokenizer, messages)` followed by them is what a model sees that has just given this
    answer: the answer is encoded apart from the prompt, as plain text.  What the template shows
    after the stop token (a line break, often) belongs to the next turn.

    Raises JaxherdError if the template shows the messages otherwise once they are answered, or ends
    an answer with no stop token of the tokenizer.
    """
    if template is None and tokenizer.chat_template is None and _format(tokenizer) == LLAMA4:
        return [*tokenizer.encode(answer), tokenizer.special_tokens()["<|eot|>"]]
    template = _template(tokenizer, template)
    options = {**_control_tokens(tokenizer), **variables}
    opened = render(template, messages, **options)
    answered = [*messages, {"role": "assistant", "content": _ANSWER}]
    whole = render(template, answered, add_generation_prompt=False, **options)
    before, mark, after = whole.partition(_ANSWER)
    if not mark or _ANSWER in after or before != opened:
        raise JaxherdError(
            "The chat template shows these messages otherwise once they are answered, so that no "
            "answer can be learned with it: use a template that only adds the answer."
        )
    closing = tokenizer.encode(after, parse_special=True)
    stops = [place for place, i in enumerate(closing) if i in tokenizer.stop_ids]
    if not stops:
        raise JaxherdError(
            f"The chat template ends an answer with {after!r}, which holds no stop token of the "
            "tokenizer: a model would not learn to stop."
        )
    return tokenizer.encode(answer) + closing[: stops[0] + 1]


def _template(tokenizer: Tokenizer, template: str | None) -> str:
    template = template or tokenizer.chat_template
    if template is None:
        raise JaxherdError("The tokenizer has no chat template: pass template=, or a plain prompt.")
    return template


def _control_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the variables by which templates name the tokens that begin and end text."""
    names = {i: name for name, i in tokenizer.special_tokens().items()}
    roles = (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
    return {role: names.get(i, "") if i is not None else "" for role, i in roles}
