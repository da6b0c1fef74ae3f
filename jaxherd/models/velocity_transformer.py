"""The velocity field of a flow-matching model: a non-causal transformer with U-shaped skips.

    x = in_proj(z / sqrt(t^2 + (1-t)^2)); tau = mlp(sinusoid(t))
    for each layer: x += attention(norm(x) + tau); x += cross(norm(x) + tau, c); x += ff(norm(x))
    v = sqrt(2) out_proj(norm(x))

The time embedding is added after the norm, in the two attention branches alone: there is no
adaptive norm and no gate.  Time runs from noise (t = 0) to data (t = 1) and enters raw, not in
thousands.  The lower layers are scanned and hand out their results; the upper layers are scanned
and take them in reverse, each through a projection of [x, skip].

Axis letters: B batch, T frames, C latent channels, D width, L condition tokens, N heads, H head
size, F feed-forward width.

Source: melodyflow.md 3.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import Module, parameter, stacked
from jaxherd.core.remat import checkpointed
from jaxherd.core.sharding import shard
from jaxherd.kernels.attention import AttentionMask, attention
from jaxherd.layers import rope as rope_lib
from jaxherd.layers.layer_norm import LayerNorm
from jaxherd.layers.linear import Embedding, Linear, residual
from jaxherd.layers.rope import RopeConfig
from jaxherd.layers.sinusoid import sinusoid

TIME_FEATURES = 256


@dataclasses.dataclass(frozen=True)
class TextStates:
    """Conditions are hidden states of a frozen text encoder (melodyflow.md 3.4).

    Batch fields: text_states [B, L, dim] and text_mask [B, L]; a row without text has mask 0.
    """

    dim: int = 768

    def num_params(self, embed_dim: int) -> int:
        """Return the parameters of the projection."""
        return self.dim * embed_dim + embed_dim

    def flops(self, embed_dim: int, length: int) -> float:
        """Return FLOPs of projecting `length` states."""
        return 2.0 * length * self.dim * embed_dim


@dataclasses.dataclass(frozen=True)
class LabelEmbedding:
    """Conditions are classes: batch field labels [B] int32, -1 for the null condition."""

    num_labels: int

    def num_params(self, embed_dim: int) -> int:
        """Return the parameters of the table."""
        return self.num_labels * embed_dim

    def flops(self, embed_dim: int, length: int) -> float:
        """Return 0: a look-up does no products."""
        return 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """What cross-attention sees: states of the model's width, and which of them count.

    A mask of zeros is the null condition, whatever the states.
    """

    states_BLD: Float[Array, "B L D"]
    mask_BL: Bool[Array, "B L"]

    def where(self, keep_B: Bool[Array, "B"]) -> "Condition":
        """Return the condition with the null condition in rows where `keep_B` is false."""
        return Condition(self.states_BLD, self.mask_BL & keep_B[:, None])

    def null(self) -> "Condition":
        """Return the null condition for as many rows and tokens."""
        return Condition(self.states_BLD, jnp.zeros_like(self.mask_BL))

    def tile(self, copies: int) -> "Condition":
        """Return the rows `copies` times one after the other."""
        return jax.tree.map(lambda x: jnp.concatenate([x] * copies), self)


@dataclasses.dataclass(frozen=True)
class VelocityTransformerConfig:
    """A velocity network.

    Attributes:
      latent_dim: C.
      embed_dim, num_layers, num_heads: D, depth, N; the head size is D / N.
      ff_multiple: F / D.
      conditioner: what the batch gives as condition; None has no cross-attention.
      positional: "sin" adds a sinusoid to the input, "rope" rotates queries and keys of
        self-attention, "sin_rope" both.
      positional_scale: weight of the sinusoid; for RoPE the blend
        scale * rotation + (1 - scale) * identity.
      rope_rounding: "bfloat16" takes RoPE's frequencies rounded to it.  A published table that was
        stored so turns later frames by other angles: by 0.08 at frame 749 for the second frequency.
      bias_ff, bias_attn: biases of feed-forward and skip projections; of attention.
      bias_proj: biases of the input and output projections and of the time embedding.
      layer_scale: initial value of a learnt scale per channel on each branch; None has none.
      add_zero_attn: a zero key and value beside the others in every attention.  Without it
        a null condition gives zeros here, where torch gives NaN.
      qk_norm, qk_norm_cross: LayerNorm of queries and keys over the full width before the heads
        are split, in self- and in cross-attention.
      norm_first: pre-norm; False is post-norm, in which cross-attention's queries are the layer's
        *input*, as published.
      skip_connections: "u_shaped" or "none".
      init_std: of all matrices; None takes (3 fan-in)^-0.5, the spread with which torch's Linear
        starts.  The paper's initialisation was not recovered.
      attention_implementation: see `jaxherd.kernels.attention`.

    Which of positional, biases, layer_scale, add_zero_attn and qk_norm the paper's models use is
    hidden in the checkpoint's configuration (melodyflow.md 3.3); the defaults are those of the
    family, with `add_zero_attn`, which the null condition needs, and RoPE.
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    latent_dim: int = 128
    ff_multiple: int = 4
    conditioner: TextStates | LabelEmbedding | None = None
    positional: Literal["sin", "rope", "sin_rope"] = "rope"
    positional_scale: float = 1.0
    rope_rounding: Literal["none", "bfloat16"] = "none"
    bias_ff: bool = False
    bias_attn: bool = False
    bias_proj: bool = False
    layer_scale: float | None = None
    add_zero_attn: bool = True
    qk_norm: bool = False
    qk_norm_cross: bool = False
    norm_first: bool = True
    skip_connections: Literal["u_shaped", "none"] = "u_shaped"
    init_std: float | None = None
    attention_implementation: str | None = None

    def __post_init__(self):
        if self.embed_dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"embed_dim {self.embed_dim} must split into {self.num_heads} heads of even size"
            )
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.embed_dim // self.num_heads

    @property
    def num_skips(self) -> int:
        """How many of the first layers are joined to as many of the last."""
        return (self.num_layers - 1) // 2 if self.skip_connections == "u_shaped" else 0

    def skip_order(self) -> tuple[int, ...]:
        """Return which published skip projection each upper layer uses, from the lowest on.

        The published code takes number (layer mod n) of n, so that with 24 layers layer 13 uses
        projection 2 and layer 23 projection 1.  Here they are stored in the order of use.
        """
        n, first = self.num_skips, self.num_layers - self.num_skips
        return tuple((first + i) % n for i in range(n))

    def build(self, key: jax.Array) -> "VelocityTransformer":
        """Return the module with freshly drawn parameters."""
        return VelocityTransformer(self, key=key)

    def matrix_params(self) -> int:
        """Return the entries of the matrices of all layers and skip projections.

        (4 + 4 with cross-attention + 2 ff_multiple) D^2 a layer and 2 D^2 a skip: the formula of
        melodyflow.md 3.1.
        """
        d2 = self.embed_dim**2
        attentions = 2 if self.conditioner is not None else 1
        layer = (4 * attentions + 2 * self.ff_multiple) * d2
        return self.num_layers * layer + 2 * self.num_skips * d2

    def num_params(self) -> int:
        """Return the exact number of parameters."""
        d, c, f = self.embed_dim, self.latent_dim, self.ff_multiple * self.embed_dim
        cross = self.conditioner is not None
        branches, attentions = (3, 2) if cross else (2, 1)
        qk_norms = self.qk_norm + (self.qk_norm_cross and cross)
        layer = branches * 2 * d + 4 * d * qk_norms
        layer += 4 * d * attentions * self.bias_attn + (f + d) * self.bias_ff
        layer += branches * d * (self.layer_scale is not None)
        ends = 2 * c * d + 2 * d + TIME_FEATURES * d + d * d + self.bias_proj * (c + 3 * d)
        skips = self.num_skips * d * self.bias_ff
        conditioner = self.conditioner.num_params(d) if self.conditioner else 0
        return self.matrix_params() + self.num_layers * layer + ends + skips + conditioner

    def forward_flops(self, batch: int, length: int, condition_length: int = 1) -> float:
        """Return FLOPs of one evaluation, two per multiply-add of every matrix product.

        Args:
          batch, length: latents of `length` frames.
          condition_length: tokens that cross-attention sees, padding included.
        """
        d, slot = self.embed_dim, int(self.add_zero_attn)
        per_frame = (4 + 2 * self.ff_multiple) * d * d  # self-attention and feed-forward
        flops = 2.0 * length * per_frame + 4.0 * length * (length + slot) * d
        if self.conditioner is not None:
            flops += 2.0 * (2 * length + 2 * condition_length) * d * d
            flops += 4.0 * length * (condition_length + slot) * d
        flops *= self.num_layers
        flops += 2.0 * length * (2 * self.num_skips * d * d + 2 * self.latent_dim * d)
        flops += 2.0 * (TIME_FEATURES * d + d * d)
        if self.conditioner is not None:
            flops += self.conditioner.flops(d, condition_length)
        return batch * flops

    def train_flops(self, batch: int, length: int, condition_length: int = 1) -> float:
        """Return FLOPs of one training step: forward, and twice that for the gradient."""
        return 3.0 * self.forward_flops(batch, length, condition_length)


