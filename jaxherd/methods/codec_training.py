"""Training a codec: reconstruction alone, or with a discriminator in two phases of a step.

The gradient of the balanced losses is taken at the decoder's output, put together there, and sent
back through the network by a loss that is linear in the output:

    loss = <stop_gradient(G), output> + w_kl KL + w_q quantiser loss

Source: melodyflow.md 2.2.  Batch field: "audio", float32 [B, T, C].

Axis letters: B batch, T samples, C audio channels, L latent width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import Module, Tree
from jaxherd.layers.spectral import Stereo
from jaxherd.methods import codec_losses as losses
from jaxherd.methods.balancer import Balancer, BalancerConfig, debiased, updated
from jaxherd.methods.stft_loss import MultiScaleStft, multi_scale_stft
from jaxherd.models.seanet import AudioAutoencoder, AudioAutoencoderConfig, Posterior
from jaxherd.models.stft_discriminator import StftDiscriminatorConfig, Verdict
from jaxherd.training.metrics import Metrics, pair
from jaxherd.training.optimizers import Optimizer
from jaxherd.training.phases import Phase
from jaxherd.weights.registry import CONFIG_CLASSES

WAVEFORM_LOSSES = {"l1": losses.waveform_l1, "relative": losses.waveform_relative}
# Slots of the balancer, in the order of its buffers; models without the last are still about.
BALANCED = ("adversarial", "feature", "waveform", "mel")
WITH_STFT = (*BALANCED, "stft")


@dataclasses.dataclass(frozen=True)
class CodecTrainingConfig:
    """What is trained together.

    Attributes:
      autoencoder: the codec.
      discriminator: None for reconstruction alone.
      stft_slot: the balancer has a place for the multi-scale STFT loss.  It is part of a checkpoint's
        shape, so that models from before that loss need it to be off.
    """

    autoencoder: AudioAutoencoderConfig
    discriminator: StftDiscriminatorConfig | None = StftDiscriminatorConfig()
    stft_slot: bool = False

    def build(self, key: jax.Array) -> "CodecTraining":
        """Return the module with freshly drawn parameters."""
        return CodecTraining(self, key=key)

    def num_params(self) -> int:
        """Return the number of parameters, the discriminator's included."""
        critic = 0 if self.discriminator is None else self.discriminator.num_params()
        return self.autoencoder.num_params() + critic

    def train_flops(self, batch: int, samples: int) -> float:
        """Return FLOPs of one step.

        Without a discriminator three forward passes' worth.  With one: the first phase is a forward
        pass of the autoencoder and three passes' worth of the discriminator for recordings and
        outputs each; the second is three passes' worth of the autoencoder, and of the
        discriminator two forward passes and two gradients with respect to its input.
        """
        codec = self.autoencoder.forward_flops(batch, samples)
        if self.discriminator is None:
            return 3.0 * codec
        channels = self.autoencoder.seanet.channels
        critic = self.discriminator.forward_flops(batch, samples, channels)
        return 4.0 * codec + 10.0 * critic


# So that the model of a codec's stage can be loaded wherever this file is imported.
CONFIG_CLASSES.append(CodecTrainingConfig)


class CodecTraining(Module):
    """The autoencoder, its discriminator and the balancer's averages."""

    def __init__(self, config: CodecTrainingConfig, *, key: jax.Array):
        a, d = jax.random.split(key)
        self.config = config
        self.autoencoder = config.autoencoder.build(a)
        critic = config.discriminator
        self.discriminator = None if critic is None else critic.build(d)
        self.balancer = Balancer(WITH_STFT if config.stft_slot else BALANCED)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """One pass through the codec.

    Attributes:
      wave_BTC: the output, as long as the input.
      posterior: of the latents.
      quantiser_loss: zero for a Gaussian bottleneck.
      metrics: of the bottleneck.
    """

    wave_BTC: jax.Array
    posterior: Posterior
    quantiser_loss: jax.Array
    metrics: Metrics


