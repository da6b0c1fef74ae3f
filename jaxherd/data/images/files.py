"""Read image files; needs the extra `images`.

A file is not trusted: only formats with a decoder of their own in Pillow are tried, and what it
claims to hold is checked before anything is decoded.

Axis letters: Y and X pixels, C colours.
"""

import contextlib
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxherd.core.errors import JaxherdError, missing_extra

# No EPS or PDF, which run an interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that is read: bytes of a file, pixels of an image, of a side, of an animation."""

    file_bytes: int = 256 * 2**20
    pixels: int = 80_000_000
    side: int = 65_500
    animation_pixels: int = 4_000_000_000


def pillow() -> Any:
    """Return Pillow's `Image` module, or raise the error that names the extra."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "images", "reading images") from error
    return Image


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], limits: Limits) -> Iterator[Any]:
    """Give an image file, checked by what it claims and not yet decoded.

    What the decoder raises inside of the block becomes a sentence, too.

    Raises:
      JaxherdError: no such file, no image, cut off, or beyond the limits.
    """
    image_module, name = pillow(), repr(os.fspath(path))
    if not pathlib.Path(path).is_file():
        raise JaxherdError(f"There is no image file {name}: check the path.")
    size = pathlib.Path(path).stat().st_size
    if size > limits.file_bytes:
        raise JaxherdError(
            f"{name} has {size:,} bytes, more than the {limits.file_bytes:,} that are read: shrink it."
        )
    try:
        with warnings.catch_warnings():
            # Pillow warns of the sizes that it thinks hostile; ours are checked below.
            warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
            with image_module.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > limits.pixels or max(width, height) > limits.side:
                    raise JaxherdError(
                        f"{name} claims {width} by {height} pixels, more than the "
                        f"{limits.pixels:,} in all and {limits.side:,} a side that are read: "
                        "shrink it."
                    )
                yield image
    except JaxherdError:
        raise
    except image_module.DecompressionBombError as error:
        raise JaxherdError(f"{name} claims far too many pixels to be read: shrink it.") from error
    except image_module.UnidentifiedImageError as error:
        raise JaxherdError(f"{name} is none of {', '.join(FORMATS)}: convert it.") from error
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error
        reason = str(error).strip().rstrip(".").replace("\n", " ") or type(error).__name__
        raise JaxherdError(f"{name} cannot be decoded as an image ({reason}).") from error


def rgb(image: Any, name: str = "the image") -> UInt8[np.ndarray, "Y X 3"]:
    """Return the colours of a Pillow image, as it is meant to be seen.

    A camera's note on orientation is followed, transparency lies on white (llama4.md 4), and 16
    bits a pixel are scaled to 8.

    Raises:
      JaxherdError: pixels that are no brightness from 0 to a known maximum.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise JaxherdError(
            f"{name} has pixels of kind {image.mode!r}, whose white is not known: save it with 8 bits "
            "a channel."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    return np.array(image.convert("RGB"))


def read_image(
    path: str | os.PathLike[str], *, limits: Limits = Limits()
) -> UInt8[np.ndarray, "Y X 3"]:
    """Return the colours of an image file; of an animation, those of the first frame.

    Raises:
      JaxherdError: no such file, no image, cut off or damaged, beyond the limits, or pixels
        without a known white.
    """
    with opened(path, limits) as image:
        return rgb(image, repr(os.fspath(path)))
