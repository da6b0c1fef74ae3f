"""From image files to what a prompt needs: token ids and tiles."""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from jaxherd.data.images.files import Limits, read_image
from jaxherd.data.images.layout import ImageTokens, image_tokens
from jaxherd.data.images.tiles import Tiling, tile_image

Image = str | os.PathLike[str] | UInt8[np.ndarray, "Y X 3"]


def prepare_images(
    images: Sequence[Image],
    tokens: ImageTokens,
    *,
    features: int = 144,
    tiling: Tiling = Tiling(),
    limits: Limits = Limits(),
) -> tuple[list[list[int]], Float[np.ndarray, "N S S 3"]]:
    """Return (token ids of each image, the tiles of all in the same order).

    The ids go into a prompt (`encode_chat` takes them with a message), the tiles beside it
    (`jaxherd.generate(..., images=tiles)`).

    Args:
      images: files, or colours [Y, X, 3] from 0 to 255 (frames of a video).
      tokens: ids of the control tokens, `ImageTokens.of(tokenizer)`.
      features: placeholders of a tile, `config.vision.features`.
      tiling: side of a tile, `config.vision.image_size`, and the most tiles of an image.
      limits: what is read of a file.
    Raises:
      JaxherdError: a file that cannot be read, or an image that holds nothing.
    """
    ids, tiles = [], [np.zeros((0, tiling.tile_size, tiling.tile_size, 3), np.float32)]
    for image in images:
        colours = image if isinstance(image, np.ndarray) else read_image(image, limits=limits)
        of_image, (rows, columns) = tile_image(colours, tiling)
        ids.append(image_tokens(rows, columns, features, tokens))
        tiles.append(of_image)
    return ids, np.concatenate(tiles)
