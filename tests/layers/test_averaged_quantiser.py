"""The quantiser that learns by averages: its codes against a loop, and that it does learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.modules import split
from jaxherd.layers.averaged_quantiser import AveragedQuantiserConfig

CONFIG = AveragedQuantiserConfig(dim=3, stages=3, codes=8, decay=0.9)


def after(definition, params, buffers, latents):
    """Return the output for these latents, and the buffers after the step."""

    @jax.jit
    def run(buffers, latents):
        return definition.merge(params, buffers)(latents)

    out = run(buffers, latents)
    return out, {**buffers, **out.buffers}


@pytest.fixture(scope="module")
def learnt():
    rng = np.random.default_rng(0)
    definition, params, buffers = split(CONFIG.build(jax.random.key(0)))
    outputs = []
    for _ in range(60):
        latents = jnp.asarray(rng.normal(size=(4, 50, 3)) * [3.0, 1.0, 0.1], jnp.float32)
        out, buffers = after(definition, params, buffers, latents)
        outputs.append((latents, out))
    return definition.merge(params, buffers), outputs


def test_stages_begin_one_a_step(learnt):
    _, outputs = learnt
    for step in range(4):
        counts = np.asarray(outputs[step][1].buffers["counts"])
        begun = counts.sum(axis=1) > 0
        np.testing.assert_array_equal(begun, np.arange(3) <= step)
    # Nothing has begun at the first step: every code is zero.
    np.testing.assert_array_equal(outputs[0][1].latents_BTL, 0.0)


def test_averages_are_those_of_a_loop(learnt):
    """One step of the last stage, by hand, from the codes that the layer itself chose."""
    _, outputs = learnt
    (_, before), (latents, out) = outputs[-2:]
    counts, sums = (np.asarray(before.buffers[k], np.float64) for k in ("counts", "sums"))
    rest = np.asarray(latents, np.float64).reshape(-1, 3)
    codes = np.asarray(out.codes_BTQ).reshape(-1, 3)
    for stage in range(3):
        table = sums[stage] / counts[stage][:, None]
        distances = ((rest[:, None] - table[None]) ** 2).sum(-1)
        np.testing.assert_allclose(
            distances[np.arange(len(rest)), codes[:, stage]], distances.min(axis=1), atol=1e-6
        )
        used = np.bincount(codes[:, stage], minlength=8)
        wanted = 0.9 * counts[stage] + 0.1 * used
        alive = wanted >= CONFIG.dead * len(rest) / 8
        np.testing.assert_allclose(
            np.asarray(out.buffers["counts"])[stage][alive], wanted[alive], rtol=1e-5
        )
        total = np.stack([rest[codes[:, stage] == v].sum(axis=0) for v in range(8)])
        np.testing.assert_allclose(
            np.asarray(out.buffers["sums"])[stage][alive],
            (0.9 * sums[stage] + 0.1 * total)[alive],
            atol=1e-4,
        )
        rest = rest - table[codes[:, stage]]


def test_error_falls_and_codes_stay_in_use(learnt):
    _, outputs = learnt
    latents, out = outputs[-1]
    error = float(jnp.mean((latents - out.latents_BTL) ** 2) / jnp.mean(latents**2))
    # 9 bits for 3 dimensions of very different spread: far below one stage's.
    assert error < 0.03
    assert np.all(np.asarray(out.perplexity_Q) > 4.0)


def test_codes_decode_to_the_latents(learnt):
    module, outputs = learnt
    latents, _ = outputs[-1]
    out = module(latents)
    np.testing.assert_allclose(module.decode(out.codes_BTQ), out.latents_BTL, atol=1e-5)


def test_gradient_goes_straight_through(learnt):
    module, outputs = learnt
    latents, _ = outputs[-1]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=latents.shape), jnp.float32)
    found = jax.grad(lambda z: jnp.sum(module(z).latents_BTL * weights))(latents)
    np.testing.assert_allclose(found, weights, atol=1e-6)
    pull = jax.grad(lambda z: module(z).loss)(latents)
    assert float(jnp.abs(pull).max()) > 0


def test_unused_codes_are_moved():
    """All vectors are one: a code that nothing chooses comes to a vector of the batch."""
    config = AveragedQuantiserConfig(dim=2, stages=1, codes=4, decay=0.5)
    definition, params, buffers = split(config.build(jax.random.key(0)))
    first = jnp.ones((1, 16, 2)) * jnp.arange(16)[None, :, None]
    for _ in range(3):
        _, buffers = after(definition, params, buffers, first)
    last = jnp.full((1, 16, 2), 100.0)
    for _ in range(12):
        out, buffers = after(definition, params, buffers, last)
    table = np.asarray(buffers["sums"] / buffers["counts"][..., None])
    np.testing.assert_allclose(table, 100.0, rtol=1e-2)
    np.testing.assert_allclose(out.latents_BTL, last, rtol=1e-2)
