"""Inversion on an exact velocity field, the regulariser's identities, and the accounting."""

import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.methods import latent_inversion
from jaxherd.methods.flow_sampling import SamplingPlan, solve
from jaxherd.methods.inversion_regularizer import pair_correlation, patch_kl, regularize
from jaxherd.methods.latent_inversion import (
    METHODS,
    Inversion,
    edit,
    edit_with,
    equal_evaluations,
    inversion,
    invert,
)
from jaxherd.models.velocity_transformer import LabelEmbedding, VelocityTransformerConfig

_spec = importlib.util.spec_from_file_location(
    "gaussian_mixture", pathlib.Path(__file__).with_name("gaussian_mixture.py")
)
mixture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mixture)

KEY = jax.random.key(0)


def reconstruction(plan: Inversion, generation_steps=None):
    """Return (relative squared error, latent std, evaluations) of invert-then-regenerate."""
    x = mixture.samples(512)

    @jax.jit
    def run(x):
        return edit_with(
            mixture.velocity, mixture.velocity, x, plan, KEY, generation_steps=generation_steps
        )

    done = run(x)
    error = float(((done.latents_BTC - x) ** 2).sum() / (x**2).sum())
    return error, float(done.inverted.std), done.evaluations


@pytest.mark.parametrize("sway", [0.0, -0.8])
def test_the_fixed_point_undoes_euler_and_the_naive_inversion_does_not(sway):
    plan = inversion("fixed_point", steps=25, sway=sway)
    fixed, fixed_std, cost = reconstruction(plan)
    naive, naive_std, _ = reconstruction(inversion("ddim", steps=25, sway=sway))
    equal, _, same_cost = reconstruction(inversion("ddim", steps=100, sway=sway), 25)
    print(f"sway {sway}: fixed point {fixed:.1e}, naive {naive:.1e}, at equal cost {equal:.1e}")
    assert cost == same_cost == 25 * 5
    assert fixed < 1e-4 and naive > 1e-2
    assert fixed < equal / 10
    # Naive inversion ends too narrow, the implicit one too wide.
    assert naive_std < 1.0 < fixed_std


