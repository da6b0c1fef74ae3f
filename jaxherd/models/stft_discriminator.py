"""The multi-scale STFT discriminator of EnCodec: two-dimensional convolutions over complex spectra.

One network for each transform size; its input channels are the real and then the imaginary parts.

Axis letters: B batch, T samples, C audio channels, V views of a stereo signal, F frames, N bins.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.modules import Module, ModuleList
from jaxherd.core.sharding import shard
from jaxherd.layers.conv import Norm
from jaxherd.layers.conv2d import Conv2dConfig
from jaxherd.layers.spectral import Stereo, StftConfig, stereo_views, stft


@dataclasses.dataclass(frozen=True)
class StftDiscriminatorConfig:
    """Defaults are audiocraft's (melodyflow.md 2.2).

    Attributes:
      n_ffts: transform sizes; the window is as long and the hop a quarter.
      filters: channels of the first convolution.
      filters_scale, max_filters: growth of the channels from layer to layer, and its limit.
      kernel_size: (time, frequency) of all but the last two convolutions, which have
        (time, time).
      dilations: in time, of the convolutions that halve the frequency axis.
      frequency_stride: of those convolutions.
      negative_slope: of LeakyReLU.
      norm, first_norm: of the kernels; audiocraft leaves the first one without.
      normalized: divide spectra by the window's root sum of squares.
      stereo: "mid_side" looks at L, R, mid and side as separate examples (a choice of this
        library, melodyflow.md 2.2); "separate" at L and R.
    """

    n_ffts: tuple[int, ...] = (1024, 2048, 512, 256, 128)
    filters: int = 32
    filters_scale: int = 1
    max_filters: int = 1024
    kernel_size: tuple[int, int] = (3, 9)
    dilations: tuple[int, ...] = (1, 2, 4)
    frequency_stride: int = 2
    negative_slope: float = 0.3
    norm: Norm = "weight_norm"
    first_norm: Norm = "none"
    normalized: bool = True
    stereo: Stereo = "mid_side"

    def build(self, key: jax.Array) -> "StftDiscriminator":
        """Return the module with freshly drawn parameters."""
        return StftDiscriminator(self, key=key)

    def transform(self, n_fft: int) -> StftConfig:
        """Return the transform of one scale."""
        return StftConfig(n_fft, padding="none", normalized=self.normalized)

    def layers(self) -> tuple[Conv2dConfig, ...]:
        """Return the convolutions of one scale; the last gives the logits."""

        def width(layer: int) -> int:
            return min(self.filters_scale**layer * self.filters, self.max_filters)

        square = (self.kernel_size[0], self.kernel_size[0])
        layers = [Conv2dConfig(2, self.filters, self.kernel_size, norm=self.first_norm)]
        inputs = width(1)
        if inputs != self.filters:
            # Audiocraft's first layer has `filters` outputs and its second expects them scaled.
            raise ValueError("filters_scale above 1 does not fit the first layer's outputs")
        for index, dilation in enumerate(self.dilations):
            outputs = width(index + 1)
            layers.append(
                Conv2dConfig(
                    inputs,
                    outputs,
                    self.kernel_size,
                    stride=(1, self.frequency_stride),
                    dilation=(dilation, 1),
                    norm=self.norm,
                )
            )
            inputs = outputs
        outputs = width(len(self.dilations) + 1)
        layers.append(Conv2dConfig(inputs, outputs, square, norm=self.norm))
        layers.append(Conv2dConfig(outputs, 1, square, norm=self.norm, few_outputs=True))
        return tuple(layers)

    def views(self, channels: int) -> int:
        """Return the examples that one waveform of `channels` channels becomes."""
        return 4 if channels == 2 and self.stereo == "mid_side" else channels

    def num_params(self) -> int:
        """Return the number of parameters."""
        return len(self.n_ffts) * sum(layer.num_params() for layer in self.layers())

    def forward_flops(self, batch: int, samples: int, channels: int) -> float:
        """Return FLOPs of the convolutions for `batch` waveforms, two per multiply-add."""
        total = 0.0
        for n_fft in self.n_ffts:
            transform = self.transform(n_fft)
            size = (transform.frames(samples), transform.bins)
            for layer in self.layers():
                total += layer.flops(*size)
                size = layer.size(*size)
        return batch * self.views(channels) * total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the discriminator says, all float32.

    Attributes:
      logits: of each scale, [B V, F, N', 1]; high for recordings.
      features: of each scale, the activations after every convolution but the last.

    The leaves may also be shapes.
    """

    logits: tuple[Any, ...]
    features: tuple[tuple[Any, ...], ...]


class ScaleDiscriminator(Module):
    """The convolutions of one transform size."""

    def __init__(self, config: StftDiscriminatorConfig, n_fft: int, *, key: jax.Array):
        layers = config.layers()
        self.transform = config.transform(n_fft)
        self.negative_slope = config.negative_slope
        keys = jax.random.split(key, len(layers))
        self.layers = ModuleList([layer.build(k) for layer, k in zip(layers, keys)])

    def __call__(self, x_BT: Float[Array, "B T"]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Return (logits, features)."""
        spectrum_BFN = stft(x_BT, self.transform)
        z = jnp.stack([spectrum_BFN.real, spectrum_BFN.imag], axis=-1)
        *hidden, last = self.layers
        z = z.astype(last.bias[...].dtype)
        features = []
        for layer in hidden:
            z = shard(jax.nn.leaky_relu(layer(z), self.negative_slope), "batch", None, None, None)
            features.append(z.astype(jnp.float32))
        return last(z).astype(jnp.float32), tuple(features)


class StftDiscriminator(Module):
    """All scales."""

    def __init__(self, config: StftDiscriminatorConfig, *, key: jax.Array):
        self.config = config
        keys = jax.random.split(key, len(config.n_ffts))
        self.scales = ModuleList(
            [ScaleDiscriminator(config, n, key=k) for n, k in zip(config.n_ffts, keys)]
        )

    def __call__(self, wave_BTC: Float[Array, "B T C"]) -> Verdict:
        """Return logits and features of every scale.

        Raises:
          JaxherdError: the waveform is shorter than the largest transform.
        """
        views_BVT = stereo_views(wave_BTC, self.config.stereo)
        x_BT = views_BVT.reshape(-1, views_BVT.shape[-1])
        found = [scale(x_BT) for scale in self.scales]
        return Verdict(tuple(logits for logits, _ in found), tuple(maps for _, maps in found))
