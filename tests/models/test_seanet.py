"""The autoencoder's counts, bottlenecks and lengths; parity is under tests/weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.modules import abstract, cast_floating, count_params, split
from jaxherd.layers.vector_quantiser import QuantiserConfig
from jaxherd.models.codec_presets import averaged, melodyflow_codec, quantised
from jaxherd.models.seanet import AudioAutoencoderConfig, Posterior, SeanetConfig
from jaxherd.models.stft_discriminator import StftDiscriminatorConfig

SMALL = SeanetConfig(2, 6, 4, ratios=(5, 4, 2), lstm=1)


def variants():
    for change in (
        {},
        {"norm": "none", "activation": "elu"},
        {"true_skip": False, "n_residual_layers": 3, "lstm": 0},
        {"causal": True, "compress": 4, "final_activation": "tanh", "channels": 1},
    ):
        yield AudioAutoencoderConfig(dataclasses.replace(SMALL, **change), 8000)
    yield quantised(AudioAutoencoderConfig(SMALL, 8000), stages=3, codes=16, code_dim=2)
    yield averaged(AudioAutoencoderConfig(SMALL, 8000), stages=3, codes=16)


@pytest.mark.parametrize("config", variants())
def test_parameters_are_counted(config):
    _, params, _ = split(abstract(config.build, jax.random.key(0)))
    assert config.num_params() == count_params(params)


def test_the_published_codec():
    config = melodyflow_codec()
    assert config.frame_rate == 25 and config.frames(30 * 48_000) == 750
    model = abstract(config.build, jax.random.key(0))
    assert config.num_params() == count_params(split(model)[1])
    wave = jax.ShapeDtypeStruct((1, 48_001, 2), jnp.float32)
    posterior = jax.eval_shape(lambda m, x: m.encode(x), model, wave)
    assert posterior.mean_BTL.shape == posterior.std_BTL.shape == (1, 26, 128)
    decoded = jax.eval_shape(lambda m, z: m.decode(z), model, posterior.mean_BTL)
    assert decoded.shape == (1, 26 * 1920, 2) and decoded.dtype == jnp.float32


def products(jaxpr) -> float:
    """Return FLOPs of all convolutions and matrix products in a jaxpr, scans unrolled."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_feature = eqn.params["dimension_numbers"].rhs_spec[0]
            taps = math.prod(kernel) / kernel[out_feature]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * taps
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products(inner)
    return total


@pytest.mark.parametrize("config", variants())
@pytest.mark.parametrize("samples", [400, 413])
def test_flops_are_those_of_the_traced_program(config, samples):
    def run(model, wave):
        posterior = model.encode(wave)
        latents = posterior.mean_BTL
        return model.decode(
            latents if model.quantiser is None else model.quantise(latents).latents_BTL
        )

    model = abstract(config.build, jax.random.key(0))
    wave = jax.ShapeDtypeStruct((3, samples, config.seanet.channels), jnp.float32)
    traced = products(jax.make_jaxpr(run)(model, wave).jaxpr)
    assert config.forward_flops(3, samples) == traced
    assert config.train_flops(3, samples) == 3 * traced


def test_the_discriminators_counts():
    config = StftDiscriminatorConfig(n_ffts=(64, 32), filters=4)
    model = abstract(config.build, jax.random.key(0))
    assert config.num_params() == count_params(split(model)[1])
    wave = jax.ShapeDtypeStruct((3, 201, 2), jnp.float32)
    traced = products(jax.make_jaxpr(lambda m, x: m(x))(model, wave).jaxpr)
    assert config.forward_flops(3, 201, 2) == traced


def test_kl_and_bits_are_those_of_gaussians():
    mean, std = np.random.RandomState(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    std = np.abs(std) + 0.1
    posterior = Posterior(jnp.asarray(mean), jnp.asarray(std))
    total = 0.0
    for m, s in zip(mean.reshape(-1), std.reshape(-1)):
        total += float(m) ** 2 + float(s) ** 2 - math.log(float(s) ** 2) - 1.0
    np.testing.assert_allclose(posterior.kl(), total / 15, rtol=1e-5)
    np.testing.assert_allclose(posterior.bits(), total / 15 / 2 / math.log(2), rtol=1e-5)
    standard = Posterior(jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3)))
    assert float(standard.kl()) == 0.0
    samples = Posterior(jnp.full((1, 4000, 1), 2.0), jnp.full((1, 4000, 1), 0.5)).sample(
        jax.random.key(0)
    )
    np.testing.assert_allclose([samples.mean(), samples.std()], [2.0, 0.5], atol=0.03)


def test_std_is_softplus_of_the_scale():
    model = abstract(AudioAutoencoderConfig(SMALL, 8000).build, jax.random.key(0))
    encoded = jnp.arange(-6.0, 6.0).reshape(1, 1, 12)
    posterior = model.posterior(encoded)
    np.testing.assert_allclose(posterior.mean_BTL[0, 0], np.arange(-6, 0))
    np.testing.assert_allclose(
        posterior.std_BTL[0, 0], np.log1p(np.exp(np.arange(6.0))) + 1e-4, rtol=1e-5
    )