def melodyflow_small() -> VelocityTransformerConfig:
    """Return the 400M model: 426 M in the layers' matrices.

    The widths are derived, not published: audiocraft's "small" scale is 24 layers, 1024, 16 heads
    and fits the stated size with skips (melodyflow.md 3.1).
    """
    return VelocityTransformerConfig(1024, 24, 16, conditioner=TextStates(768))


def melodyflow_medium() -> VelocityTransformerConfig:
    """Return the 1B model: 958 M in the layers' matrices; derived as for `melodyflow_small`."""
    return VelocityTransformerConfig(1536, 24, 24, conditioner=TextStates(768))


PRESETS = {"melodyflow-small": melodyflow_small, "melodyflow-medium": melodyflow_medium}


def _linear(config, in_dim: int, out_dim: int, axes, key, bias: bool) -> Linear:
    std = config.init_std if config.init_std is not None else (3.0 * in_dim) ** -0.5
    return Linear(in_dim, out_dim, axes, key=key, bias=bias, std=std)


class MultiHeadAttention(Module):
    """Bidirectional attention of the frames to themselves, or to a condition."""

    def __init__(self, config: VelocityTransformerConfig, *, key: jax.Array, cross: bool):
        d, bias, keys = config.embed_dim, config.bias_attn, jax.random.split(key, 4)
        self.q_proj = _linear(config, d, d, ("embed", "heads"), keys[0], bias)
        self.k_proj = _linear(config, d, d, ("embed", "heads"), keys[1], bias)
        self.v_proj = _linear(config, d, d, ("embed", "heads"), keys[2], bias)
        self.o_proj = _linear(config, d, d, ("heads", "embed"), keys[3], bias)
        normed = config.qk_norm_cross if cross else config.qk_norm
        self.q_norm = LayerNorm(d) if normed else None
        self.k_norm = LayerNorm(d) if normed else None

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        states_BSD: Float[Array, "B S D"],
        seen_BS: Bool[Array, "B S"] | None,
        table: tuple[jax.Array, jax.Array] | None,
        config: VelocityTransformerConfig,
        *,
        own: bool = False,
    ) -> Float[Array, "B T D"]:
        """Return the attention output.

        Args:
          x_BTD: the queries' source.
          states_BSD: the keys' and values' source.
          seen_BS: which of them count; None counts all.
          table: (cos, sin) of the positions, for RoPE.
          config: the model's.
          own: queries and keys are the same frames; those that do not count get zeros.
        """
        q, k, v = self.q_proj(x_BTD), self.k_proj(states_BSD), self.v_proj(states_BSD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTNH, k_BSNH, v_BSNH = (_heads(x, config.num_heads) for x in (q, k, v))
        if table is not None:
            q_BTNH, k_BSNH = rope_lib.rotate(q_BTNH, table), rope_lib.rotate(k_BSNH, table)
        if config.add_zero_attn:
            # Behind the others, where the published code has it in front: softmax knows no order, and
            # here it is part of the padding that fills a kernel's last block.
            behind = ((0, 0), (0, 1), (0, 0), (0, 0))
            k_BSNH, v_BSNH = jnp.pad(k_BSNH, behind), jnp.pad(v_BSNH, behind)
        batch, frames, keys = x_BTD.shape[0], x_BTD.shape[1], k_BSNH.shape[1]
        positions_BT, positions_BS = _rows(batch, frames), _rows(batch, keys)
        if seen_BS is not None:
            if own:
                positions_BT = jnp.where(seen_BS, positions_BT, -1)
            slot = ((0, 0), (0, keys - seen_BS.shape[1]))
            counted_BS = jnp.pad(seen_BS, slot, constant_values=True)
            positions_BS = jnp.where(counted_BS, positions_BS, -1)
        # With a zero slot the keys are not the queries' own tokens.
        alone = own and not config.add_zero_attn
        mask = AttentionMask(
            positions_BT,
            positions_BS,
            kind="bidirectional",
            self_attention=alone,
            contiguous=alone and seen_BS is None,
        )
        out_BTNH = attention(
            q_BTNH, k_BSNH, v_BSNH, mask=mask, implementation=config.attention_implementation
        )
        out_BTNH = shard(out_BTNH, "batch", "length", "act_heads", "head_dim")
        return self.o_proj(rearrange(out_BTNH, "B T N H -> B T (N H)"))


def _heads(x, heads: int):
    x_BTNH = rearrange(x, "B T (N H) -> B T N H", N=heads)
    return shard(x_BTNH, "batch", None, "act_heads", "head_dim")


def _rows(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


class VelocityLayer(Module):
    """Self-attention, cross-attention and feed-forward, each with its norm and scale."""

    def __init__(self, config: VelocityTransformerConfig, *, key: jax.Array):
        d, f, bias = config.embed_dim, config.ff_multiple * config.embed_dim, config.bias_ff
        keys, cross = jax.random.split(key, 4), config.conditioner is not None

        def scale():
            if config.layer_scale is None:
                return None
            return parameter(jnp.full(d, config.layer_scale), ("norm",))

        self.attention_norm, self.attention_scale = LayerNorm(d), scale()
        self.attention = MultiHeadAttention(config, key=keys[0], cross=False)
        self.cross_norm, self.cross_scale = (LayerNorm(d), scale()) if cross else (None, None)
        self.cross = MultiHeadAttention(config, key=keys[1], cross=True) if cross else None
        self.feed_forward_norm, self.feed_forward_scale = LayerNorm(d), scale()
        self.up = _linear(config, d, f, ("embed", "mlp"), keys[2], bias)
        self.down = _linear(config, f, d, ("mlp", "embed"), keys[3], bias)

    def __call__(self, x_BTD, time_B1D, table, seen_BT, condition: Condition | None, config):
        """Return the residual stream after this layer; frames that are not seen are nobody's keys."""
        if config.norm_first:
            y_BTD = self.attention_norm(x_BTD, time_B1D)
            y_BTD = self.attention(y_BTD, y_BTD, seen_BT, table, config, own=True)
            x_BTD = self._add(x_BTD, y_BTD, self.attention_scale)
            if self.cross is not None and self.cross_norm is not None:
                y_BTD = self._attend(self.cross_norm(x_BTD, time_B1D), condition, config)
                x_BTD = self._add(x_BTD, y_BTD, self.cross_scale)
            y_BTD = self._feed_forward(self.feed_forward_norm(x_BTD))
            return self._add(x_BTD, y_BTD, self.feed_forward_scale)
        timed_BTD = (x_BTD + time_B1D).astype(x_BTD.dtype)
        y_BTD = self.attention(timed_BTD, timed_BTD, seen_BT, table, config, own=True)
        x_BTD = self.attention_norm(self._add(x_BTD, y_BTD, self.attention_scale))
        if self.cross is not None and self.cross_norm is not None:
            y_BTD = self._attend(timed_BTD, condition, config)
            x_BTD = self.cross_norm(self._add(x_BTD, y_BTD, self.cross_scale))
        y_BTD = self._feed_forward(x_BTD)
        return self.feed_forward_norm(self._add(x_BTD, y_BTD, self.feed_forward_scale))

    def _attend(self, query_BTD, condition: Condition | None, config):
        assert self.cross is not None and condition is not None
        states_BLD = condition.states_BLD.astype(query_BTD.dtype)
        return self.cross(query_BTD, states_BLD, condition.mask_BL, None, config)

    def _feed_forward(self, x_BTD):
        hidden_BTF = shard(self.up(x_BTD), "batch", "length", "act_mlp")
        return self.down(jax.nn.gelu(hidden_BTF, approximate=False))

    def _add(self, x_BTD, y_BTD, scale):
        y_BTD = checkpoint_name(y_BTD, "attention_out")
        return residual(x_BTD + (y_BTD if scale is None else y_BTD * scale[...]))


class UpperLayer(Module):
    """A layer that first takes in the result of a lower one: x <- W [x, skip]."""

    def __init__(self, config: VelocityTransformerConfig, *, key: jax.Array):
        a, b = jax.random.split(key)
        d = config.embed_dim
        self.skip = _linear(config, 2 * d, d, ("mlp", "embed"), a, config.bias_ff)
        self.layer = VelocityLayer(config, key=b)

    def __call__(self, x_BTD, skip_BTD, *rest):
        """Return the residual stream after this layer."""
        joined = self.skip(jnp.concatenate([x_BTD, skip_BTD], axis=-1))
        return self.layer(residual(joined), *rest)


class VelocityTransformer(Module):
    """v(z, t, condition); call it for velocities, `condition` to project a batch's conditions."""

    def __init__(self, config: VelocityTransformerConfig, *, key: jax.Array):
        keys = jax.random.split(key, 8)
        d, c, n, bias = config.embed_dim, config.latent_dim, config.num_skips, config.bias_proj
        self.config = config
        # The latent channels and time features are few: left whole, so that any layout divides.
        self.in_proj = _linear(config, c, d, (None, "embed"), keys[0], bias)
        self.time_in = _linear(config, TIME_FEATURES, d, (None, "embed"), keys[1], bias)
        self.time_out = _linear(config, d, d, ("mlp", "embed"), keys[2], bias)
        self.lower = stacked(lambda k: VelocityLayer(config, key=k), keys[3], n) if n else None
        self.middle = stacked(
            lambda k: VelocityLayer(config, key=k), keys[4], config.num_layers - 2 * n
        )
        self.upper = stacked(lambda k: UpperLayer(config, key=k), keys[5], n) if n else None
        self.out_norm = LayerNorm(d)
        self.out_proj = _linear(config, d, c, ("embed", None), keys[6], bias)
        given = config.conditioner
        self.text_proj = (
            _linear(config, given.dim, d, (None, "embed"), keys[7], True)
            if isinstance(given, TextStates)
            else None
        )
        # Labels start as large as normed streams.
        self.label_table = (
            Embedding(given.num_labels, d, key=keys[7], std=1.0)
            if isinstance(given, LabelEmbedding)
            else None
        )

    def condition(self, batch: Mapping[str, Any]) -> Condition | None:
        """Return the condition of a batch in the model's width; None without a conditioner.

        Raises:
          JaxherdError: the batch lacks a field of the conditioner.
        """
        if self.text_proj is not None:
            states_BLE, mask_BL = _field(batch, "text_states"), _field(batch, "text_mask") > 0
            states_BLD = self.text_proj(states_BLE.astype(self.text_proj.kernel[...].dtype))
            return Condition(states_BLD * mask_BL[..., None], mask_BL)
        if self.label_table is not None:
            labels_B = _field(batch, "labels")
            states_BD = self.label_table(jnp.maximum(labels_B, 0))
            return Condition(states_BD[:, None], (labels_B >= 0)[:, None])
        return None

    def __call__(
        self,
        z_BTC: Float[Array, "B T C"],
        t_B: Float[Array, "B"],
        condition: Condition | None = None,
        *,
        seen_BT: Bool[Array, "B T"] | None = None,
        remat: str = "none",
    ) -> Float[Array, "B T C"]:
        """Return float32 velocities.

        Args:
          z_BTC: standardised latents on the way from noise to data.
          t_B: time of each row, 0 noise and 1 data.
          condition: from `condition`; None is the null condition.
          seen_BT: which frames a row has, the others being padding behind them: their values change
            nothing, and their velocities mean nothing.  None has all.
          remat: a policy of `jaxherd.core.remat`, applied to single layers.
        """
        config, dtype = self.config, self.in_proj.kernel[...].dtype
        batch, frames = z_BTC.shape[:2]
        t_B = t_B.astype(jnp.float32)
        # Noise and data of unit variance, independent, keep unit variance on their way.
        spread_B11 = jnp.sqrt(t_B**2 + (1 - t_B) ** 2)[:, None, None]
        x_BTD = self.in_proj((z_BTC / spread_B11).astype(dtype))
        time_B1D = self._time(t_B)[:, None]
        positions_T = jnp.arange(frames, dtype=jnp.int32)
        table = None
        if config.positional != "rope":
            waves_TD = sinusoid(positions_T, config.embed_dim, include_last=True)
            x_BTD = (x_BTD + config.positional_scale * waves_TD).astype(dtype)
        if config.positional != "sin":
            rounding = None if config.rope_rounding == "none" else config.rope_rounding
            cos, sin = rope_lib.angles(
                RopeConfig(), config.head_dim, _rows(batch, frames), rounded_to=rounding
            )
            s = config.positional_scale
            table = (s * cos + (1 - s), s * sin)
        if config.conditioner is not None and condition is None:
            condition = Condition(
                jnp.zeros((batch, 1, config.embed_dim), dtype), jnp.zeros((batch, 1), bool)
            )
        x_BTD = self._layers(residual(x_BTD), (time_B1D, table, seen_BT, condition, config), remat)
        v_BTC = self.out_proj(self.out_norm(x_BTD)).astype(jnp.float32)
        # The target x1 - x0 has twice the variance of either.
        return v_BTC * jnp.sqrt(2.0)

    def _time(self, t_B: Float[Array, "B"]) -> Float[Array, "B D"]:
        """Return the time embedding, in float32 whatever the parameters' dtype."""
        features = sinusoid(t_B, TIME_FEATURES)
        return self.time_out(jax.nn.silu(self.time_in(features))).astype(jnp.float32)

    def _layers(self, x_BTD, shared: tuple, remat: str):
        def plain(x, layer):
            x = layer(x, *shared)
            return x, x

        def joined(x, scanned):
            layer, skip = scanned
            return layer(x, skip, *shared), None

        skips_nBTD = None
        if self.lower is not None:
            x_BTD, skips_nBTD = jax.lax.scan(checkpointed(plain, remat), x_BTD, self.lower)

        def silent(x, layer):
            return plain(x, layer)[0], None

        x_BTD, _ = jax.lax.scan(checkpointed(silent, remat), x_BTD, self.middle)
        if self.upper is not None and skips_nBTD is not None:
            scanned = (self.upper, jnp.flip(skips_nBTD, axis=0))
            x_BTD, _ = jax.lax.scan(checkpointed(joined, remat), x_BTD, scanned)
        return x_BTD


def _field(batch: Mapping[str, Any], name: str) -> jax.Array:
    if name not in batch:
        raise JaxherdError(
            f"the batch has no field {name!r}, which the model's conditioner needs: add it to the "
            "data, or build the model with conditioner=None."
        )
    return jnp.asarray(batch[name])
