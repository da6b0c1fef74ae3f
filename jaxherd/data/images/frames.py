"""A video as images: some of its frames, evenly in time.

No source says how Llama 4 saw video; here each frame is an image of its own.

Axis letters: Y and X pixels.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from jaxherd.core.errors import JaxherdError
from jaxherd.data.images.files import Limits, opened, rgb

# What an animation that names no duration is shown with, as browsers do.
_UNSAID = 0.1

Frame = TypeVar("Frame")


def frame_indices(
    starts: Sequence[float], duration: float | int, *, fps: float | int, limit: int | None = None
) -> list[int]:
    """Return which frames are seen at the times 0, 1 / fps, 2 / fps, ..., each once.

    More than `limit` of them are thinned evenly, with the first and the last kept (of one, the
    first).

    Args:
      starts: when each frame begins, in seconds, ascending from 0.
      duration: when the last one ends.
      fps: frames a second that are wanted; of a slower video all are taken.
      limit: the most frames; None has no limit.
    Raises:
      JaxherdError: fps or limit that is not positive, or no frame.
    """
    _check(fps, limit)
    if not starts:
        raise JaxherdError("the video holds no frame.")
    ends = [*starts[1:], duration]
    seen = [i for i, (start, end) in enumerate(zip(starts, ends)) if _seen(start, end, fps)]
    return _thinned(seen, limit)


def _seen(start: float, end: float, fps: float | int) -> bool:
    """Return whether some k / fps lies in [start, end), with a microsecond for float sums."""
    return math.ceil((start - 1e-6) * fps) / fps < end - 1e-6


def sample_frames(
    frames: Iterable[Frame], *, source_fps: float | int, fps: float | int, limit: int | None = None
) -> list[Frame]:
    """Return some of a video's frames, as `frame_indices` does for frames `1 / source_fps` apart.

    The frames are read once, in order; those wanted at `fps` are held until the end is known.

    Raises:
      JaxherdError: a rate or limit that is not positive, or no frame.
    """
    _check(fps, limit)
    if source_fps <= 0:
        raise JaxherdError(f"source_fps must be above 0, got {source_fps}.")
    held = [
        frame for i, frame in enumerate(frames) if _seen(i / source_fps, (i + 1) / source_fps, fps)
    ]
    if not held:
        raise JaxherdError("the video holds no frame.")
    return _thinned(held, limit)


def animation_frames(
    path: str | os.PathLike[str],
    *,
    fps: float | int = 1.0,
    limit: int | None = 16,
    limits: Limits = Limits(),
) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """Return frames of an animated GIF, WEBP, PNG or TIFF; a still image is one frame.

    Raises:
      JaxherdError: as `read_image` does, too many frames, or fps or limit that is not positive.
    """
    with opened(path, limits) as image:
        count = getattr(image, "n_frames", 1)
        if count * image.width * image.height > limits.animation_pixels:
            raise JaxherdError(
                f"{os.fspath(path)!r} has {count:,} frames of {image.width} by {image.height} pixels, "
                f"more than the {limits.animation_pixels:,} pixels that are read: cut it."
            )
        starts, end = [], 0.0
        for number in range(count):
            image.seek(number)
            image.load()  # only then does a WEBP tell its duration
            starts.append(end)
            end += _seconds(image)
        found = []
        for number in frame_indices(starts, end, fps=fps, limit=limit):
            image.seek(number)
            found.append(rgb(image, repr(os.fspath(path))))
        return found


def _seconds(image: Any) -> float:
    milliseconds = image.info.get("duration", 0)
    return milliseconds / 1000 if milliseconds else _UNSAID


def _check(fps: float | int, limit: int | None) -> None:
    if not 0 < fps < math.inf or (limit is not None and limit < 1):
        raise JaxherdError(f"fps must be above 0 and limit at least 1, got {fps} and {limit}.")


def _thinned(found: list, limit: int | None) -> list:
    if limit is None or len(found) <= limit:
        return found
    if limit == 1:
        return found[:1]
    last = len(found) - 1
    return [found[round(number * last / (limit - 1))] for number in range(limit)]