def reconstruct(
    autoencoder: AudioAutoencoder, audio_BTC: Float[Array, "B T C"], key: jax.Array | None
) -> Reconstruction:
    """Return the codec's output; latents are sampled with `key`, or the means when it is None.

    Raises:
      JaxherdError: the audio has another number of channels than the codec.
    """
    channels = autoencoder.config.seanet.channels
    if audio_BTC.shape[2] != channels:
        raise JaxherdError(
            f"batch field 'audio' has {audio_BTC.shape[2]} channels and the codec {channels}: "
            "change the data's channels or seanet.channels."
        )
    posterior = autoencoder.encode(audio_BTC)
    quantiser_loss, metrics = jnp.zeros(()), {}
    if autoencoder.quantiser is not None:
        quantised = autoencoder.quantise(posterior.mean_BTL)
        latents_BTL, quantiser_loss = quantised.latents_BTL, quantised.loss
        metrics["bits_per_frame"] = pair(autoencoder.config.bits_per_frame, 1.0)
        metrics["perplexity"] = pair(quantised.perplexity_Q.mean(), 1.0)
        for name, value in quantised.buffers.items():
            metrics[f"buffers/autoencoder/quantiser/{name}"] = pair(value, 1.0)
    else:
        latents_BTL = posterior.mean_BTL if key is None else posterior.sample(key)
        metrics["bits_per_frame"] = pair(posterior.bits(), 1.0)
    frames = float(latents_BTL.shape[0] * latents_BTL.shape[1])
    weight = jnp.full(latents_BTL.shape[-1:], frames)
    metrics["latent/mean"] = pair(latents_BTL.sum(axis=(0, 1)), weight)
    metrics["latent/square"] = pair(jnp.square(latents_BTL).sum(axis=(0, 1)), weight)
    wave_BTC = autoencoder.decode(latents_BTL)[:, : audio_BTC.shape[1]]
    return Reconstruction(wave_BTC, posterior, quantiser_loss, metrics)


