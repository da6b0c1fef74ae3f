"""The parts of a chat message whose content is more than one text.

A content is a text, or a list of `{"type": "text", "text": ...}` and `{"type": "image", ...}`.  An
image part holds the ids that stand for the image as `token_ids`, or whatever the `ImageTokenIds`
that goes with it reads.  A message may have `images` besides, the ids of each image, which go
before its content.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError

# From an image part to the ids that stand for the image in the prompt.
ImageTokenIds = Callable[[Mapping[str, Any]], Sequence[int]]


def with_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose `images` are parts of its content."""
    plain = dict(message)
    before = [{"type": "image", "token_ids": ids} for ids in plain.pop("images", None) or ()]
    if before:
        content = plain.get("content", "")
        after = list(parts_of(content)) or [{"type": "text", "text": content}]
        plain["content"] = [*before, *after]
    return plain


def parts_of(content: Any) -> Sequence[Any]:
    """Return the parts of a content that is a list of them, else none."""
    return content if isinstance(content, list | tuple) else ()


def is_image(part: Any) -> bool:
    """Return whether a part is an image."""
    return isinstance(part, Mapping) and part.get("type") == "image"


def text_of(part: Any) -> str:
    """Return the text of a part that is one.

    Raises:
      JaxherdError: it is none.
    """
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise JaxherdError("a part of a message's content is neither a text nor an image.")
    return text


def image_ids(part: Mapping[str, Any], image_token_ids: ImageTokenIds | None) -> list[int]:
    """Return the ids that stand for an image part.

    Raises:
      JaxherdError: nothing gives them.
    """
    ids = part.get("token_ids")
    if ids is None and image_token_ids is not None:
        ids = image_token_ids(part)
    if ids is None:
        raise JaxherdError("a message has an image and nothing that gives the image's tokens.")
    return [int(i) for i in ids]
