"""Images of requests: checked on the host, encoded once, handed out to pieces of the prompts.

Axis letters: N tiles, Y and X pixels, C colours, M features of a tile, R features in all, D width,
B rows, T tokens of a piece.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxherd.core.errors import JaxherdError
from jaxherd.inference.requests import Request, bucket
from jaxherd.models.decoder import Decoder
from jaxherd.models.multimodal_decoder import (
    ImageFeatures,
    MultimodalDecoder,
    MultimodalDecoderConfig,
)

# Tiles that go through the tower together, at most.
_TILES = 8


def check_images(config: Any, request: Request) -> None:
    """Raise a JaxherdError unless the request's tiles fit the model and fill its placeholders.

    Args:
      config: of the model.
      request: with or without images.
    """
    if not isinstance(config, MultimodalDecoderConfig):
        if request.images is not None:
            raise JaxherdError("this model does not read images: leave them away.")
        return
    if request.images is not None:
        config.check_tiles(request.images, (4,))
        config.check_images(np.asarray(request.tokens)[None], request.images)
        return
    placeholders = request.tokens.count(config.patch_token)
    if placeholders:
        raise JaxherdError(
            f"the prompt holds {placeholders} image placeholders (token {config.patch_token}) and "
            "there are no images: give the tiles."
        )


@jax.jit
def _encode(module: Any, tiles_NYXC: Float[Array, "N Y X C"]) -> Float[Array, "N M D"]:
    return module.project(tiles_NYXC)


@dataclasses.dataclass(frozen=True)
class PromptImages:
    """The encoded images of a batch of prompts.

    Attributes:
      features_RD: of all rows, one after the other, up to a power of two of tiles.
      index: for each row, which feature every token takes, -1 for none.
    """

    features_RD: jax.Array
    index: tuple[np.ndarray, ...]

    @classmethod
    def encode(cls, module: Decoder, requests: Sequence[Request]) -> "PromptImages | None":
        """Return the encoded images of checked requests; None if there are none.

        Tiles go through the tower by powers of two, eight at most, so that few programs are
        compiled whatever the images.
        """
        given = [r.images for r in requests if r.images is not None]
        if not given or not isinstance(module, MultimodalDecoder):
            return None
        tiles_NYXC = np.concatenate([np.asarray(images, np.float32) for images in given])
        features, total = [], bucket(len(tiles_NYXC), 1)
        for begin in range(0, total, _TILES):
            group = tiles_NYXC[begin : begin + _TILES]
            size = min(_TILES, total)
            padding = [(0, size - len(group)), (0, 0), (0, 0), (0, 0)]
            if len(group):
                features.append(_encode(module, jnp.asarray(np.pad(group, padding))))
            else:
                features.append(jnp.zeros_like(features[0]))
        features_RD = jnp.concatenate(features).reshape(-1, module.config.embed_dim)
        index, taken = [], 0
        for request in requests:
            is_patch = np.asarray(request.tokens) == module.config.patch_token
            index.append(np.where(is_patch, taken + np.cumsum(is_patch) - 1, -1).astype(np.int32))
            taken += int(is_patch.sum())
        return cls(features_RD, tuple(index))

    def piece(self, begin: int, length: int, width: int) -> ImageFeatures:
        """Return the features of tokens `begin` to `begin + length` of every row, as [B, width]."""
        index_BT = np.full((len(self.index), width), -1, np.int32)
        for row, whole in enumerate(self.index):
            part = whole[begin : begin + length]
            index_BT[row, : len(part)] = part
        return ImageFeatures(self.features_RD[None], jnp.asarray(index_BT))
