"""Gated feed-forward block.  Axis letters: D width, F hidden width."""

import dataclasses

import jax
from jaxtyping import Array, Float

from jaxherd.core.modules import Module
from jaxherd.core.sharding import shard
from jaxherd.layers.linear import Linear


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """SwiGLU of hidden width `hidden_dim`, without biases unless asked for."""

    hidden_dim: int
    bias: bool = False

    def num_params(self, embed_dim: int) -> int:
        """Return the number of parameters for model width `embed_dim`."""
        return 3 * embed_dim * self.hidden_dim + self.bias * (2 * self.hidden_dim + embed_dim)

    def active_params(self, embed_dim: int) -> int:
        """Return the parameters that one token meets."""
        return self.num_params(embed_dim)


class FeedForward(Module):
    """(silu(x W_gate) * x W_up) W_down."""

    def __init__(
        self,
        config: FeedForwardConfig,
        embed_dim: int,
        *,
        key: jax.Array,
        std: float = 0.02,
        out_std: float | None = None,
    ):
        a, b, c = jax.random.split(key, 3)
        hidden, bias = config.hidden_dim, config.bias
        self.gate = Linear(embed_dim, hidden, ("embed", "mlp"), key=a, bias=bias, std=std)
        self.up = Linear(embed_dim, hidden, ("embed", "mlp"), key=b, bias=bias, std=std)
        self.down = Linear(
            hidden,
            embed_dim,
            ("mlp", "embed"),
            key=c,
            bias=bias,
            std=std if out_std is None else out_std,
        )

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the block's output; no norm, no residual."""
        return self.down(self.hidden(x_BTD))

    def hidden(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Return what `down` takes."""
        gate_BTF = shard(self.gate(x_BTD), "batch", "length", "act_mlp")
        up_BTF = shard(self.up(x_BTD), "batch", "length", "act_mlp")
        return jax.nn.silu(gate_BTF) * up_BTF
