"""The audio autoencoder: EnCodec's SEANet around a Gaussian or a quantised bottleneck.

    encoder: conv, then for each ratio (residual blocks, activation, strided conv), LSTM,
             activation, conv
    decoder: conv, LSTM, then for each ratio (activation, transposed conv, residual blocks),
             activation, conv

A network is a list of layer configs in the order of audiocraft's nn.Sequential
(`SeanetConfig.encoder_layers`); parameters, FLOPs, receptive fields and checkpoint names all
follow from that list.  Source: melodyflow.md 2.

Axis letters: B batch, T samples (or frames, with L), C audio channels, L latent width.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.modules import Module, ModuleList, buffer, parameter
from jaxherd.core.sharding import shard
from jaxherd.layers.averaged_quantiser import AveragedQuantiserConfig
from jaxherd.layers.conv import ConvConfig, Norm, PadMode, TransposedConvConfig
from jaxherd.layers.lstm import Lstm, LstmConfig, LstmState
from jaxherd.layers.snake import Snake
from jaxherd.layers.vector_quantiser import Quantised, QuantiserConfig

ActivationName = Literal["snake", "elu", "tanh"]


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
    """An activation over `channels` channels; only "snake" has parameters."""

    name: ActivationName
    channels: int

    def build(self, key: jax.Array) -> "Activation":
        """Return the layer."""
        return Activation(self)

    def length(self, inputs: int) -> int:
        """Return the number of output positions."""
        return inputs

    def num_params(self) -> int:
        """Return the number of parameters."""
        return self.channels if self.name == "snake" else 0

    def flops(self, inputs: int) -> float:
        """Return zero: elementwise work is not counted."""
        return 0.0


class Activation(Module):
    """Applies the config's function."""

    def __init__(self, config: ActivationConfig):
        self.config = config
        self.snake = Snake(config.channels) if config.name == "snake" else None

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Return the activation of every value."""
        if self.snake is not None:
            return self.snake(x)
        return jax.nn.elu(x) if self.config.name == "elu" else jnp.tanh(x)


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
    """x -> shortcut(x) + block(x); `block` alternates activations and convolutions."""

    block: tuple["ActivationConfig | ConvConfig", ...]
    shortcut: ConvConfig | None

    def build(self, key: jax.Array) -> "Residual":
        """Return the layer with freshly drawn parameters."""
        return Residual(self, key=key)

    @property
    def reach(self) -> tuple[int, int]:
        """Inputs before and after a position that its output sees."""
        reaches = [layer.reach for layer in self.block if isinstance(layer, ConvConfig)]
        return sum(r[0] for r in reaches), sum(r[1] for r in reaches)

    def length(self, inputs: int) -> int:
        """Return the number of output positions."""
        return inputs

    def num_params(self) -> int:
        """Return the number of parameters."""
        return sum(layer.num_params() for layer in self._parts())

    def flops(self, inputs: int) -> float:
        """Return forward FLOPs of one sequence."""
        return sum(layer.flops(inputs) for layer in self._parts())

    def _parts(self):
        return self.block if self.shortcut is None else (*self.block, self.shortcut)


class Residual(Module):
    """The residual block of SEANet."""

    def __init__(self, config: ResidualConfig, *, key: jax.Array):
        keys = jax.random.split(key, len(config.block) + 1)
        self.block = ModuleList([c.build(k) for c, k in zip(config.block, keys)])
        self.shortcut = None if config.shortcut is None else config.shortcut.build(keys[-1])

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Return shortcut(x) + block(x)."""
        y = x
        for layer in self.block:
            y = layer(y)
        return y + (x if self.shortcut is None else self.shortcut(x))


LayerConfig = ConvConfig | TransposedConvConfig | LstmConfig | ActivationConfig | ResidualConfig