def test_standardise_uses_the_tracked_statistics_and_inverts():
    model = abstract(AudioAutoencoderConfig(SMALL, 8000).build, jax.random.key(0))
    definition, params, buffers = split(model)
    mean, std = jnp.arange(6.0), jnp.arange(6.0) / 10  # a silent channel among them
    model = definition.merge(params, {**buffers, "latent_mean": mean, "latent_std": std})
    latents = jax.random.normal(jax.random.key(1), (2, 3, 6)) * std + mean
    scaled = model.standardise(latents)
    np.testing.assert_allclose(scaled, (latents - mean) / (std + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(model.unstandardise(scaled), latents, atol=1e-5)


def test_quantiser_bits_codes_and_straight_through_gradient():
    config = QuantiserConfig(dim=5, stages=3, codes=16, code_dim=2)
    assert config.bits_per_frame == 12
    codec = quantised(melodyflow_codec(), stages=4, codes=1024)
    assert codec.bits_per_frame == 40 and codec.bits_per_frame * codec.frame_rate == 1000
    assert melodyflow_codec().bits_per_frame == math.inf
    quantiser = config.build(jax.random.key(0))
    latents = jax.random.normal(jax.random.key(1), (2, 7, 5))
    found = quantiser(latents)
    assert found.codes_BTQ.shape == (2, 7, 3) and int(found.codes_BTQ.max()) < 16
    np.testing.assert_allclose(quantiser.decode(found.codes_BTQ), found.latents_BTL, atol=1e-5)
    # A frame's codes depend on that frame alone.
    alone = quantiser(latents[:1, 3:4])
    np.testing.assert_array_equal(alone.codes_BTQ[0, 0], found.codes_BTQ[0, 3])
    # The nearest code in direction, by definition, for the first stage.
    stage = quantiser.stages[0]
    z = latents @ stage.down[...] + stage.down_bias[...]
    unit = stage.table[...] / jnp.linalg.norm(stage.table[...], axis=-1, keepdims=True)
    np.testing.assert_array_equal(jnp.argmax(z @ unit.T, axis=-1), found.codes_BTQ[..., 0])
    # One stage: the gradient passes as if only the two projections were there.
    single = dataclasses.replace(config, stages=1).build(jax.random.key(0))
    stage = single.stages[0]
    grad = jax.grad(lambda x: single(x).latents_BTL.sum())(latents)
    wanted = stage.down[...] @ stage.up[...].sum(axis=1)
    np.testing.assert_allclose(grad, jnp.broadcast_to(wanted, grad.shape), atol=1e-5)
    grads = split(jax.grad(lambda q: q(latents).loss)(quantiser))[1]
    assert float(jnp.abs(grads["stages"]["0"]["table"]).sum()) > 0


def test_a_learnt_codebook_is_used_and_lowers_the_error():
    config = QuantiserConfig(dim=4, stages=2, codes=8, code_dim=2)
    definition, params, _ = split(config.build(jax.random.key(0)))
    latents = jax.random.normal(jax.random.key(1), (4, 64, 4))

    def loss(params):
        found = definition.merge(params)(latents)
        return found.loss + jnp.mean((found.latents_BTL - latents) ** 2), found

    @jax.jit
    def step(params, _):
        (value, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), (value, found.perplexity_Q)

    _, (values, perplexity) = jax.lax.scan(step, params, None, length=300)
    assert float(values[-1]) < 0.5 * float(values[0])
    assert float(perplexity[-1].min()) > 3.0


def test_bfloat16_computes_in_bfloat16_and_gives_float32():
    model = jax.jit(AudioAutoencoderConfig(SMALL, 8000).build)(jax.random.key(0))
    low = cast_floating(model, jnp.bfloat16)
    wave = jax.random.normal(jax.random.key(1), (1, 120, 2)) * 0.1
    encode = jax.jit(lambda model, wave: model.encode(wave))
    exact, rough = encode(model, wave), encode(low, wave)
    decoded = jax.eval_shape(lambda m, z: m.decode(z), low, rough.mean_BTL)
    assert rough.mean_BTL.dtype == jnp.float32 == decoded.dtype
    assert 0 < float(jnp.abs(exact.mean_BTL - rough.mean_BTL).max()) < 0.1


def test_configs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="compress"):
        SeanetConfig(n_filters=5, compress=2)
    with pytest.raises(ValueError, match="quantiser"):
        AudioAutoencoderConfig(SMALL, bottleneck="rvq")
    with pytest.raises(ValueError, match="dimension"):
        AudioAutoencoderConfig(SMALL, bottleneck="rvq", quantiser=QuantiserConfig(7))
    with pytest.raises(ValueError, match="causal"):
        dataclasses.replace(SMALL, trim_right_ratio=0.5).decoder_layers()
