"""Grids, solvers with their evaluations, and guidance."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.data.audio.latents import LatentClips
from jaxherd.methods import flow_sampling
from jaxherd.methods.flow_sampling import (
    SamplingPlan,
    evaluations,
    generate,
    guided,
    solve,
    sway_grid,
    transport,
)
from jaxherd.methods.latent_inversion import Inversion
from jaxherd.methods.music_samples import SampleMusic
from jaxherd.models.velocity_transformer import LabelEmbedding, VelocityTransformerConfig

_spec = importlib.util.spec_from_file_location(
    "gaussian_mixture", pathlib.Path(__file__).with_name("gaussian_mixture.py")
)
mixture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mixture)

TINY = VelocityTransformerConfig(16, 1, 2, latent_dim=4, conditioner=LabelEmbedding(3))


@given(st.integers(1, 60), st.floats(-1, 1.75))
def test_grids_are_monotone_and_end_where_they_should(steps, sway):
    grid = sway_grid(steps, sway)
    assert grid[0] == 0.0 and grid[-1] == 1.0 and len(grid) == steps + 1
    assert (np.diff(grid) > -1e-12).all()


def test_the_published_sway():
    assert sway_grid(2, -0.8)[1] == pytest.approx(0.334, abs=5e-4)
    np.testing.assert_allclose(sway_grid(4, 0.0), [0, 0.25, 0.5, 0.75, 1], atol=1e-15)
    there = SamplingPlan(10, "euler", source=0.2, target=1.0).grid()
    back = SamplingPlan(10, "euler", source=1.0, target=0.2).grid()
    np.testing.assert_array_equal(there[::-1], back)
    assert there[0] == 0.2 and np.diff(there)[0] < np.diff(there)[-1]


def counted(plan, source=0.0):
    """Solve dz/dt = 1 with a velocity that writes down its times."""
    times = []

    def velocity(z, t):
        jax.debug.callback(lambda t: times.append(float(t[0])), t, ordered=True)
        return jnp.ones_like(z)

    end = solve(velocity, jnp.zeros((1, 1, 1)), plan)
    jax.effects_barrier()
    return float(end[0, 0, 0]), times


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_every_grid_point_is_one_evaluation(solver):
    plan = SamplingPlan(8, solver, cfg_coef=0.0)
    end, times = counted(plan)
    assert end == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(times, plan.grid()[:-1], atol=1e-6)
    assert len(times) == evaluations(plan) == 8
    assert evaluations(SamplingPlan(8, solver)) == 16
    assert evaluations(SamplingPlan(8, solver, source=1.0, target=0.0)) == 8


def test_midpoint_is_of_second_order():
    """dz/dt = z: the error falls fourfold where Euler's halves."""

    def error(solver, steps):
        plan = SamplingPlan(steps, solver, sway=0.0)
        return abs(float(solve(lambda z, t: z, jnp.ones((1, 1, 1)), plan)[0, 0, 0]) - np.e)

    assert error("euler", 32) / error("euler", 64) == pytest.approx(2, abs=0.1)
    assert error("midpoint", 16) / error("midpoint", 32) == pytest.approx(4, abs=0.3)


def test_midpoint_beats_euler_at_equal_evaluations():
    noise = jax.random.normal(jax.random.key(0), (256, 1, mixture.DIM))

    def run(steps, solver):
        return jax.jit(lambda z: solve(mixture.velocity, z, SamplingPlan(steps, solver)))(noise)

    reference = run(2000, "euler")
    for steps in (16, 32, 64):
        euler, midpoint = (
            float(((run(steps, s) - reference) ** 2).mean()) for s in ("euler", "midpoint")
        )
        print(f"{steps} evaluations: euler {euler:.1e}, midpoint {midpoint:.1e}")
        assert midpoint < euler / 2


def test_guidance_is_the_published_form():
    model = jax.jit(TINY.build)(jax.random.key(0))
    condition = model.condition({"labels": jnp.asarray([0, 2])})
    z, t = jax.random.normal(jax.random.key(1), (2, 5, 4)), jnp.asarray([0.3, 0.6])
    with_c, without = jax.jit(lambda m: (m(z, t, condition), m(z, t)))(model)
    assert jnp.abs(with_c - without).max() > 1e-2
    wanted = 5 * with_c - 4 * without

    @jax.jit
    def run(model):
        # More rows than the condition has: it is repeated.
        many = jnp.concatenate([z, z]), jnp.concatenate([t, t])
        return guided(model, condition, 4.0)(*many), guided(model, condition)(z, t)

    twice, alone = run(model)
    np.testing.assert_allclose(twice, jnp.concatenate([wanted, wanted]), atol=1e-4)
    np.testing.assert_allclose(alone, with_c, atol=1e-5)