@dataclasses.dataclass(frozen=True)
class SeanetConfig:
    """Both networks.

    Attributes:
      channels: C of the waveform.
      dimension: L, what the decoder takes.
      n_filters: channels at the waveform's rate; they double with every ratio.
      n_residual_layers: blocks for each ratio; block j is dilated by dilation_base ** j.
      ratios: upsampling factors in the decoder's order; the encoder has them reversed.
      kernel_size, last_kernel_size, residual_kernel_size: of the first and last convolution and
        of the blocks; a resampling convolution has twice its ratio.
      compress: divides the channels inside a residual block.
      lstm: LSTM layers; 0 for none.
      causal, pad_mode, trim_right_ratio: see `jaxherd.layers.conv`.
      true_skip: identity as the blocks' shortcut; a convolution otherwise.
      activation, norm: of all layers.
      final_activation: after the decoder's last convolution.
    """

    channels: int = 2
    dimension: int = 128
    n_filters: int = 64
    n_residual_layers: int = 1
    ratios: tuple[int, ...] = (8, 6, 5, 4, 2)
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2
    lstm: int = 2
    causal: bool = False
    pad_mode: PadMode = "constant"
    true_skip: bool = True
    activation: Literal["snake", "elu"] = "snake"
    norm: Norm = "weight_norm"
    trim_right_ratio: float = 1.0
    final_activation: Literal["tanh"] | None = None

    def __post_init__(self):
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios must be positive, got {self.ratios}")
        if self.n_filters % self.compress:
            raise ValueError(f"compress={self.compress} does not divide n_filters={self.n_filters}")

    @property
    def hop(self) -> int:
        """Samples of one frame: the product of the ratios."""
        return math.prod(self.ratios)

    def _conv(self, inputs: int, outputs: int, kernel: int, **more) -> ConvConfig:
        common = dict(causal=self.causal, pad_mode=self.pad_mode, norm=self.norm)
        return ConvConfig(inputs, outputs, kernel, **common, **more)

    def _residuals(self, width: int) -> list[LayerConfig]:
        hidden, activation = width // self.compress, self.activation
        shortcut = None if self.true_skip else self._conv(width, width, 1)
        return [
            ResidualConfig(
                (
                    ActivationConfig(activation, width),
                    self._conv(width, hidden, self.residual_kernel_size, dilation=dilation),
                    ActivationConfig(activation, hidden),
                    self._conv(hidden, width, 1),
                ),
                shortcut,
            )
            for dilation in (self.dilation_base**j for j in range(self.n_residual_layers))
        ]

    def encoder_layers(self, outputs: int) -> tuple[LayerConfig, ...]:
        """Return the encoder's layers in order; `outputs` channels come out."""
        width = self.n_filters
        layers: list[LayerConfig] = [self._conv(self.channels, width, self.kernel_size)]
        for ratio in reversed(self.ratios):
            layers += self._residuals(width)
            layers += [
                ActivationConfig(self.activation, width),
                self._conv(width, 2 * width, 2 * ratio, stride=ratio),
            ]
            width *= 2
        if self.lstm:
            layers.append(LstmConfig(width, self.lstm))
        layers += [
            ActivationConfig(self.activation, width),
            self._conv(width, outputs, self.last_kernel_size),
        ]
        return tuple(layers)

    def decoder_layers(self) -> tuple[LayerConfig, ...]:
        """Return the decoder's layers in order."""
        width = self.n_filters * 2 ** len(self.ratios)
        layers: list[LayerConfig] = [self._conv(self.dimension, width, self.kernel_size)]
        if self.lstm:
            layers.append(LstmConfig(width, self.lstm))
        for ratio in self.ratios:
            layers += [
                ActivationConfig(self.activation, width),
                TransposedConvConfig(
                    width,
                    width // 2,
                    2 * ratio,
                    ratio,
                    causal=self.causal,
                    trim_right_ratio=self.trim_right_ratio,
                    norm=self.norm,
                ),
            ]
            width //= 2
            layers += self._residuals(width)
        layers += [
            ActivationConfig(self.activation, width),
            self._conv(width, self.channels, self.last_kernel_size, few_outputs=True),
        ]
        if self.final_activation is not None:
            layers.append(ActivationConfig(self.final_activation, self.channels))
        return tuple(layers)


def layers_flops(layers: tuple[LayerConfig, ...], inputs: int) -> float:
    """Return forward FLOPs of one sequence through the layers."""
    total = 0.0
    for layer in layers:
        total += layer.flops(inputs)
        if isinstance(layer, ConvConfig | TransposedConvConfig):
            inputs = layer.length(inputs)
    return total