def test_more_iterations_come_closer_to_the_fixed_point():
    """Un-averaged, since a mean of the last two can beat a larger K."""
    errors = [
        reconstruction(inversion("fixed_point", steps=25, sway=0.0, iterations=k, keep=1))[0]
        for k in (2, 4, 8)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_methods_run_and_report(devices):
    x = mixture.samples(64).reshape(64, 4, 4)
    found = {}
    for name in METHODS:
        plan = inversion(name, steps=6, target_flowstep=0.1)
        result = jax.jit(lambda x, p=plan: invert(flat_velocity, x, p, KEY))(x)
        found[name] = result
        assert 0.5 < float(result.std) < 2.0, name  # also NaN fails
        assert result.std == pytest.approx(float(result.latents_BTC.std()))
    costs = {name: result.evaluations for name, result in found.items()}
    assert costs == {
        "regularized": 36, "fixed_point": 24, "renoise": 66, "ddim": 6, "ddim_midpoint": 6,
        "sdedit": 0,
    }  # fmt: skip
    np.testing.assert_array_equal(
        found["ddim"].latents_BTC,
        jax.jit(
            lambda x: solve(flat_velocity, x, SamplingPlan(6, "euler", source=1.0, target=0.1))
        )(x),
    )
    # SDEdit keeps a tenth of the source.
    noise = (found["sdedit"].latents_BTC - 0.1 * x) / 0.9
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert jnp.abs(found["regularized"].latents_BTC - found["fixed_point"].latents_BTC).max() > 1e-3


def flat_velocity(z, t):
    return mixture.velocity(z.reshape(len(z), 1, 16), t).reshape(z.shape)


def test_evaluations_are_those_that_happen():
    """References share a call with the iterate, at the destination's time."""
    seen = []

    def velocity(z, t):
        jax.debug.callback(lambda t, n=len(z): seen.append((n, float(t[0]))), t, ordered=True)
        return flat_velocity(z, t)

    x, plan = mixture.samples(8).reshape(8, 4, 4), inversion("regularized", steps=3)
    result = invert(velocity, x, plan, KEY)
    jax.effects_barrier()
    assert [rows for rows, _ in seen] == [8, 8, 16, 16] * 3
    assert sum(rows for rows, _ in seen) == 8 * result.evaluations
    times = SamplingPlan(3, "euler", source=1.0, target=0.0).grid()[1:]
    np.testing.assert_allclose([t for _, t in seen], np.repeat(times, 4), atol=1e-6)


def test_a_step_is_the_published_one():
    """Written out for one step of the regularised inversion, with the module's own keys."""
    x, plan = mixture.samples(4).reshape(4, 4, 4), inversion("regularized", steps=1)
    got = invert(flat_velocity, x, plan, KEY).latents_BTC
    t, y, mean = jnp.zeros(4), x, 0.0
    for j in range(4):
        v = flat_velocity(y, t)
        if j >= 2:
            step_key = jax.random.fold_in(KEY, j)
            noise_key, jitter_key = jax.random.split(jax.random.fold_in(step_key, 0))
            r = jax.random.normal(noise_key, x.shape)
            r = r + 1e-5 * jax.random.normal(jitter_key, x.shape)
            reference = flat_velocity(r, t)
            for _ in range(4):
                gradient = jax.grad(lambda a, b=reference: patch_kl(a, b).sum())(v)
                v = v - 0.2 * jnp.clip(gradient, -100, 100)
            mean = mean + v * {2: 2 / 5, 3: 3 / 5}[j]
        y = x - v
    np.testing.assert_allclose(got, x - mean, atol=1e-4, rtol=1e-4)


@given(st.integers(2, 9), st.data())
def test_weights_sum_to_one(iterations, data):
    keep = data.draw(st.integers(1, iterations))
    plan = Inversion(iterations=iterations, keep=keep)
    j = np.arange(iterations - keep, iterations)
    published = j / (keep * (iterations - keep) + sum(range(keep)))
    np.testing.assert_allclose(plan.kept_weights(), published)
    assert plan.kept_weights().sum() == pytest.approx(1)


def test_the_divergence():
    a, b = jax.random.normal(KEY, (2, 3, 10, 8))
    b = 0.7 * b + 0.2
    # Zero but for the floors of 1e-6: four patches of variance about 1.
    assert 0 <= float(patch_kl(a, a).max()) < 1e-5
    # By hand: frames 8 and 9 do not fill a patch.
    expected = 0.0
    for t, c in itertools.product((0, 4), (0, 4)):
        pa, pb = (np.asarray(x[0, t : t + 4, c : c + 4], np.float64).ravel() for x in (a, b))
        va, vb = pa.var(ddof=1), pb.var(ddof=1)
        log = np.log((vb + 1e-6) / (va + 1e-6))
        expected += abs(log + (va + (pa.mean() - pb.mean()) ** 2) / (vb + 1e-6) - 1)
    assert float(patch_kl(a, b)[0]) == pytest.approx(expected, rel=1e-5)


def test_the_divergences_gradient_is_that_of_finite_differences():
    a, b = (np.asarray(x, np.float64) for x in jax.random.normal(KEY, (2, 1, 4, 4)))
    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(lambda x: patch_kl(x, jnp.asarray(b)).sum())(jnp.asarray(a)))
        for place in [(0, 0, 0), (0, 2, 3), (0, 3, 1)]:
            step = np.zeros_like(a)
            step[place] = 1e-2
            high, low = (
                float(patch_kl(jnp.asarray(a + s), jnp.asarray(b))[0]) for s in (step, -step)
            )
            # Values are computed in float32: a step of 1e-2 leaves an error of about 1e-4.
            assert gradient[place] == pytest.approx((high - low) / 2e-2, abs=2e-3)


def test_regularisation_pulls_towards_the_reference():
    reference = jax.random.normal(KEY, (2, 16, 8))
    v = 1.5 * jax.random.normal(jax.random.key(1), (2, 16, 8)) + 0.3
    pulled = regularize(v, reference, KEY, lambda_kl=0.2)
    assert (patch_kl(pulled, reference) < 0.8 * patch_kl(v, reference)).all()
    # The clip bounds a step.
    tight = regularize(v, reference, KEY, lambda_kl=0.2, clip=1e-3)
    assert float(jnp.abs(tight - v).max()) == pytest.approx(4 * 0.2e-3, rel=1e-3)


def test_the_pair_term_stays_finite_at_the_released_length():
    """750 frames, which halve to odd numbers: still a step down, and a small one."""
    v = jax.random.normal(KEY, (1, 750, 8)) + jnp.sin(jnp.arange(750) / 3.0)[None, :, None]
    pulled = jax.jit(lambda x: regularize(x, x, KEY, lambda_kl=0.0, lambda_pair=20.0))(v)
    assert jnp.isfinite(pulled).all()
    keys = [jax.random.fold_in(KEY, n) for n in range(4)]
    before, after = (sum(float(pair_correlation(x, k)[0]) for k in keys) for x in (v, pulled))
    assert after < before
    assert float(jnp.abs(pulled - v).mean()) < 0.5 * float(jnp.abs(v).mean())