@dataclasses.dataclass(frozen=True)
class ReconstructionCodec:
    """Waveform, mel and STFT losses, balanced, with the KL or the quantiser's loss beside them.

    Attributes:
      weights: of the losses.
      mel: the multi-scale mel loss.
      balancer: how gradients are put together.
      sample: draw latents from the posterior (training) or take its mean (evaluation).
      relative_features: see `codec_losses.feature_matching`.
      latent_decay: of the tracked mean and deviation of the latents; not published.
      waveform_loss: "l1" as audiocraft, or "relative" (`codec_losses.waveform_relative`).
      stft: the multi-scale STFT loss, where `weights.stft` is positive.
      stereo: "mid_side" lets the mel and STFT losses see L, R, mid and side, "separate" L and R
        alone; which the paper's codec does is not known (melodyflow.md 2.2).  The discriminators'
        is `StftDiscriminatorConfig.stereo`.
    """

    weights: losses.LossWeights = losses.LossWeights()
    mel: losses.MultiScaleMel = losses.MultiScaleMel()
    balancer: BalancerConfig = BalancerConfig()
    sample: bool = True
    relative_features: bool = False
    latent_decay: float = 0.99
    waveform_loss: Literal["l1", "relative"] = "l1"
    stft: MultiScaleStft = MultiScaleStft()
    stereo: Stereo = "mid_side"

    def __call__(
        self, model: CodecTraining, batch: Mapping[str, Any], key: jax.Array, *, frozen: Any = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss, whose gradient is the balanced one, and the metrics."""
        return self._loss(model, batch["audio"], key, adversarial=False)

    def evaluation(self) -> "ReconstructionCodec":
        """Return the objective for held-out data: the latents' means."""
        return dataclasses.replace(self, sample=False)

    def train_flops(self, model: CodecTrainingConfig, spec: Mapping[str, Any]) -> float:
        """Return FLOPs of one step over batches of this description."""
        batch, samples = spec["audio"].shape[:2]
        return model.train_flops(batch, samples)

    def update_buffers(self, buffers: Tree, metrics: Metrics) -> Tree:
        """Return the buffers after a step: averaged gradient norms and latent statistics."""
        names = WITH_STFT[: buffers["balancer"]["norms"].shape[0]]
        norms = {
            name: _value(metrics[f"gradient_norm/{name}"])
            for name in names
            if f"gradient_norm/{name}" in metrics
        }
        codec = buffers["autoencoder"]
        mean, square = _value(metrics["latent/mean"]), _value(metrics["latent/square"])
        old_mean, old_std = codec["latent_mean"], codec["latent_std"]
        moments, count = debiased(
            jnp.stack([old_mean, jnp.square(old_std) + jnp.square(old_mean)]),
            codec["latent_count"],
            jnp.stack([mean, square]),
            self.latent_decay,
        )
        std = jnp.sqrt(jnp.maximum(moments[1] - jnp.square(moments[0]), 0.0))
        codec = {**codec, "latent_mean": moments[0], "latent_std": std, "latent_count": count}
        balancer = updated(buffers["balancer"], names, norms, self.balancer.ema_decay)
        return {**buffers, "autoencoder": codec, "balancer": balancer}

    def _loss(self, model, audio_BTC, key, *, adversarial: bool):
        weights, config = self.weights, model.autoencoder.config
        if weights.stft > 0 and not model.config.stft_slot:
            raise JaxherdError(
                f"weights.stft is {weights.stft} and the model's balancer has no slot for that loss: "
                "set stft_slot of the CodecTrainingConfig, or the weight to 0."
            )
        audio_BTC, stereo = audio_BTC.astype(jnp.float32), self.stereo
        output = reconstruct(model.autoencoder, audio_BTC, key if self.sample else None)
        parts: list[tuple[tuple[str, ...], Callable]] = [
            (("waveform",), lambda y: (WAVEFORM_LOSSES[self.waveform_loss](y, audio_BTC),)),
            (
                ("mel",),
                lambda y: (
                    losses.multi_scale_mel(y, audio_BTC, self.mel, config.sample_rate, stereo),
                ),
            ),
        ]
        if weights.stft > 0:
            parts.append(
                (("stft",), lambda y: (multi_scale_stft(y, audio_BTC, self.stft, stereo),))
            )
        if adversarial:
            parts.append((("adversarial", "feature"), self._judged(model, audio_BTC)))
        values, gradients = _gradients(parts, output.wave_BTC, weights)
        shares = {name: getattr(weights, name) for name in gradients}
        scales, norms = model.balancer.scales(self.balancer, shares, gradients)
        combined = sum(scales[name] * gradients[name] for name in gradients)
        other = weights.quantiser * output.quantiser_loss
        batch = float(audio_BTC.shape[0])
        metrics: Metrics = dict(output.metrics)
        if config.bottleneck == "gaussian":
            kl = output.posterior.kl()
            other = other + weights.kl * kl
            metrics["kl"] = pair(kl * batch, batch)
        else:
            metrics["quantiser"] = pair(output.quantiser_loss * batch, batch)
        # The surrogate has the right gradient and a value without meaning; what is shown is the
        # losses' mean by their weights, which compares from step to step.
        surrogate = jnp.sum(jax.lax.stop_gradient(combined) * output.wave_BTC)
        shown = sum(shares[name] * values[name] for name in gradients) / sum(shares.values())
        loss = other + surrogate + jax.lax.stop_gradient(shown - surrogate)
        for name, value in values.items():
            metrics[name] = pair(value * batch, batch)
        for name, norm in norms.items():
            metrics[f"gradient_norm/{name}"] = pair(norm * batch, batch)
        stopped = jax.lax.stop_gradient(output.wave_BTC)
        snr = losses.snr_db(stopped, audio_BTC)
        metrics["snr_db"] = pair(snr.sum(), batch)
        distance = losses.mel_distance(stopped, audio_BTC, losses.mel_metric(config.sample_rate))
        metrics["mel_distance"] = pair(distance.sum(), batch)
        metrics["loss"] = pair(loss * batch, batch)
        return loss, metrics

    def _judged(self, model, audio_BTC) -> Callable:
        """Return output -> (adversarial, feature) losses; the discriminator is held fixed."""
        critic = jax.tree.map(jax.lax.stop_gradient, model.discriminator)
        real: Verdict = critic(audio_BTC)

        def judge(wave_BTC):
            fake = critic(wave_BTC)
            feature = losses.feature_matching(real, fake, relative=self.relative_features)
            return losses.hinge_generator(fake), feature

        return judge


@dataclasses.dataclass(frozen=True)
class DiscriminatorObjective:
    """The discriminator's hinge loss on recordings and on the codec's outputs."""

    sample: bool = True

    def __call__(
        self, model: CodecTraining, batch: Mapping[str, Any], key: jax.Array, *, frozen: Any = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss of the discriminator; the codec gets no gradient."""
        if model.discriminator is None:
            raise JaxherdError(
                "adversarial training needs a discriminator: set CodecTrainingConfig.discriminator "
                "or use ReconstructionCodec."
            )
        audio_BTC = batch["audio"].astype(jnp.float32)
        codec = jax.tree.map(jax.lax.stop_gradient, model.autoencoder)
        output = reconstruct(codec, audio_BTC, key if self.sample else None)
        real, fake = model.discriminator(audio_BTC), model.discriminator(output.wave_BTC)
        loss, weight = losses.hinge_discriminator(real, fake), float(audio_BTC.shape[0])
        scores = {"real": real.logits, "fake": fake.logits}
        metrics = {
            f"discriminator/{name}": pair(jnp.stack([x.mean() for x in logits]).mean(), 1.0)
            for name, logits in scores.items()
        }
        metrics["loss"] = pair(loss * weight, weight)
        return loss, metrics


@dataclasses.dataclass(frozen=True)
class AutoencoderObjective(ReconstructionCodec):
    """All losses of the codec against the discriminator as it is."""

    def __call__(
        self, model: CodecTraining, batch: Mapping[str, Any], key: jax.Array, *, frozen: Any = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss of the codec, whose gradient is the balanced one, and the metrics."""
        if model.discriminator is None:
            raise JaxherdError(
                "adversarial training needs a discriminator: set CodecTrainingConfig.discriminator "
                "or use ReconstructionCodec."
            )
        return self._loss(model, batch["audio"], key, adversarial=True)


@dataclasses.dataclass(frozen=True)
class AdversarialCodec(AutoencoderObjective):
    """Each step updates the discriminator and then the codec, which sees the updated one.

    Called directly it gives the codec's losses and metrics (use `evaluation()` for held-out data).

    Attributes:
      discriminator_optimizer: the stage's own when None.
    """

    discriminator_optimizer: Optimizer | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The two updates of a step, in order."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(AutoencoderObjective)}
        return (
            Phase(
                "discriminator",
                ("discriminator/",),
                DiscriminatorObjective(self.sample),
                self.discriminator_optimizer,
            ),
            Phase("autoencoder", ("autoencoder/",), AutoencoderObjective(**fields)),
        )


def _gradients(parts, wave_BTC, weights):
    """Return (values, gradients at the output) of all losses with a positive weight."""
    wave_BTC = jax.lax.stop_gradient(wave_BTC)
    values, gradients = {}, {}
    for names, function in parts:
        found, pull = jax.vjp(function, wave_BTC)
        for index, name in enumerate(names):
            values[name] = found[index]
            if getattr(weights, name) > 0:
                one = tuple(jnp.asarray(float(i == index), v.dtype) for i, v in enumerate(found))
                (gradients[name],) = pull(one)
    return values, gradients


def _value(metric) -> jax.Array:
    return metric[0] / jnp.maximum(metric[1], 1e-9)
