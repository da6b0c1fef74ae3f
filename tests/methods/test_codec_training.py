"""The balancer's shares, the losses' definitions, both phases' gradients, and a little training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxherd.core.config_io import from_dict, to_dict
from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, flatten, split
from jaxherd.layers.spectral import StftConfig
from jaxherd.methods import codec_losses as losses
from jaxherd.methods.balancer import Balancer, BalancerConfig, updated
from jaxherd.methods.codec_training import (
    BALANCED,
    WITH_STFT,
    AdversarialCodec,
    CodecTrainingConfig,
    ReconstructionCodec,
    reconstruct,
)
from jaxherd.methods.stft_loss import MultiScaleStft, multi_scale_stft
from jaxherd.models.codec_presets import averaged, quantised
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.stft_discriminator import StftDiscriminatorConfig, Verdict
from jaxherd.training import metrics as metrics_lib
from jaxherd.weights.registry import CONFIG_CLASSES

CODEC = AudioAutoencoderConfig(SeanetConfig(2, 4, 4, ratios=(4, 2), lstm=1), 8000)
CRITIC = StftDiscriminatorConfig(n_ffts=(64, 32), filters=4)
MEL = losses.MultiScaleMel(exponents=(5, 7), n_mels=8)
STFT = MultiScaleStft((StftConfig(64), StftConfig(32)))


def sines(batch: int = 3, samples: int = 512) -> jax.Array:
    t = np.arange(samples) / 8000
    hz = 300.0 * (1 + np.arange(batch))[:, None, None] * np.array([1.0, 1.5])
    wave = 0.3 * np.sin(2 * np.pi * hz * t[None, :, None])
    return jnp.asarray(wave + 0.1 * np.sin(2.3 * 2 * np.pi * hz * t[None, :, None]), jnp.float32)


def test_every_loss_gets_its_share_of_the_gradient():
    weights = {"adversarial": 4.0, "feature": 1.0, "waveform": 0.1, "mel": 2.0}
    random = np.random.RandomState(0)
    gradients = {
        name: jnp.asarray(10.0**-k * random.normal(size=(5, 7, 2)), jnp.float32)
        for k, name in enumerate(BALANCED)
    }
    balancer = Balancer(BALANCED)
    for config in (
        BalancerConfig(),
        BalancerConfig(batch_mean=False, total_norm=3.0),
        BalancerConfig(per_batch_item=False),
    ):
        scales, _ = balancer.scales(config, weights, gradients)
        parts = {name: np.asarray(scales[name] * gradients[name]) for name in gradients}
        if config.per_batch_item:
            norms = {n: np.sqrt((g**2).sum(axis=(1, 2))).mean() for n, g in parts.items()}
        else:
            norms = {n: np.sqrt((g**2).sum()) for n, g in parts.items()}
        factor = config.total_norm / (5 if config.batch_mean and config.per_batch_item else 1)
        for name, weight in weights.items():
            np.testing.assert_allclose(norms[name], factor * weight / 7.1, rtol=1e-5)
    scales, _ = balancer.scales(BalancerConfig(enabled=False), weights, gradients)
    assert {name: round(float(s), 4) for name, s in scales.items()} == weights


def test_norms_are_averaged_with_the_start_corrected():
    """As an exponential average divided by the sum of its weights, the current step included."""
    config, seen = BalancerConfig(ema_decay=0.9), np.array([2.0, 0.5, 3.0, 1.0])
    buffers = {"norms": jnp.zeros(2), "count": jnp.zeros(())}
    definition, params, _ = split(Balancer(("a", "b")))
    for step, norm in enumerate(seen):
        balancer = definition.merge(params, buffers)
        gradient = {"a": jnp.full((1, 1), norm)}
        scales, norms = balancer.scales(config, {"a": 1.0}, gradient)
        decays = 0.9 ** np.arange(step, -1, -1)
        average = (decays * seen[: step + 1]).sum() / decays.sum()
        np.testing.assert_allclose(scales["a"], 1.0 / average, rtol=1e-5)
        buffers = updated(buffers, ("a", "b"), norms, 0.9)
        np.testing.assert_allclose(buffers["norms"], [average, 0.0], rtol=1e-5)


def test_balancer_refuses_what_it_cannot_balance():
    balancer, ones = Balancer(("a",)), jnp.ones((1, 1))
    with pytest.raises(JaxherdError, match="no loss 'b'"):
        balancer.scales(BalancerConfig(), {"b": 1.0}, {"b": ones})
    with pytest.raises(JaxherdError, match="positive weight"):
        balancer.scales(BalancerConfig(), {"a": 0.0}, {"a": ones})


def test_losses_are_their_definitions():
    real = Verdict((jnp.array([0.5, 2.0]), jnp.array([-1.0])), ((jnp.ones(2), jnp.zeros(3)),) * 2)
    fake = Verdict((jnp.array([-2.0, 0.0]), jnp.array([0.5])), ((jnp.zeros(2), jnp.ones(3)),) * 2)
    # Scale 0: real mean(0.5, 0), fake mean(0, 1); scale 1: real 2, fake 1.5.
    np.testing.assert_allclose(losses.hinge_discriminator(real, fake), (0.25 + 0.5 + 2 + 1.5) / 2)
    np.testing.assert_allclose(losses.hinge_generator(fake), -(-1.0 + 0.5) / 2)
    np.testing.assert_allclose(losses.feature_matching(real, fake), 1.0)
    half = Verdict(real.logits, ((2 * jnp.ones(2),),))
    off = Verdict(real.logits, ((jnp.ones(2),),))
    np.testing.assert_allclose(losses.feature_matching(half, off, relative=True), 0.5, rtol=1e-5)
    wave = sines()
    np.testing.assert_allclose(losses.snr_db(0.9 * wave, wave), 20.0, rtol=1e-3)
    np.testing.assert_allclose(losses.waveform_l1(wave + 0.25, wave), 0.25, rtol=1e-5)
    silence = jnp.zeros_like(wave)  # a finite loss and gradient, at the floor of 1e-4
    loss, slope = jax.value_and_grad(losses.waveform_relative)(silence + 0.01, silence)
    np.testing.assert_allclose(loss, 1.0, rtol=1e-5)
    assert np.isfinite(slope).all()


def test_multi_scale_mel_is_its_definition_and_sees_the_side_signal():
    from jaxherd.layers.spectral import mel_spectrogram, stereo_views

    x, y = sines(), jnp.roll(sines(), 1, axis=0)
    total = 0.0
    for scale in MEL.scales(8000):
        a, b = (np.asarray(mel_spectrogram(stereo_views(w), scale)) for w in (x, y))
        total += np.abs(a - b).mean() + ((np.log10(a + 1e-5) - np.log10(b + 1e-5)) ** 2).mean()
    np.testing.assert_allclose(losses.multi_scale_mel(x, y, MEL, 8000), total / 4, rtol=1e-4)
    assert float(losses.multi_scale_mel(x, x, MEL, 8000)) == 0.0
    # Turning one channel over leaves each channel's spectrum and changes mid and side.
    turned = x * jnp.array([1.0, -1.0])
    assert float(losses.multi_scale_mel(turned, x, MEL, 8000)) > 0.01
    assert float(losses.multi_scale_mel(turned, x, MEL, 8000, "separate")) < 1e-6


@pytest.fixture(scope="module")
def trained():
    """Definition and trees of a tiny codec with its discriminator."""
    return split(jax.jit(CodecTrainingConfig(CODEC, CRITIC).build)(jax.random.key(0)))


@pytest.fixture(scope="module")
def trained_stft():
    """The same with a slot for the STFT loss."""
    config = CodecTrainingConfig(CODEC, CRITIC, stft_slot=True)
    return split(jax.jit(config.build)(jax.random.key(0)))


def test_one_switch_takes_mid_and_side_out_of_all_spectral_losses(trained_stft):
    """Seen in the losses of one step, by what each of them is with and without."""
    definition, params, buffers = trained_stft
    objective = ReconstructionCodec(
        losses.LossWeights(kl=0.0, stft=1.0), MEL, sample=False, stft=STFT
    )
    audio = sines()
    model = definition.merge(params, buffers)
    output = reconstruct(model.autoencoder, audio, None).wave_BTC
    for stereo in ("mid_side", "separate"):
        chosen = dataclasses.replace(objective, stereo=stereo)
        metrics = jax.jit(lambda a, o=chosen: o(model, {"audio": a}, jax.random.key(0))[1])(audio)
        wanted = {
            "mel": losses.multi_scale_mel(output, audio, MEL, 8000, stereo),
            "stft": multi_scale_stft(output, audio, STFT, stereo),
            "waveform": losses.waveform_l1(output, audio),
        }
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name][0] / metrics[name][1], value, rtol=1e-4)
    assert abs(losses.multi_scale_mel(output, audio, MEL, 8000) / wanted["mel"] - 1) > 5e-4
    assert abs(multi_scale_stft(output, audio, STFT) / wanted["stft"] - 1) > 5e-4
    # The phases of adversarial training take the switch over.
    phases = AdversarialCodec(stereo="separate").phases
    assert phases[1].objective.stereo == "separate"


@pytest.mark.parametrize("stft", [0.0, 1.5])
def test_the_gradient_is_the_balanced_one(trained, trained_stft, stft):
    """Through the last bias, whose gradient is the sum over time of that at the output."""
    definition, params, buffers = trained_stft if stft else trained
    weights = losses.LossWeights(kl=0.0, stft=stft)
    objective = AdversarialCodec(weights, MEL, sample=False, stft=STFT)
    audio = sines()
    name = f"decoder/layers/{len(CODEC.decoder_layers()) - 1}/bias"

    @jax.jit
    def gradient(params):
        grads = jax.grad(
            lambda p: objective(definition.merge(p, buffers), {"audio": audio}, jax.random.key(1))[
                0
            ]
        )(params)
        return flatten(grads["autoencoder"])[name]

    @jax.jit
    def by_definition(params):
        model = definition.merge(params, buffers)
        output = reconstruct(model.autoencoder, audio, None).wave_BTC
        real = model.discriminator(audio)
        functions = {
            "adversarial": lambda y: losses.hinge_generator(model.discriminator(y)),
            "feature": lambda y: losses.feature_matching(real, model.discriminator(y)),
            "waveform": lambda y: losses.waveform_l1(y, audio),
            "mel": lambda y: losses.multi_scale_mel(y, audio, MEL, 8000),
            "stft": lambda y: multi_scale_stft(y, audio, STFT),
        }
        total = 0.0
        for name, weight in (
            ("adversarial", 4.0),
            ("feature", 4.0),
            ("waveform", 0.1),
            ("mel", 2.0),
            ("stft", stft),
        ):
            g = jax.grad(functions[name])(output)
            norm = jnp.sqrt(jnp.sum(g**2, axis=(1, 2))).mean()
            total += weight / (10.1 + stft) * g / norm / len(audio)
        return total.sum(axis=(0, 1))

    np.testing.assert_allclose(gradient(params), by_definition(params), rtol=1e-3, atol=1e-4)


def test_phases_own_everything_once_and_have_finite_gradients(trained):
    definition, params, buffers = trained
    objective = AdversarialCodec(mel=MEL)
    phases = objective.phases
    assert [phase.name for phase in phases] == ["discriminator", "autoencoder"]
    for name in flatten(params):
        assert sum(name.startswith(phase.owns) for phase in phases) == 1
    seen: set[str] = set()
    for phase in phases:

        @jax.jit
        def run(params, objective=phase.objective):
            model = lambda p: definition.merge(p, buffers)  # noqa: E731
            return jax.value_and_grad(
                lambda p: objective(model(p), {"audio": sines()}, jax.random.key(1)), has_aux=True
            )(params)

        (_, metrics), grads = run(params)
        assert not seen & (set(metrics) - {"loss"})
        seen |= set(metrics)
        for name, grad in flatten(grads).items():
            assert np.isfinite(grad).all(), name
            norm = float(jnp.abs(grad).sum())
            # While all logits are inside the hinge, real and fake may cancel in a late bias.
            cancels = phase.name == "discriminator" and name.endswith("bias")
            owned = name.startswith(phase.owns)
            assert (norm > 0) == owned or (cancels and owned), (phase.name, name, norm)
    assert {"snr_db", "mel_distance", "kl", "adversarial", "feature", "discriminator/real"} <= seen


def test_buffers_follow_the_latents_and_the_norms(trained):
    _, _, buffers = trained
    objective = ReconstructionCodec(latent_decay=0.5)
    random, batches = np.random.RandomState(0), []
    for _ in range(3):
        latents = random.normal(size=(40, 4)) * [1, 2, 3, 0] + [0, 1, -1, 5]
        batches.append(latents)
        weight = jnp.full(4, 40.0)
        metrics = {
            "latent/mean": (jnp.asarray(latents.sum(0), jnp.float32), weight),
            "latent/square": (jnp.asarray((latents**2).sum(0), jnp.float32), weight),
            "gradient_norm/mel": (jnp.asarray(6.0), jnp.asarray(3.0)),
        }
        buffers = objective.update_buffers(buffers, metrics)
    decays = np.array([0.25, 0.5, 1.0]) / 1.75
    mean = sum(d * b.mean(0) for d, b in zip(decays, batches))
    square = sum(d * (b**2).mean(0) for d, b in zip(decays, batches))
    codec = buffers["autoencoder"]
    np.testing.assert_allclose(codec["latent_mean"], mean, atol=1e-5)
    # The silent channel's variance is a difference of float32 squares near 25.
    np.testing.assert_allclose(codec["latent_std"], np.sqrt(square - mean**2), atol=5e-3)
    np.testing.assert_allclose(buffers["balancer"]["norms"], [0, 0, 0, 2.0], rtol=1e-5)


def test_a_model_has_a_slot_for_the_stft_loss_or_is_as_it_was(trained, trained_stft):
    """Checkpoints of models without it have four norms; the loss is told to need the fifth."""
    written = to_dict(CodecTrainingConfig(CODEC, None))
    del written["stft_slot"]  # as before there was such a loss
    assert from_dict(written, CONFIG_CLASSES, where="model") == CodecTrainingConfig(CODEC, None)
    audio, key = sines(), jax.random.key(1)
    (definition, params, old), (with_slot, _, new) = trained, trained_stft
    assert old["balancer"]["norms"].shape == (4,) and new["balancer"]["norms"].shape == (5,)
    objective = ReconstructionCodec(losses.LossWeights(stft=1.0), MEL, stft=STFT)

    def metrics_of(objective, definition, buffers):
        return jax.eval_shape(
            lambda p: objective(definition.merge(p, buffers), {"audio": audio}, key)[1], params
        )

    with pytest.raises(JaxherdError, match="set stft_slot"):
        metrics_of(objective, definition, old)
    assert {"stft", "gradient_norm/stft"} <= metrics_of(objective, with_slot, new).keys()
    plain = ReconstructionCodec(mel=MEL)
    assert "stft" not in metrics_of(plain, definition, old)
    found = {
        "latent/mean": (jnp.zeros(4), jnp.ones(4)),
        "latent/square": (jnp.ones(4), jnp.ones(4)),
        **{f"gradient_norm/{n}": (jnp.asarray(k + 1.0), 1.0) for k, n in enumerate(WITH_STFT)},
    }
    for buffers, count in ((old, 4), (new, 5)):
        norms = objective.update_buffers(buffers, found)["balancer"]["norms"]
        np.testing.assert_allclose(norms, np.arange(1.0, count + 1), rtol=1e-6)


def test_train_flops_count_both_phases():
    both, alone = CodecTrainingConfig(CODEC, CRITIC), CodecTrainingConfig(CODEC, None)
    codec = CODEC.forward_flops(3, 512)
    assert alone.train_flops(3, 512) == 3 * codec
    assert both.train_flops(3, 512) == 4 * codec + 10 * CRITIC.forward_flops(3, 512, 2)
    _, params, _ = split(abstract(both.build, jax.random.key(0)))
    assert both.num_params() == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_bad_setups_are_told():
    model = abstract(CodecTrainingConfig(CODEC, None).build, jax.random.key(0))
    mono = {"audio": jax.ShapeDtypeStruct((1, 512, 1), jnp.float32)}
    with pytest.raises(JaxherdError, match="1 channels and the codec 2"):
        jax.eval_shape(lambda m, b: ReconstructionCodec()(m, b, jax.random.key(0)), model, mono)
    stereo = {"audio": jax.ShapeDtypeStruct((1, 512, 2), jnp.float32)}
    with pytest.raises(JaxherdError, match="needs a discriminator"):
        jax.eval_shape(lambda m, b: AdversarialCodec()(m, b, jax.random.key(0)), model, stereo)


def train(config, objective, steps: int) -> list[dict]:
    """A loop as the trainer's: phases in turn, each at the parameters of the one before."""
    definition, params, buffers = split(jax.jit(config.build)(jax.random.key(0)))
    phases = getattr(objective, "phases", ()) or (None,)
    optimizer = optax.adam(3e-3, 0.5, 0.9)
    owned = [params if p is None else p.take(params)[0] for p in phases]
    states = [optimizer.init(tree) for tree in owned]

    @jax.jit
    def step(params, buffers, states, key):
        found = {}
        for index, phase in enumerate(phases):
            mine, rest = (params, {}) if phase is None else phase.take(params)
            run = objective if phase is None else phase.objective

            def loss(mine, phase=phase, rest=rest, run=run):
                whole = mine if phase is None else phase.put(mine, rest)
                return run(definition.merge(whole, buffers), {"audio": sines()}, key)

            grads, metrics = jax.grad(loss, has_aux=True)(mine)
            updates, states[index] = optimizer.update(grads, states[index], mine)
            mine = optax.apply_updates(mine, updates)
            params = mine if phase is None else phase.put(mine, rest)
            found |= metrics
        buffers, found = metrics_lib.taken(objective.update_buffers(buffers, found), found)
        return params, buffers, states, found

    history = []
    for number in range(steps):
        params, buffers, states, metrics = step(params, buffers, states, jax.random.key(number))
        history.append({k: float(s / w) for k, (s, w) in metrics.items() if jnp.ndim(s) == 0})
    assert float(buffers["autoencoder"]["latent_count"]) > 10
    return history


