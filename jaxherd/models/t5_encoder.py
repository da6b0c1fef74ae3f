"""The encoder of T5, version 1.0 (relu) and 1.1 (gated gelu): the text tower of audio models.

    h = embed(tokens);  for each layer: h += attention(norm(h)); h += feed_forward(norm(h))
    states = norm(h)

Attention is bidirectional, its scores are not scaled, and a learnt bias by bucketed relative
position, the same in every layer, is added to them.  No projection has a bias.

Axis letters: B batch, L tokens (queries), S tokens (keys), D width, N heads, H head size, F
feed-forward width, R buckets.

Source: Raffel et al. 2020, arXiv 1910.10683, section 2.1; checked against transformers.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from jaxherd.core.modules import Module, parameter, stacked
from jaxherd.core.sharding import shard
from jaxherd.layers.linear import Embedding, Linear, RMSNorm, normal, residual

_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig:
    """A T5 encoder.

    Attributes:
      vocab_size, embed_dim, num_layers: V, D and depth.
      num_heads, head_dim: N and H; N H need not be D.
      hidden_dim: F.
      feed_forward: "relu" (1.0) or "gated-gelu" (1.1, the tanh form of gelu).
      num_buckets, max_distance: of relative positions, both directions together; all distances
        from `max_distance` on share a bucket.
      norm_eps: of the RMS norms.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    feed_forward: Literal["relu", "gated-gelu"] = "relu"
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6

    def build(self, key: jax.Array) -> "T5Encoder":
        """Return the module with freshly drawn parameters."""
        return T5Encoder(self, key=key)

    def _matrices(self) -> int:
        parts = 3 if self.feed_forward == "gated-gelu" else 2
        attention = 4 * self.embed_dim * self.num_heads * self.head_dim
        return attention + parts * self.embed_dim * self.hidden_dim

    def num_params(self) -> int:
        """Return the exact number of parameters."""
        tables = self.vocab_size * self.embed_dim + self.num_buckets * self.num_heads
        layer = self._matrices() + 2 * self.embed_dim
        return tables + self.num_layers * layer + self.embed_dim

    def forward_flops(self, batch: int, length: int) -> float:
        """Return FLOPs of encoding `batch` texts of `length` tokens, two per multiply-add."""
        scores = 4.0 * length * length * self.num_heads * self.head_dim
        return batch * self.num_layers * (2.0 * length * self._matrices() + scores)

    def train_flops(self, batch: int, length: int) -> float:
        """Return FLOPs of a training step: forward, and twice that for the gradient."""
        return 3.0 * self.forward_flops(batch, length)


def t5_base() -> T5EncoderConfig:
    """Return the encoder of the published t5-base (1.0)."""
    return T5EncoderConfig(32128, 768, 12, 12, 64, 3072)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "L S"]:
    """Return the bucket of each (query, key) pair.

    Half of the buckets is for keys behind the query, half for those ahead.  Of each half, the
    first half holds single distances and the rest grows logarithmically up to `max_distance`.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact, distance = half // 2, np.abs(offset)
    # In float32 as published: where the logarithm is a whole number, rounding decides.
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    bucket = np.where(distance < exact, distance, exact + far.astype(np.int32))
    return np.minimum(bucket, half - 1) + half * (offset > 0)


class T5Layer(Module):
    """Self-attention and feed-forward, both pre-norm."""

    def __init__(self, config: T5EncoderConfig, *, key: jax.Array):
        d, f, inner = config.embed_dim, config.hidden_dim, config.num_heads * config.head_dim
        keys = jax.random.split(key, 7)

        def linear(number: int, rows: int, columns: int, axes, std: float) -> Linear:
            return Linear(rows, columns, axes, key=keys[number], std=std)

        self.attention_norm = RMSNorm(d, config.norm_eps)
        # Unscaled scores: the query's weights start smaller by the square root of the head size.
        self.q_proj = linear(0, d, inner, ("embed", "heads"), (d * config.head_dim) ** -0.5)
        self.k_proj = linear(1, d, inner, ("embed", "heads"), d**-0.5)
        self.v_proj = linear(2, d, inner, ("embed", "heads"), d**-0.5)
        self.o_proj = linear(3, inner, d, ("heads", "embed"), inner**-0.5)
        self.feed_forward_norm = RMSNorm(d, config.norm_eps)
        gated = config.feed_forward == "gated-gelu"
        self.gate = linear(4, d, f, ("embed", "mlp"), d**-0.5) if gated else None
        self.up = linear(5, d, f, ("embed", "mlp"), d**-0.5)
        self.down = linear(6, f, d, ("mlp", "embed"), f**-0.5)

    def __call__(
        self, x_BLD: Float[Array, "B L D"], bias_BNLS: Float[Array, "#B N L S"]
    ) -> Float[Array, "B L D"]:
        """Return the residual stream after this layer; the bias holds the mask."""
        y_BLD, heads = self.attention_norm(x_BLD), bias_BNLS.shape[1]
        q, k, v = (
            rearrange(projection(y_BLD), "B L (N H) -> B L N H", N=heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = jnp.einsum("BLNH,BSNH->BNLS", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias_BNLS, axis=-1).astype(v.dtype)
        out_BLNH = jnp.einsum("BNLS,BSNH->BLNH", weights, v)
        out_BLNH = shard(out_BLNH, "batch", "length", "act_heads", "head_dim")
        x_BLD = residual(x_BLD + self.o_proj(rearrange(out_BLNH, "B L N H -> B L (N H)")))
        y_BLD = self.feed_forward_norm(x_BLD)
        hidden_BLF = shard(self.up(y_BLD), "batch", "length", "act_mlp")
        if self.gate is None:
            hidden_BLF = jax.nn.relu(hidden_BLF)
        else:
            hidden_BLF = jax.nn.gelu(self.gate(y_BLD), approximate=True) * hidden_BLF
        return residual(x_BLD + self.down(hidden_BLF))


class T5Encoder(Module):
    """The encoder; call it for the last hidden states."""

    def __init__(self, config: T5EncoderConfig, *, key: jax.Array):
        e, r, b = jax.random.split(key, 3)
        d = config.embed_dim
        self.config = config
        self.embedding = Embedding(config.vocab_size, d, key=e, std=1.0)
        shape = (config.num_buckets, config.num_heads)
        # A few hundred numbers: left whole on every device.
        self.relative_bias = parameter(normal(r, shape, d**-0.5), (None, None))
        self.layers = stacked(lambda k: T5Layer(config, key=k), b, config.num_layers)
        self.final_norm = RMSNorm(d, config.norm_eps)

    def __call__(
        self, tokens_BL: Int[Array, "B L"], mask_BL: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Return last hidden states.

        Args:
          tokens_BL: token ids.
          mask_BL: which tokens are no padding; padding is not attended to, and its own states
            mean nothing.
        """
        c, length = self.config, tokens_BL.shape[1]
        buckets_LS = relative_buckets(length, c.num_buckets, c.max_distance)
        table_RN = self.relative_bias[...].astype(jnp.float32)
        bias_BNLS = rearrange(table_RN[buckets_LS], "L S N -> 1 N L S")
        if mask_BL is not None:
            bias_BNLS = jnp.where(mask_BL[:, None, None], bias_BNLS, _MASKED)
        x_BLD = residual(self.embedding(tokens_BL))
        x_BLD, _ = jax.lax.scan(lambda x, layer: (layer(x, bias_BNLS), None), x_BLD, self.layers)
        return self.final_norm(x_BLD)