def test_guidance_moves_no_rows_between_devices(devices):
    """Data-parallel, each row beside its null one: nothing is permuted or gathered."""
    clips = LatentClips(latent_dim=4, frames=6, batch_size=16, coupling_group=16)
    plan = SamplingPlan(4, cfg_coef=4.0)
    stage = SampleMusic("samples", TINY, clips, 16, plan, layout=Layout("data", fsdp=1, data=-1))
    program = stage.program(devices[:8])
    text = program.step.lower(*stage.abstract_inputs(program)).compile().as_text()
    assert "num_partitions=8" in text
    for kind in ("collective-permute", "all-to-all", "all-gather"):
        assert kind not in text, kind


def test_guidance_is_off_towards_noise():
    model = jax.jit(TINY.build)(jax.random.key(0))
    condition = model.condition({"labels": jnp.asarray([0, 2])})
    z = jax.random.normal(jax.random.key(1), (2, 5, 4))
    back = [SamplingPlan(2, "euler", cfg_coef=w, source=1.0, target=0.0) for w in (0.0, 4.0)]
    np.testing.assert_array_equal(*(transport(model, condition, z, p) for p in back))
    there = [SamplingPlan(2, "euler", cfg_coef=w) for w in (0.0, 4.0)]
    a, b = (transport(model, condition, z, p) for p in there)
    assert jnp.abs(a - b).max() > 1e-2


def test_one_program_for_a_size_and_its_steps():
    """Prompt, seed, strength of guidance and sway are given to it; the solver is not."""
    model, shape = jax.jit(TINY.build)(jax.random.key(0)), dict(batch=2, frames=6)

    def made(seed, label, **plan):
        condition = model.condition({"labels": jnp.asarray([label, label])})
        return generate(
            model, condition, key=jax.random.key(seed), plan=SamplingPlan(4, **plan), **shape
        )

    made(0, 0, cfg_coef=1.0)
    before = flow_sampling._run._cache_size()
    others = [
        made(0, 0, cfg_coef=3.5), made(0, 1, cfg_coef=1.0), made(1, 0, cfg_coef=1.0, sway=0.0)
    ]  # fmt: skip
    assert flow_sampling._run._cache_size() == before
    assert all(jnp.abs(x - others[0]).max() > 1e-3 for x in others[1:])
    made(0, 0, solver="euler")
    assert flow_sampling._run._cache_size() == before + 1


def test_generation_is_a_function_of_its_key():
    model, plan = jax.jit(TINY.build)(jax.random.key(0)), SamplingPlan(4)
    a, b, c = (
        generate(model, None, key=jax.random.key(k), batch=2, frames=5, plan=plan)
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert a.shape == (2, 5, 4) and jnp.abs(a - c).max() > 0.1


def test_errors():
    for make, message in [
        (lambda: SamplingPlan(5, "midpoint"), "5 is odd"),
        (lambda: SamplingPlan(0), "at least 1 step"),
        (lambda: SamplingPlan(4, source=1.5), "between 0"),
        (lambda: SamplingPlan(4, sway=-2.0), "backwards"),
        (lambda: SamplingPlan(4, sway=float("nan")), "backwards"),
        (lambda: SamplingPlan(4, cfg_coef=float("nan")), "cfg_coef=nan is no finite"),
        (lambda: SamplingPlan(4, cfg_coef=float("inf")), "cfg_coef=inf is no finite"),
        (lambda: SamplingPlan(4, cfg_coef=float("inf"), source=1.0, target=0.0), "no finite"),
        (lambda: SamplingPlan(4, cfg_coef=1e30), "cfg_coef=1e\\+30 is beyond 100"),
        (lambda: SamplingPlan(4, cfg_coef=-101.0), "cfg_coef=-101 is beyond 100"),
        (lambda: Inversion(sway=float("nan")), "backwards"),
        (lambda: Inversion(steps=0), "at least 1 step"),
        (
            lambda: generate(
                jax.jit(TINY.build)(jax.random.key(0)), None, key=jax.random.key(0), batch=1, frames=4,
                plan=SamplingPlan(4, source=0.5),
            ),
            "starts at 0.5",
        ),
    ]:  # fmt: skip
        with pytest.raises(JaxherdError, match=message):
            make()