class Seanet(Module):
    """Layers in sequence; parameter `layers/n/...` is module n of audiocraft's nn.Sequential."""

    def __init__(self, layers: tuple[LayerConfig, ...], *, key: jax.Array):
        self.layers = ModuleList(
            [c.build(k) for c, k in zip(layers, jax.random.split(key, len(layers)))]
        )

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B S D"]:
        """Return the output of all layers."""
        return self.run(x, 0, len(self.layers))[0]

    def run(
        self, x: Float[Array, "B T C"], first: int, last: int, state: LstmState | None = None
    ) -> tuple[Float[Array, "B S D"], LstmState | None]:
        """Return the output of layers first..last-1 and the state of an LSTM among them."""
        for layer in list(self.layers)[first:last]:
            if isinstance(layer, Lstm):
                x, state = layer(x, state)
            else:
                x = shard(layer(x), "batch", None, None)
        return x, state

    @property
    def dtype(self) -> Any:
        """The dtype in which the layers compute: that of their parameters."""
        return jax.tree.leaves(self)[0].dtype


@dataclasses.dataclass(frozen=True)
class AudioAutoencoderConfig:
    """A waveform autoencoder.

    Attributes:
      seanet: both networks.
      sample_rate: Hz.
      bottleneck: "gaussian" (the encoder gives a mean and a scale) or "rvq".
      quantiser: of the "rvq" bottleneck; its `dim` must be the seanet's `dimension`.
      min_std: added to softplus(scale).
      initial_std: where the posterior's std begins; None leaves the last convolution as it is drawn,
        whose std near 0.7 drowns the small means of a new encoder for a long time.
    """

    seanet: SeanetConfig = SeanetConfig()
    sample_rate: int = 48_000
    bottleneck: Literal["gaussian", "rvq"] = "gaussian"
    quantiser: QuantiserConfig | AveragedQuantiserConfig | None = None
    min_std: float = 1e-4
    initial_std: float | None = None

    def __post_init__(self):
        if (self.bottleneck == "rvq") != (self.quantiser is not None):
            raise ValueError('give a quantiser for bottleneck="rvq", and only for it')
        if self.quantiser is not None and self.quantiser.dim != self.seanet.dimension:
            raise ValueError(
                f"quantiser.dim={self.quantiser.dim} and dimension={self.seanet.dimension} differ"
            )

    def build(self, key: jax.Array) -> "AudioAutoencoder":
        """Return the module with freshly drawn parameters."""
        return AudioAutoencoder(self, key=key)

    @property
    def frame_rate(self) -> float:
        """Latent frames a second."""
        return self.sample_rate / self.seanet.hop

    @property
    def bits_per_frame(self) -> float:
        """Bits of a quantised frame; infinite for a continuous bottleneck (see `Posterior.bits`)."""
        return math.inf if self.quantiser is None else self.quantiser.bits_per_frame

    def frames(self, samples: int) -> int:
        """Return the latent frames of a waveform: ceil(samples / hop)."""
        return -(-samples // self.seanet.hop)

    def encoder_layers(self) -> tuple[LayerConfig, ...]:
        """Return the encoder's layers in order."""
        return self.seanet.encoder_layers(
            self.seanet.dimension * (2 if self.bottleneck == "gaussian" else 1)
        )

    def decoder_layers(self) -> tuple[LayerConfig, ...]:
        """Return the decoder's layers in order."""
        return self.seanet.decoder_layers()

    def num_params(self) -> int:
        """Return the exact number of parameters."""
        layers = (*self.encoder_layers(), *self.decoder_layers())
        quantiser = 0 if self.quantiser is None else self.quantiser.num_params()
        return sum(layer.num_params() for layer in layers) + quantiser

    def forward_flops(self, batch: int, samples: int) -> float:
        """Return FLOPs of encoding and decoding `batch` waveforms, two per multiply-add."""
        frames = self.frames(samples)
        total = layers_flops(self.encoder_layers(), samples)
        total += layers_flops(self.decoder_layers(), frames)
        total += 0.0 if self.quantiser is None else self.quantiser.flops(frames)
        return batch * total

    def train_flops(self, batch: int, samples: int) -> float:
        """Return FLOPs of one training step of the autoencoder: three forward passes' worth."""
        return 3.0 * self.forward_flops(batch, samples)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
    """A Gaussian for every latent value, both float32 [B, T, L]; std is 0 for "rvq".

    The leaves may also be shapes, or NumPy's arrays from `seanet_streaming`.
    """

    mean_BTL: Any
    std_BTL: Any

    def sample(self, key: jax.Array) -> Float[Array, "B T L"]:
        """Return mean + std eps."""
        noise = jax.random.normal(key, self.mean_BTL.shape, jnp.float32)
        return self.mean_BTL + self.std_BTL * noise

    def kl(self) -> Float[Array, ""]:
        """Return the mean over batch and frames of sum_L (mean^2 + std^2 - log std^2 - 1).

        That is twice the KL divergence from N(0, 1) in nats, as Stable Audio's VAE has it
        (melodyflow.md 2.1).
        """
        terms = self.mean_BTL**2 + self.std_BTL**2 - 2.0 * jnp.log(self.std_BTL) - 1.0
        return terms.sum(axis=-1).mean()

    def bits(self) -> Float[Array, ""]:
        """Return the mean KL divergence from N(0, 1) of a frame in bits: what a frame can carry."""
        return self.kl() / (2.0 * math.log(2.0))


class AudioAutoencoder(Module):
    """Encoder, bottleneck, decoder; buffers hold each latent channel's mean and deviation."""

    def __init__(self, config: AudioAutoencoderConfig, *, key: jax.Array):
        e, d, q = jax.random.split(key, 3)
        width = config.seanet.dimension
        self.config = config
        self.encoder = Seanet(config.encoder_layers(), key=e)
        if config.initial_std is not None and config.bottleneck == "gaussian":
            last: Any = self.encoder.layers[len(config.encoder_layers()) - 1]
            scale = jnp.full(width, jnp.log(jnp.expm1(config.initial_std)))
            started = jnp.concatenate([last.bias[...][:width], scale])
            last.bias = parameter(started, last.bias.get_metadata("axes"))
        self.decoder = Seanet(config.decoder_layers(), key=d)
        quantiser = config.quantiser
        self.quantiser = None if quantiser is None else quantiser.build(q)
        self.latent_mean = buffer(jnp.zeros(width), ("norm",))
        self.latent_std = buffer(jnp.ones(width), ("norm",))
        # Batches that the two running statistics have seen, with the decay of their average.
        self.latent_count = buffer(jnp.zeros(()), ())

    def encode(self, wave_BTC: Float[Array, "B T C"]) -> Posterior:
        """Return the posterior of ceil(T / hop) frames.

        The mean of a "rvq" autoencoder is not quantised yet: see `quantise`.
        """
        return self.posterior(self.encoder(wave_BTC.astype(self.encoder.dtype)))

    def posterior(self, encoded_BTE: Float[Array, "B T E"]) -> Posterior:
        """Return the posterior for the encoder's output: std = softplus(scale) + min_std."""
        encoded = encoded_BTE.astype(jnp.float32)
        if self.config.bottleneck == "rvq":
            return Posterior(encoded, jnp.zeros_like(encoded))
        mean, scale = jnp.split(encoded, 2, axis=-1)
        return Posterior(mean, jax.nn.softplus(scale) + self.config.min_std)

    def quantise(self, latents_BTL: Float[Array, "B T L"]) -> Quantised:
        """Return the codes of latents and what they stand for.

        Raises:
          ValueError: the bottleneck is continuous.
        """
        if self.quantiser is None:
            raise ValueError("a Gaussian bottleneck has no codes")
        return self.quantiser(latents_BTL)

    def decode(self, latents_BTL: Float[Array, "B T L"]) -> Float[Array, "B S C"]:
        """Return the float32 waveform of T hop samples; cut it to the original length if shorter."""
        return self.decoder(latents_BTL.astype(self.decoder.dtype)).astype(jnp.float32)

    def standardise(self, latents: Float[Array, "... L"]) -> Float[Array, "... L"]:
        """Return (latents - mean) / (std + 1e-5) by the tracked statistics of each channel."""
        return (latents - self.latent_mean[...]) / (self.latent_std[...] + 1e-5)

    def unstandardise(self, latents: Float[Array, "... L"]) -> Float[Array, "... L"]:
        """Invert `standardise`."""
        return latents * (self.latent_std[...] + 1e-5) + self.latent_mean[...]

    def frames(self, samples: int) -> int:
        """Return the latent frames of a waveform."""
        return self.config.frames(samples)
