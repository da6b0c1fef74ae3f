"""A stack of LSTM layers whose state can be handed on, so that a long input may come in pieces.

Gates are in torch's order i, f, g, o and each layer has two biases, as torch's has.

Axis letters: B batch, T time, D width, N layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.modules import Module, ModuleList, parameter
from jaxherd.layers.conv import uniform

# (hidden, cell) of every layer, each float32 [N, B, D].
LstmState = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class LstmConfig:
    """`layers` LSTM layers of one width; `skip` adds the input to the output."""

    dim: int
    layers: int
    skip: bool = True

    def build(self, key: jax.Array) -> "Lstm":
        """Return the layer with freshly drawn parameters."""
        return Lstm(self, key=key)

    def initial_state(self, batch: int) -> LstmState:
        """Return the state before the first input: zeros."""
        zeros = jnp.zeros((self.layers, batch, self.dim), jnp.float32)
        return zeros, zeros

    def num_params(self) -> int:
        """Return the number of parameters."""
        return self.layers * (8 * self.dim * self.dim + 8 * self.dim)

    def flops(self, inputs: int) -> float:
        """Return forward FLOPs of one sequence (matrix products)."""
        return 2.0 * inputs * self.layers * 8 * self.dim * self.dim


class LstmLayer(Module):
    """c = f c + i g, h = o tanh(c), with gates from W x + U h + two biases."""

    def __init__(self, dim: int, *, key: jax.Array):
        keys = jax.random.split(key, 4)
        axes = ("input_channels", "channels")
        self.input_kernel = parameter(uniform(keys[0], (dim, 4 * dim), dim), axes)
        self.hidden_kernel = parameter(uniform(keys[1], (dim, 4 * dim), dim), axes)
        self.input_bias = parameter(uniform(keys[2], (4 * dim,), dim), ("channels",))
        self.hidden_bias = parameter(uniform(keys[3], (4 * dim,), dim), ("channels",))

    def __call__(
        self, x_BTD: Float[Array, "B T D"], state: tuple[jax.Array, jax.Array]
    ) -> tuple[Float[Array, "B T D"], tuple[jax.Array, jax.Array]]:
        """Return the hidden states of all times and the state after the last."""
        bias = self.input_bias[...] + self.hidden_bias[...]
        driven = jnp.swapaxes(x_BTD @ self.input_kernel[...] + bias, 0, 1)
        recurrent = self.hidden_kernel[...]

        def step(carry, driven_BG):
            hidden, cell = carry
            gates = driven_BG + hidden.astype(recurrent.dtype) @ recurrent
            i, f, g, o = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (hidden, cell), hidden.astype(x_BTD.dtype)

        state, hidden_TBD = jax.lax.scan(step, state, driven)
        return jnp.swapaxes(hidden_TBD, 0, 1), state


class Lstm(Module):
    """Layers in sequence; the state is (hidden, cell) [N, B, D] in float32."""

    def __init__(self, config: LstmConfig, *, key: jax.Array):
        self.config = config
        keys = jax.random.split(key, config.layers)
        self.layers = ModuleList([LstmLayer(config.dim, key=k) for k in keys])

    def __call__(
        self, x_BTD: Float[Array, "B T D"], state: LstmState | None = None
    ) -> tuple[Float[Array, "B T D"], LstmState]:
        """Return the output at all times and the state to go on from.

        Args:
          x_BTD: the next inputs.
          state: what an earlier call returned; zeros when None.
        """
        hidden, cell = self.config.initial_state(x_BTD.shape[0]) if state is None else state
        y, after = x_BTD, []
        for index, layer in enumerate(self.layers):
            y, reached = layer(y, (hidden[index], cell[index]))
            after.append(reached)
        state = (jnp.stack([h for h, _ in after]), jnp.stack([c for _, c in after]))
        return (x_BTD + y if self.config.skip else y), state
