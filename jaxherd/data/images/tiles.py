"""Llama 4's tiles: an image of any size as squares of one size, and a small view of the whole.

1. A canvas of R by C tiles is chosen, R C <= max_tiles: the one that asks for the least enlarging,
   or if none holds the image, for the least shrinking; of equals the smallest.
2. The image is resized to fit, its aspect kept, but enlarged to one tile at most, and put into the
   top left corner; the rest is black.
3. The canvas is cut row by row.  If it is more than one tile, the whole image, stretched to one
   tile, comes last.

Resizing is Pillow's bilinear filter, which covers as many pixels as become one: what Meta's code
does.  Colours become (x / 255 - 0.5) / 0.5 in float32.

Axis letters: N tiles, Y and X pixels, C colours.

Source: llama4.md 4.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from jaxherd.core.errors import JaxherdError
from jaxherd.data.images.files import pillow


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The side of a tile in pixels, and the most tiles of a canvas."""

    tile_size: int = 336
    max_tiles: int = 16

    def __post_init__(self):
        if self.tile_size < 1 or self.max_tiles < 1:
            raise JaxherdError(
                f"tile_size and max_tiles must be at least 1, got {self.tile_size} and "
                f"{self.max_tiles}."
            )


@functools.cache
def canvases(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return every (rows, columns) of at most so many tiles, the smallest area first."""
    sides = range(1, max_tiles + 1)
    found = [(r, c) for r in sides for c in sides if r * c <= max_tiles]
    return tuple(sorted(found, key=lambda canvas: (canvas[0] * canvas[1], canvas)))


def choose_canvas(height: int, width: int, tiling: Tiling = Tiling()) -> tuple[int, int]:
    """Return (rows, columns) of the canvas for an image.

    Fractions are compared, not floats: equal scales are equal.
    """
    options = canvases(tiling.max_tiles)
    scales = [
        min(Fraction(r * tiling.tile_size, height), Fraction(c * tiling.tile_size, width))
        for r, c in options
    ]
    enlarging = [scale for scale in scales if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales)
    # The smallest area comes first.
    return options[scales.index(chosen)]


def fitted_size(height: int, width: int, tiling: Tiling = Tiling()) -> tuple[int, int]:
    """Return (height, width) that the image is resized to inside of its canvas."""
    rows, columns = choose_canvas(height, width, tiling)
    tile = tiling.tile_size
    most_y = min(max(height, tile), rows * tile)
    most_x = min(max(width, tile), columns * tile)
    # In floats as published: where a side falls on a whole number, rounding decides.
    scale_y, scale_x = most_y / height, most_x / width
    if scale_x < scale_y:
        return max(min(math.floor(height * scale_x), most_y), 1), most_x
    return most_y, max(min(math.floor(width * scale_y), most_x), 1)


def tile_pixels(
    image_YXC: UInt8[np.ndarray, "Y X 3"], tiling: Tiling = Tiling()
) -> tuple[UInt8[np.ndarray, "N S S 3"], tuple[int, int]]:
    """Return (tiles of whole levels, (rows, columns)): `tile_image` before the colours are scaled."""
    image_module = pillow()
    height, width = image_YXC.shape[:2]
    if not height or not width:
        raise JaxherdError(f"an image of {width} by {height} pixels holds nothing.")
    side, (rows, columns) = tiling.tile_size, choose_canvas(height, width, tiling)
    image = image_module.fromarray(image_YXC)

    def resized(height: int, width: int) -> np.ndarray:
        return np.asarray(image.resize((width, height), image_module.Resampling.BILINEAR))

    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    new_height, new_width = fitted_size(height, width, tiling)
    canvas[:new_height, :new_width] = resized(new_height, new_width)
    tiles = rearrange(canvas, "(r y) (c x) C -> (r c) y x C", y=side, x=side)
    if rows * columns > 1:
        tiles = np.concatenate([tiles, resized(side, side)[None]])
    return tiles, (rows, columns)


def normalise(levels: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return colours in [-1, 1] of levels from 0 to 255, in float32."""
    return (levels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def tile_image(
    image_YXC: UInt8[np.ndarray, "Y X 3"], tiling: Tiling = Tiling()
) -> tuple[Float[np.ndarray, "N S S 3"], tuple[int, int]]:
    """Return (tiles with colours in [-1, 1], (rows, columns) of the canvas).

    R C tiles row by row; if there are several, one of the whole image after them.

    Raises:
      JaxherdError: an image without pixels.
    """
    levels, canvas = tile_pixels(image_YXC, tiling)
    return normalise(levels), canvas
