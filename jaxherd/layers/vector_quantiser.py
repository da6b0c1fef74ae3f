"""Residual vector quantisation with factorised, normalised codes, learnt by gradient.

Each stage projects what is left to a few dimensions, takes the nearest code there (after both are
scaled to length one), and projects it back; the next stage quantises the rest.  This is the
quantiser of DAC; low-dimensional normalised codes stay in use without k-means or resets.

Axis letters: B batch, T frames, L width, Q stages, J code width, V codes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.core.modules import Module, ModuleList, parameter
from jaxherd.layers.conv import uniform


@dataclasses.dataclass(frozen=True)
class QuantiserConfig:
    """Residual quantiser of `stages` codebooks.

    Attributes:
      dim: width L of what is quantised.
      stages: codebooks, each for the rest that the earlier ones left.
      codes: entries V of a codebook.
      code_dim: width J in which the nearest code is sought.
      commitment, codebook: weights of the two quantisation losses.
    """

    dim: int
    stages: int = 8
    codes: int = 1024
    code_dim: int = 8
    commitment: float = 0.25
    codebook: float = 1.0

    def build(self, key: jax.Array) -> "ResidualQuantiser":
        """Return the layer with freshly drawn parameters."""
        return ResidualQuantiser(self, key=key)

    @property
    def bits_per_frame(self) -> float:
        """Bits that name one frame: stages log2(codes)."""
        return self.stages * math.log2(self.codes)

    def num_params(self) -> int:
        """Return the number of parameters."""
        projections = 2 * self.dim * self.code_dim + self.code_dim + self.dim
        return self.stages * (projections + self.codes * self.code_dim)

    def flops(self, inputs: int) -> float:
        """Return forward FLOPs of one sequence: both projections and the scores of all codes."""
        return 2.0 * inputs * self.stages * self.code_dim * (2 * self.dim + self.codes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """What the quantiser gives.

    Attributes:
      latents_BTL: sum of the chosen codes, with the straight-through gradient.
      codes_BTQ: int32.
      loss: weighted commitment and codebook losses, mean over batch, frames and code width.
      perplexity_Q: exp of the entropy of the codes' frequencies in this batch.
      buffers: the quantiser's buffers after a training step with this batch; none if it has none.

    The leaves may also be shapes.
    """

    latents_BTL: Any
    codes_BTQ: Any
    loss: Any
    perplexity_Q: Any
    buffers: Any = dataclasses.field(default_factory=dict)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class _Stage(Module):
    def __init__(self, config: QuantiserConfig, *, key: jax.Array):
        c, keys = config, jax.random.split(key, 5)
        inward, outward = ("input_channels", "norm"), ("norm", "input_channels")
        self.down = parameter(uniform(keys[0], (c.dim, c.code_dim), c.dim), inward)
        self.down_bias = parameter(uniform(keys[1], (c.code_dim,), c.dim), ("norm",))
        self.up = parameter(uniform(keys[2], (c.code_dim, c.dim), c.code_dim), outward)
        self.up_bias = parameter(uniform(keys[3], (c.dim,), c.code_dim), ("norm",))
        table = jax.random.normal(keys[4], (c.codes, c.code_dim))
        self.table = parameter(table, ("vocab", "norm"))

    def decode(self, codes_BT: Int[Array, "B T"]) -> Float[Array, "B T L"]:
        return self._up(jnp.take(self.table[...].astype(jnp.float32), codes_BT, axis=0))

    def _up(self, z_BTJ):
        return z_BTJ @ self.up[...].astype(jnp.float32) + self.up_bias[...]

    def encode(self, rest_BTL, config: QuantiserConfig):
        z_BTJ = rest_BTL @ self.down[...].astype(jnp.float32) + self.down_bias[...]
        table = self.table[...].astype(jnp.float32)
        codes_BT = jnp.argmax(_unit(z_BTJ) @ _unit(table).T, axis=-1).astype(jnp.int32)
        chosen = jnp.take(table, codes_BT, axis=0)
        stop = jax.lax.stop_gradient
        loss = config.commitment * jnp.mean(jnp.square(z_BTJ - stop(chosen)))
        loss += config.codebook * jnp.mean(jnp.square(chosen - stop(z_BTJ)))
        return self._up(z_BTJ + stop(chosen - z_BTJ)), codes_BT, loss


class ResidualQuantiser(Module):
    """Quantises frame by frame: a frame's codes depend on that frame alone.  In float32."""

    def __init__(self, config: QuantiserConfig, *, key: jax.Array):
        self.config = config
        keys = jax.random.split(key, config.stages)
        self.stages = ModuleList([_Stage(config, key=k) for k in keys])

    def __call__(self, latents_BTL: Float[Array, "B T L"]) -> Quantised:
        """Return the quantised latents, their codes and the losses."""
        c = self.config
        rest = latents_BTL.astype(jnp.float32)
        total, codes, loss, perplexity = jnp.zeros_like(rest), [], jnp.zeros(()), []
        for stage in self.stages:
            part, chosen, stage_loss = stage.encode(rest, c)
            rest, total, loss = rest - part, total + part, loss + stage_loss
            codes.append(chosen)
            share = jnp.bincount(chosen.reshape(-1), length=c.codes) / chosen.size
            perplexity.append(jnp.exp(-jnp.sum(share * jnp.log(share + 1e-12))))
        return Quantised(total, jnp.stack(codes, axis=-1), loss, jnp.stack(perplexity))

    def decode(self, codes_BTQ: Int[Array, "B T Q"]) -> Float[Array, "B T L"]:
        """Return the latents that these codes name."""
        parts = [stage.decode(codes_BTQ[..., q]) for q, stage in enumerate(self.stages)]
        return jnp.stack(parts).sum(axis=0)
