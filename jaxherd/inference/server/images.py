"""Images in chat messages: inside the request as `data:` URLs, never fetched from elsewhere."""

import base64
import binascii
import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxherd.inference.server.errors import ApiError, bad_request

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")

_DATA_URL = re.compile(r"data:([a-zA-Z0-9.+-]+/[a-zA-Z0-9.+-]+);base64,")


@dataclasses.dataclass(frozen=True)
class InlineImage:
    """The file of an image as a request carried it; not decoded."""

    media_type: str
    data: bytes = dataclasses.field(repr=False)


@runtime_checkable
class ImageReader(Protocol):
    """What a model that sees must offer."""

    def image_token_ids(self, image: InlineImage) -> Sequence[int]:
        """Return the ids that stand for an image in the prompt, or raise ApiError."""
        ...


class NoImages:
    """The reader of a model that sees nothing."""

    def image_token_ids(self, image: InlineImage) -> Sequence[int]:
        """Raise ApiError."""
        raise bad_request(
            "this model reads no images: send text alone.", "messages", "images_not_supported"
        )


def read_data_url(url: str, limit: int) -> InlineImage:
    """Return the image inside a `data:` URL.

    Args:
      limit: of the decoded file in bytes.
    Raises:
      ApiError: another kind of URL, a media type that is no image, broken base64, or too large
        (413, before decoding).
    """
    match = _DATA_URL.match(url)
    if match is None:
        raise bad_request(
            "an image must be a 'data:image/...;base64,...' URL: this server fetches nothing.",
            "messages",
            "invalid_image_url",
        )
    media_type = match[1].lower()
    if media_type not in MEDIA_TYPES:
        raise bad_request(
            f"an image must be one of {', '.join(MEDIA_TYPES)}, not {media_type[:40]}.",
            "messages",
            "invalid_image_format",
        )
    coded = url[match.end() :]
    if len(coded) * 3 // 4 > limit + 2:
        raise _too_large(limit)
    try:
        data = base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("an image's base64 is broken.", "messages", "invalid_image") from None
    if len(data) > limit:
        raise _too_large(limit)
    if not data:
        raise bad_request("an image is empty.", "messages", "invalid_image")
    return InlineImage(media_type, data)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"an image is larger than the {limit} bytes that this server takes.",
        param="messages",
        code="image_too_large",
    )
