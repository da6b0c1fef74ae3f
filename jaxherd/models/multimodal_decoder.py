"""A decoder that also reads images: Llama 4 with its vision tower (early fusion).

    features = vision_tower(tiles) W
    h = embed(tokens), with the next row of features at each placeholder token
    and on as any decoder

Image tokens are tokens like others: the causal and chunk masks hold for them, nothing is
bidirectional but the tower.  Without images no weight of the tower is touched.

Tiles are [N, Y, X, C], colours last, in [-1, 1]: the next tile fills the next M placeholders, in
the order of the whole batch.  With rows of their own, [B, N, Y, X, C], each row's tiles fill the
row's placeholders and what is left over is padding; this form splits over devices as the rows do.

Axis letters: B batch, T tokens, N tiles, Y and X pixels, C colours, M features of a tile, D width,
G groups of rows that share their features, R features of a group.

Source: llama4.md 4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, split
from jaxherd.layers.linear import Linear
from jaxherd.layers.paged_cache import PageTables
from jaxherd.models.decoder import (
    Decoder,
    DecoderCache,
    DecoderConfig,
    DecoderOutput,
    DecoderPages,
)
from jaxherd.models.vision_tower import VisionTower, VisionTowerConfig

Tiles = Float[Array, "*rows N Y X C"]


@dataclasses.dataclass(frozen=True)
class MultimodalDecoderConfig(DecoderConfig):
    """A decoder with a vision tower.

    Attributes (beyond those of `DecoderConfig`, which describe the text part):
      vision: the tower.
      patch_token: the placeholder whose embedding an image feature replaces.
      image_start_token, image_end_token: stand around an image; they are ordinary tokens and
        decide nothing here.
    """

    vision: VisionTowerConfig = VisionTowerConfig()
    patch_token: int = 200092
    image_start_token: int = 200080
    image_end_token: int = 200081

    @classmethod
    def create(
        cls, text: DecoderConfig, vision: VisionTowerConfig, **tokens: Any
    ) -> "MultimodalDecoderConfig":
        """Return the config of a decoder with this tower; `tokens` are the three ids."""
        fields = {f.name: getattr(text, f.name) for f in dataclasses.fields(DecoderConfig)}
        return cls(**fields, vision=vision, **tokens)

    def text(self) -> DecoderConfig:
        """Return the config of the text part alone."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(DecoderConfig)}
        return DecoderConfig(**fields)

    def build(self, key: jax.Array) -> "MultimodalDecoder":
        """Return the module with freshly drawn parameters."""
        return MultimodalDecoder(self, key=key)

    def num_params(self) -> int:
        """Return the exact number of parameters, tower and projection included."""
        projection = self.vision.output_dim * self.embed_dim
        return super().num_params() + self.vision.num_params() + projection

    def forward_flops(self, batch: int, length: int, tiles: int = 0) -> float:
        """Return FLOPs of one forward pass over `batch` sequences and `tiles` tiles in all."""
        projection = 2.0 * self.vision.features * self.vision.output_dim * self.embed_dim
        of_tiles = self.vision.forward_flops(tiles) + tiles * projection
        return super().forward_flops(batch, length) + of_tiles

    def train_flops(self, batch: int, length: int, tiles: int = 0) -> float:
        """Return FLOPs of one training step: forward, and twice that for the gradient."""
        return 3.0 * self.forward_flops(batch, length, tiles)

    def check_tiles(self, images: Any, dimensions: tuple[int, ...] = (4, 5)) -> None:
        """Raise a JaxherdError unless `images` are tiles of this model, in so many dimensions."""
        side, colours = self.vision.image_size, self.vision.channels
        shape, kind = getattr(images, "shape", ()), getattr(images, "dtype", type(images).__name__)
        fits = len(shape) in dimensions and tuple(shape[-3:]) == (side, side, colours)
        if not fits or not jnp.issubdtype(kind, jnp.floating):
            raise JaxherdError(
                f"images must be tiles [N, {side}, {side}, {colours}] of floats in [-1, 1], not "
                f"{kind} {list(shape)}: make them with jaxherd.data.images."
            )

    def check_images(self, tokens: Any, images: Any) -> None:
        """Raise a JaxherdError unless tiles fit the model and fill the tokens' placeholders.

        Args:
          tokens: [B, T] on the host, or anything numpy can read.
          images: [N, Y, X, C] or [B, N, Y, X, C]; only shape and dtype are looked at.
        """
        self.check_tiles(images)
        shape, each, tokens_BT = images.shape, self.vision.features, np.asarray(tokens)
        counts_B = (tokens_BT == self.patch_token).sum(axis=-1)
        if len(shape) == 4:
            wanted, given = int(counts_B.sum()), shape[0] * each
            if wanted != given:
                raise JaxherdError(
                    f"the tokens hold {wanted} image placeholders and the {shape[0]} tiles fill "
                    f"{given}, {each} each: lay the tokens out with jaxherd.data.images."
                )
            return
        if shape[0] != len(tokens_BT):
            raise JaxherdError(
                f"there are {len(tokens_BT)} rows of tokens and {shape[0]} of tiles."
            )
        bad = np.flatnonzero((counts_B % each != 0) | (counts_B > shape[1] * each))
        if bad.size:
            raise JaxherdError(
                f"row {bad[0]} holds {counts_B[bad[0]]} image placeholders, which up to {shape[1]} "
                f"tiles of {each} do not fill: lay the tokens out with jaxherd.data.images."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """Projected features and the tokens whose embeddings they replace.

    Attributes:
      features_GRD: of G groups of rows; one group for all rows, or as many as rows.
      index_BT: which feature of its group a token takes; -1 keeps its own embedding.  An index
        beyond the features gives NaN, since inside a compiled program nothing can be raised.
    """

    features_GRD: Float[Array, "G R D"]
    index_BT: Int[Array, "B T"]

    def over(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the embeddings with the features in their places."""
        index_GS1 = self.index_BT.reshape(self.features_GRD.shape[0], -1, 1)
        taken_GSD = jnp.take_along_axis(
            self.features_GRD,
            jnp.maximum(index_GS1, 0),
            axis=1,
            mode="fill",
            fill_value=jnp.nan,
        )
        taken_BTD = taken_GSD.reshape(x_BTD.shape).astype(x_BTD.dtype)
        return jnp.where(self.index_BT[:, :, None] >= 0, taken_BTD, x_BTD)


class MultimodalDecoder(Decoder):
    """The model; a `Decoder` in everything, which may be given images."""

    config: MultimodalDecoderConfig

    def __init__(self, config: MultimodalDecoderConfig, *, key: jax.Array):
        super().__init__(config, key=key)
        v, p = jax.random.split(jax.random.fold_in(key, 1))
        self.vision = VisionTower(config.vision, key=v)
        self.projection = Linear(
            config.vision.output_dim, config.embed_dim, (None, "embed"), key=p, std=config.init_std
        )

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        images: Tiles | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return float32 logits.

        Args:
          tokens_BT, positions, segment_ids: as of `Decoder`.
          images: tiles, see the head of this file.
        Raises:
          JaxherdError: tiles that do not fit or do not fill the placeholders.  Where the tokens are
            traced they cannot be counted: call `config.check_images` before; the image rows of
            a wrong count become NaN.
        """
        output = self.forward(
            tokens_BT, images=images, positions=positions, segment_ids=segment_ids
        )
        return self.unembed(output.hidden_BTD)

    def forward(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: DecoderCache | DecoderPages | None = None,
        cache_is_empty: bool = False,
        page_tables: PageTables | None = None,
        remat: str = "none",
        embeddings_BTD: Float[Array, "B T D"] | None = None,
        images: Tiles | None = None,
        features: ImageFeatures | None = None,
    ) -> DecoderOutput:
        """Return hidden states, the updated cache and router statistics.

        Args:
          tokens_BT ... embeddings_BTD: as of `Decoder.forward`; `remat` holds for the tower, too.
          images: tiles that fill the placeholders among these tokens.
          features: in place of images, for tokens that are a piece of a longer prompt.
        """
        if images is not None:
            if not isinstance(tokens_BT, Tracer):
                self.config.check_images(tokens_BT, images)
            features = self.placed(tokens_BT, images, remat=remat)
        if features is not None:
            own_BTD = self.embed(tokens_BT) if embeddings_BTD is None else embeddings_BTD
            embeddings_BTD = features.over(own_BTD)
        return super().forward(
            tokens_BT,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            cache_is_empty=cache_is_empty,
            page_tables=page_tables,
            remat=remat,
            embeddings_BTD=embeddings_BTD,
        )

    def project(
        self, tiles_NYXC: Float[Array, "N Y X C"], *, remat: str = "none"
    ) -> Float[Array, "N M D"]:
        """Return what stands for these tiles among the embeddings of tokens."""
        return self.projection(self.vision(tiles_NYXC, remat=remat))

    def placed(
        self, tokens_BT: Int[Array, "B T"], images: Tiles, *, remat: str = "none"
    ) -> ImageFeatures:
        """Return the features of tiles, in order at the placeholders of the tokens."""
        own = images.ndim == 5
        groups, tiles = (images.shape[0] if own else 1), images.reshape(-1, *images.shape[-3:])
        features_NMD = self.project(tiles, remat=remat)
        features_GRD = features_NMD.reshape(groups, -1, features_NMD.shape[-1])
        is_patch_GS = (tokens_BT == self.config.patch_token).reshape(groups, -1)
        order_GS = jnp.cumsum(is_patch_GS, axis=1, dtype=jnp.int32)
        count_G1, available = order_GS[:, -1:], features_GRD.shape[1]
        sound_G1 = count_G1 <= available if own else count_G1 == available
        index_GS = jnp.where(sound_G1, order_GS - 1, available)
        index_GS = jnp.where(is_patch_GS, index_GS, -1)
        return ImageFeatures(features_GRD, index_GS.reshape(tokens_BT.shape))


def text_part(module: MultimodalDecoder) -> Decoder:
    """Return the decoder alone, with the same parameters."""
    definition, params, buffers = split(abstract(module.config.text().build, jax.random.key(0)))
    _, whole, whole_buffers = split(module)
    return definition.merge(
        {name: whole[name] for name in params}, {name: whole_buffers[name] for name in buffers}
    )