@pytest.mark.parametrize(
    "kind", ["gaussian", "adversarial", "averaged", pytest.param("rvq", marks=pytest.mark.slow)]
)
def test_a_few_steps_learn_something(kind):
    if kind == "adversarial":
        weights = losses.LossWeights(adversarial=0.5, feature=0.5, stft=0.5)
        config = CodecTrainingConfig(CODEC, CRITIC, stft_slot=True)
        objective = AdversarialCodec(weights, MEL, stft=STFT)
    else:
        codec = {
            "gaussian": lambda: CODEC,
            "rvq": lambda: quantised(CODEC, stages=2, codes=8, code_dim=2),
            "averaged": lambda: averaged(CODEC, stages=2, codes=8),
        }[kind]()
        config, objective = CodecTrainingConfig(codec, None), ReconstructionCodec(mel=MEL)
    # The gradient of an untrained discriminator leads nowhere: a pair needs more steps.
    history = train(config, objective, 40 if kind == "adversarial" else 20)
    assert all(np.isfinite(list(record.values())).all() for record in history)
    assert history[-1]["mel"] < 0.9 * history[0]["mel"]
    if kind == "adversarial":
        assert history[-1]["stft"] < 0.9 * history[0]["stft"]
        assert history[-1]["discriminator/real"] > history[-1]["discriminator/fake"] + 0.1
    if kind in ("rvq", "averaged"):
        assert history[-1]["bits_per_frame"] == 6
    evaluation = dataclasses.replace(objective, sample=False)
    assert objective.sample and not evaluation.sample
