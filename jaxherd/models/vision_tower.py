"""The vision tower of Llama 4: a tile of a picture in, some vectors of the text model's making out.

    x = norm([unfold(tile) W; class] + positions)
    for each layer: x += attention(norm(x)); x += down(gelu(up(norm(x))))
    states = norm(x), without the class token
    features = gelu(gelu(shuffle(states) W1) W2)

The class token comes last.  Attention is bidirectional with biases; queries and keys are rotated by
column in the first half of a head's pairs and by row in the second, the class token not at all.
`shuffle` joins blocks of neighbouring patches into one longer vector.

Axis letters: N tiles, Y and X pixels, C colours, P patches, T = P + 1 tokens, D width, F hidden
width, M features of a tile, E their width.

Source: llama4.md 4.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxherd.core.modules import Module, parameter, stacked
from jaxherd.core.remat import checkpointed
from jaxherd.core.sharding import shard
from jaxherd.layers.attention import Attention, AttentionConfig, SequenceInfo
from jaxherd.layers.layer_norm import LayerNorm
from jaxherd.layers.linear import Linear, normal
from jaxherd.layers.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class VisionTowerConfig:
    """A vision tower with its adapter; the defaults are those of Scout and Maverick.

    Attributes:
      image_size, patch_size: sides of a tile and of a patch, in pixels.
      channels: C.
      embed_dim, num_layers, num_heads, hidden_dim: D, depth, heads and F.
      shuffle: so many patches along each side become one feature (the inverse of the published
        "pixel shuffle ratio").
      output_dim: E, the width of both layers of the adapter.
      rope_theta: of the rotations by column and row.
      norm_eps: of the layer norms.
      init_std: of all matrices; what Meta started from is not disclosed.
      attention_implementation: see `jaxherd.kernels.attention`.
    """

    image_size: int = 336
    patch_size: int = 14
    channels: int = 3
    embed_dim: int = 1408
    num_layers: int = 34
    num_heads: int = 16
    hidden_dim: int = 5632
    shuffle: int = 2
    output_dim: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    attention_implementation: str | None = None

    def __post_init__(self):
        if self.image_size % self.patch_size or self.grid % self.shuffle:
            raise ValueError(
                f"a tile of {self.image_size} pixels must split into patches of {self.patch_size}, "
                f"and those into blocks of {self.shuffle}"
            )
        if self.embed_dim % self.num_heads or self.attention.head_dim % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} must split into {self.num_heads} heads whose size is "
                "a multiple of 4, to turn by column and by row"
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def features(self) -> int:
        """M, features of a tile: the text tokens that it stands for."""
        return (self.grid // self.shuffle) ** 2

    @property
    def patch_dim(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.patch_size**2

    @property
    def attention(self) -> AttentionConfig:
        """The attention of every layer."""
        return AttentionConfig(
            self.num_heads,
            self.num_heads,
            self.embed_dim // self.num_heads,
            kind="bidirectional",
            rope=RopeConfig(self.rope_theta),
            qkv_bias=True,
            out_bias=True,
        )

    def build(self, key: jax.Array) -> "VisionTower":
        """Return the module with freshly drawn parameters."""
        return VisionTower(self, key=key)

    def num_params(self) -> int:
        """Return the exact number of parameters."""
        d, f, e = self.embed_dim, self.hidden_dim, self.output_dim
        layer = self.attention.num_params(d) + 2 * d * f + f + d + 2 * 2 * d
        tokens = (self.patch_dim + 1 + self.grid**2 + 1) * d
        adapter = d * self.shuffle**2 * e + e * e
        return tokens + self.num_layers * layer + 2 * 2 * d + adapter

    def forward_flops(self, tiles: int) -> float:
        """Return FLOPs of a forward pass over `tiles` tiles, two per multiply-add."""
        d, f, e, patches = self.embed_dim, self.hidden_dim, self.output_dim, self.grid**2
        layer = 2.0 * (patches + 1) * (4 * d * d + 2 * d * f)
        layer += self.attention.score_flops(patches + 1)
        adapter = 2.0 * self.features * (d * self.shuffle**2 * e + e * e)
        return tiles * (2.0 * patches * self.patch_dim * d + self.num_layers * layer + adapter)

    def train_flops(self, tiles: int) -> float:
        """Return FLOPs of a training step: forward, and twice that for the gradient."""
        return 3.0 * self.forward_flops(tiles)


def unfold(tiles_NYXC: Float[Array, "N Y X C"], patch_size: int) -> Float[Array, "N P CyCx"]:
    """Return the patches of each tile, row by row; a patch lists its first colour, row by row."""
    return rearrange(tiles_NYXC, "N (i y) (j x) C -> N (i j) (C y x)", y=patch_size, x=patch_size)


def shuffle_patches(states_NPD: Float[Array, "N P D"], block: int) -> Float[Array, "N M BBD"]:
    """Return one vector for each block of `block` by `block` patches, row by row.

    It is the patches of the block one after the other: top left, top right, bottom left, ...
    """
    side = round(states_NPD.shape[1] ** 0.5)
    return rearrange(
        states_NPD, "N (i y j x) D -> N (i j) (y x D)", i=side // block, y=block, x=block, j=side // block
    )  # fmt: skip


class VisionBlock(Module):
    """One pre-norm layer."""

    def __init__(self, config: VisionTowerConfig, *, key: jax.Array):
        a, u, w = jax.random.split(key, 3)
        d, f, std = config.embed_dim, config.hidden_dim, config.init_std
        self.attention_norm = LayerNorm(d, config.norm_eps)
        self.attention = Attention(config.attention, d, key=a, std=std)
        self.feed_forward_norm = LayerNorm(d, config.norm_eps)
        self.up = Linear(d, f, ("embed", "mlp"), key=u, bias=True, std=std)
        self.down = Linear(f, d, ("mlp", "embed"), key=w, bias=True, std=std)

    def __call__(
        self, x_NTD: Float[Array, "N T D"], info: SequenceInfo, implementation: str | None
    ) -> Float[Array, "N T D"]:
        """Return the residual stream after this layer."""
        attended_NTD, _ = self.attention(
            self.attention_norm(x_NTD), info, implementation=implementation
        )
        x_NTD = _residual(x_NTD + checkpoint_name(attended_NTD, "attention_out"))
        hidden_NTF = shard(self.up(self.feed_forward_norm(x_NTD)), "batch", None, "act_mlp")
        return _residual(x_NTD + self.down(jax.nn.gelu(hidden_NTF, approximate=False)))


class Adapter(Module):
    """Two matrices without biases, an exact GELU after each, also after the last."""

    def __init__(self, config: VisionTowerConfig, *, key: jax.Array):
        u, w = jax.random.split(key)
        d, e, std = config.embed_dim * config.shuffle**2, config.output_dim, config.init_std
        self.up = Linear(d, e, ("embed", "mlp"), key=u, std=std)
        self.down = Linear(e, e, ("mlp", "embed"), key=w, std=std)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """Return the features."""
        hidden = jax.nn.gelu(self.up(x), approximate=False)
        return jax.nn.gelu(self.down(hidden), approximate=False)


class VisionTower(Module):
    """The tower; call it for the features of tiles, or `states` for its patches before them."""

    def __init__(self, config: VisionTowerConfig, *, key: jax.Array):
        p, c, t, b, a = jax.random.split(key, 5)
        d, tokens = config.embed_dim, config.grid**2 + 1
        self.config = config
        self.patches = Linear(
            config.patch_dim, d, ("input_channels", "embed"), key=p, std=config.init_std
        )
        self.class_token = parameter(normal(c, (d,), d**-0.5), ("embed",))
        self.positions = parameter(normal(t, (tokens, d), d**-0.5), (None, "embed"))
        self.norm_pre = LayerNorm(d, config.norm_eps)
        self.layers = stacked(lambda k: VisionBlock(config, key=k), b, config.num_layers)
        self.norm_post = LayerNorm(d, config.norm_eps)
        self.adapter = Adapter(config, key=a)

    def __call__(
        self, tiles_NYXC: Float[Array, "N Y X C"], *, remat: str = "none"
    ) -> Float[Array, "N M E"]:
        """Return the features of tiles, in the dtype of the weights.

        Args:
          tiles_NYXC: colours in [-1, 1], row-major tiles of `image_size` pixels a side
            (`jaxherd.data.images`).
          remat: what the forward pass keeps, see `jaxherd.core.remat`.
        """
        states_NPD = self.states(tiles_NYXC, remat=remat)
        return self.adapter(shuffle_patches(states_NPD, self.config.shuffle))

    def states(
        self, tiles_NYXC: Float[Array, "N Y X C"], *, remat: str = "none"
    ) -> Float[Array, "N P D"]:
        """Return the normed states of all patches, row by row, without the class token."""
        c = self.config
        patches_NPK = unfold(tiles_NYXC, c.patch_size).astype(self.patches.kernel[...].dtype)
        x_NPD, count = self.patches(patches_NPK), tiles_NYXC.shape[0]
        class_N1D = jnp.broadcast_to(self.class_token[...], (count, 1, c.embed_dim))
        x_NTD = jnp.concatenate([x_NPD, class_N1D], axis=1) + self.positions[...]
        x_NTD = _residual(self.norm_pre(x_NTD))
        # Counted from 1; the class token, which comes last, does not turn.
        numbers = range(c.grid**2)
        info = SequenceInfo.of_grid(
            c.attention,
            [*(n % c.grid + 1 for n in numbers), 0],
            [*(n // c.grid + 1 for n in numbers), 0],
            count,
        )

        def layer(x_NTD, block: VisionBlock):
            return block(x_NTD, info, c.attention_implementation), None

        x_NTD, _ = jax.lax.scan(checkpointed(layer, remat), x_NTD, self.layers)
        return self.norm_post(x_NTD)[:, :-1]


def _residual(x_NTD: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    """Constrain to the active layout; the odd number of tokens is never split."""
    return shard(x_NTD, "batch", None, "act_embed")
