"""What a codec's output is judged by: waveform, mel spectra at several scales, a discriminator.

Sources: melodyflow.md 2.2, whose defaults are audiocraft's.

Axis letters: B batch, T samples, C audio channels.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.layers.spectral import (
    MelConfig,
    Stereo,
    StftConfig,
    log_mel,
    mel_spectrogram,
    stereo_views,
)
from jaxherd.models.stft_discriminator import Verdict


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Shares of the balanced losses, and factors of the two outside the balancer.

    MelodyFlow's own weights are not published; these are audiocraft's, and Stable Audio's for the
    KL (melodyflow.md 2.1, 2.2).

    Attributes:
      adversarial, feature, waveform, mel: shares of the losses that are always there.
      stft: share of the multi-scale STFT loss, which is not computed at zero.  Whether MelodyFlow has
        that loss is not published, nor is its weight; a model needs a slot in its balancer for it
        (`CodecTrainingConfig.stft_slot`).
      kl, quantiser: factors.
    """

    adversarial: float = 4.0
    feature: float = 4.0
    waveform: float = 0.1
    mel: float = 2.0
    kl: float = 1e-4
    quantiser: float = 1.0
    stft: float = 0.0


@dataclasses.dataclass(frozen=True)
class MultiScaleMel:
    """Mel distance averaged over window sizes 2 ** e.

    For every size: mean |M(x) - M(y)| + alpha mean (log10 M(x) - log10 M(y))^2, where M are
    energies in mel bands; the sum over sizes is divided by the sum of 1 + alpha.

    Attributes:
      exponents: e.  The spec says 6 to 11; audiocraft's loop over range(6, 11) stops at 10.
      n_mels, f_min, f_max: bands; hop is a quarter of the window.
      floor: added before the logarithm.
      normalized: spectra are divided by the window's root sum of squares.
      log_weight: alpha.
    """

    exponents: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    n_mels: int = 64
    f_min: float = 64.0
    f_max: float | None = None
    floor: float = 1e-5
    normalized: bool = True
    log_weight: float = 1.0

    def scales(self, sample_rate: int) -> list[MelConfig]:
        """Return the spectrogram of every window size."""
        return [
            MelConfig(
                sample_rate,
                StftConfig(2**e, padding="same", normalized=self.normalized),
                n_mels=self.n_mels,
                f_min=self.f_min,
                f_max=self.f_max,
                log="log10",
                floor=self.floor,
            )
            for e in self.exponents
        ]


def multi_scale_mel(
    output_BTC: Float[Array, "B T C"],
    target_BTC: Float[Array, "B T C"],
    config: MultiScaleMel,
    sample_rate: int,
    stereo: Stereo = "mid_side",
) -> Float[Array, ""]:
    """Return the distance, averaged over a stereo signal's L, R, mid and side, or L and R alone."""
    # Both signals go through one transform: half as many, twice as large.
    both = stereo_views(jnp.concatenate([output_BTC, target_BTC]), stereo)
    total = jnp.zeros(())
    for scale in config.scales(sample_rate):
        output, target = jnp.split(mel_spectrogram(both, scale), 2)
        total += jnp.mean(jnp.abs(output - target))
        logs = scale.log_of(output) - scale.log_of(target)
        total += config.log_weight * jnp.mean(jnp.square(logs))
    return total / (len(config.exponents) * (1.0 + config.log_weight))


def waveform_l1(
    output_BTC: Float[Array, "B T C"], target_BTC: Float[Array, "B T C"]
) -> Float[Array, ""]:
    """Return mean |output - target|."""
    return jnp.mean(jnp.abs(output_BTC - target_BTC))


def waveform_relative(
    output_BTC: Float[Array, "B T C"], target_BTC: Float[Array, "B T C"]
) -> Float[Array, ""]:
    """Return the mean over rows of mean (output - target)^2 / (mean target^2 + 1e-4).

    The floor, 40 dB below full scale, keeps quiet rows from outweighing all others.

    Squares ask for the loud parts first, where L1 of a weak guess is least at silence: the form that
    a short training learns from.
    """
    error_B = jnp.square(output_BTC - target_BTC).mean(axis=(1, 2))
    return jnp.mean(error_B / (jnp.square(target_BTC).mean(axis=(1, 2)) + 1e-4))


def hinge_discriminator(real: Verdict, fake: Verdict) -> Float[Array, ""]:
    """Return the mean over scales of mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))."""
    return _mean(
        jnp.mean(jax.nn.relu(1.0 - r)) + jnp.mean(jax.nn.relu(1.0 + f))
        for r, f in zip(real.logits, fake.logits)
    )


def hinge_generator(fake: Verdict) -> Float[Array, ""]:
    """Return the mean over scales of -mean D(fake)."""
    return _mean(-jnp.mean(logits) for logits in fake.logits)


def feature_matching(real: Verdict, fake: Verdict, *, relative: bool = False) -> Float[Array, ""]:
    """Return mean |features(real) - features(fake)|, averaged over layers and then scales.

    Args:
      relative: divide each layer's distance by mean |features(real)|, as the EnCodec paper writes
        it.  Audiocraft's code computes that size and does not use it.
    """

    def distance(r: jax.Array, f: jax.Array) -> jax.Array:
        size = jnp.mean(jnp.abs(r)) + 1e-8 if relative else 1.0
        return jnp.mean(jnp.abs(r - f)) / size

    return _mean(
        _mean(distance(r, f) for r, f in zip(reals, fakes))
        for reals, fakes in zip(real.features, fake.features)
    )


def _mean(values) -> jax.Array:
    found: Sequence[jax.Array] = list(values)
    return jnp.stack(found).mean()


def snr_db(
    output_BTC: Float[Array, "B T C"], target_BTC: Float[Array, "B T C"]
) -> Float[Array, " B"]:
    """Return 10 log10(sum target^2 / sum (target - output)^2) of each example, in dB."""
    signal = jnp.sum(jnp.square(target_BTC), axis=(1, 2))
    noise = jnp.sum(jnp.square(target_BTC - output_BTC), axis=(1, 2))
    return 10.0 * jnp.log10((signal + 1e-12) / (noise + 1e-12))


def mel_metric(sample_rate: int) -> MelConfig:
    """Return the spectrogram of the reported mel distance (audiocraft's `mel`)."""
    stft = StftConfig(1024, 256, padding="same")
    return MelConfig(sample_rate, stft, n_mels=64, f_min=64.0, log="log10", floor=1e-5)


def mel_distance(
    output_BTC: Float[Array, "B T C"], target_BTC: Float[Array, "B T C"], config: MelConfig
) -> Float[Array, " B"]:
    """Return the mean absolute difference of log-mel spectra of each example."""
    output = log_mel(jnp.swapaxes(output_BTC, 1, 2), config)
    target = log_mel(jnp.swapaxes(target_BTC, 1, 2), config)
    return jnp.abs(output - target).mean(axis=(1, 2, 3))