def test_the_pair_term_sees_repetition():
    wave = jnp.sin(jnp.arange(64) / 3)[None, :, None] * jnp.ones((2, 1, 4))
    white = jax.random.normal(KEY, wave.shape)
    assert (pair_correlation(wave, KEY) > 3 * pair_correlation(white, KEY)).all()
    for frames in (16, 64):
        v = wave[:, :frames]
        flatter = regularize(v, v, KEY, lambda_kl=0.0, lambda_pair=20.0)
        assert (pair_correlation(flatter, KEY) < pair_correlation(v, KEY)).all()
        assert 0.5 * float(v.std()) < float(flatter.std()) < float(v.std())


def test_equal_evaluations():
    plans = {name: inversion(name) for name in METHODS}
    shares = equal_evaluations(240, plans)
    assert {n: (s.inversion_steps, s.evaluations) for n, s in shares.items()} == {
        "regularized": (30, 240), "fixed_point": (40, 240), "renoise": (18, 234),
        "ddim": (80, 240), "ddim_midpoint": (80, 240), "sdedit": (120, 240),
    }  # fmt: skip
    naive = equal_evaluations(125, {"ddim": plans["ddim"]}, guided=False, generation_steps=25)
    assert naive["ddim"].inversion_steps == 100 and naive["ddim"].evaluations == 125
    pairs = equal_evaluations(125, {"ddim_midpoint": plans["ddim_midpoint"]}, guided=False)
    assert pairs["ddim_midpoint"].inversion_steps == 62  # steps come in pairs
    with pytest.raises(JaxherdError, match="do not suffice"):
        equal_evaluations(5, plans)


def test_an_edit_with_a_model():
    config = VelocityTransformerConfig(16, 1, 2, latent_dim=4, conditioner=LabelEmbedding(3))
    model, x = jax.jit(config.build)(KEY), jax.random.normal(jax.random.key(1), (2, 8, 4))
    target = model.condition({"labels": jnp.asarray([1, 2])})
    plan = inversion("regularized", steps=3)
    done = edit(model, x, None, target, plan, KEY, cfg_coef=1.0)
    assert done.evaluations == 3 * 6 + 3 * 2 and np.isfinite(done.latents_BTC).all()
    # The same condition and no guidance: the source comes back.
    plan = inversion("fixed_point", steps=20, iterations=8, keep=1)
    same = edit(model, x, target, target, plan, KEY, cfg_coef=0.0)
    assert same.evaluations == 20 * 9
    np.testing.assert_allclose(same.latents_BTC, x, atol=1e-3)


def test_the_naive_inversion_by_midpoint_is_nearer_than_by_euler():
    """The public demo's plain mode: 64 evaluations there and 64 back."""
    euler = reconstruction(inversion("ddim", steps=64, sway=-0.8))
    midpoint = reconstruction(inversion("ddim_midpoint"))
    assert midpoint[2] == euler[2] == 128
    assert midpoint[0] < euler[0] / 10


def test_guidance_is_no_part_of_the_program():
    config = VelocityTransformerConfig(16, 1, 2, latent_dim=4, conditioner=LabelEmbedding(3))
    model, x = jax.jit(config.build)(KEY), jax.random.normal(jax.random.key(1), (2, 8, 4))
    target, plan = model.condition({"labels": jnp.asarray([1, 2])}), inversion("ddim", steps=2)
    before = latent_inversion._edit._cache_size()
    made = [
        edit(model, x, None, target, plan, KEY, cfg_coef=w).latents_BTC for w in (1.0, 2.5, 4.0)
    ]
    assert latent_inversion._edit._cache_size() == before + 1
    assert jnp.abs(made[0] - made[2]).max() > 1e-3


def test_errors():
    for make, message in [
        (lambda: Inversion(solver="midpoint", steps=4), "fixed point is that of an Euler step"),
        (lambda: inversion("ddim_midpoint", steps=5), "in pairs"),
        (lambda: inversion("dim"), "did you mean 'ddim'"),
        (lambda: Inversion(keep=5), "between 1 and iterations=4"),
        (lambda: Inversion(iterations=1, keep=1), "at least 2"),
        (lambda: Inversion(target_flowstep=1.0), "1 is the source"),
    ]:
        with pytest.raises(JaxherdError, match=message):
            make()
