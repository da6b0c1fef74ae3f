"""Chat templates: messages to the prompt text a model was trained on.

The template comes with a checkpoint, so it is untrusted: it runs in Jinja's immutable sandbox,
where it can reach neither attributes of Python objects nor files.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError, missing_extra
from jaxherd.data.tokenizers.base import Tokenizer


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


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Return the prompt's token ids; control tokens come from the template only.

    The rendered text is encoded in one piece, as the model was trained.  If a message contains
    the name of a control token, its content is encoded apart and as plain text, so that a user
    cannot end a turn or speak as the system.  The token ids in a message's `images` (one list an
    image, `jaxherd.data.images`) go before its content; the template does not see them.
    """
    template = _template(tokenizer, template)
    special = tokenizer.special_tokens()
    options = {
        "add_generation_prompt": add_generation_prompt,
        **_control_tokens(tokenizer),
        **variables,
    }
    # Private-use characters mark where ids go that are not the rendered text's.
    marks: dict[str, list[int]] = {}
    marked, pictures = [], []
    for number, message in enumerate(messages):
        message = dict(message)
        if any(name in str(message.get("content")) for name in (*special, "\ue001")):
            mark = f"\ue000{number}\ue001"
            marks[mark] = tokenizer.encode(str(message["content"]))
            message["content"] = mark
        images = message.pop("images", ())
        if images:
            mark = f"\ue002{number}\ue001"
            marks[mark] = [i for image in images for i in image]
            message["content"] = mark + str(message.get("content", ""))
            pictures.append(mark)
        marked.append(message)
    rest = render(template, marked, **options)
    if any(rest.count(mark) != 1 for mark in pictures):
        raise JaxherdError("The chat template does not show each message once: it takes no images.")
    ids: list[int] = []
    while rest:
        places = [(rest.find(mark), mark) for mark in marks if mark in rest]
        if not places:
            break
        at, mark = min(places)
        ids += tokenizer.encode(rest[:at], parse_special=True) if at else []
        ids += marks[mark]
        rest = rest[at + len(mark) :]
    return ids + (tokenizer.encode(rest, parse_special=True) if rest else [])


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
