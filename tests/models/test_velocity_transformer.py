"""Counts, FLOPs, precision, the null condition, and shardings of the velocity network."""

import dataclasses
import importlib.util
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import abstract, cast_floating, count_params, flatten, split
from jaxherd.core.sharding import Partitioner
from jaxherd.layers.linear import Linear
from jaxherd.models.velocity_transformer import (
    PRESETS,
    LabelEmbedding,
    TextStates,
    VelocityTransformerConfig,
    melodyflow_medium,
    melodyflow_small,
)
from jaxherd.weights.load import load
from jaxherd.weights.save import save

_spec = importlib.util.spec_from_file_location(
    "products", pathlib.Path(__file__).with_name("products.py")
)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
products = _module.products

TINY = VelocityTransformerConfig(16, 5, 2, latent_dim=6, conditioner=TextStates(10))
ODD = dataclasses.replace(
    TINY, num_layers=2, bias_ff=True, bias_attn=True, bias_proj=True, layer_scale=0.1,
    qk_norm=True, qk_norm_cross=True, positional="sin_rope", conditioner=LabelEmbedding(3),
)  # fmt: skip
PLAIN = dataclasses.replace(TINY, conditioner=None, skip_connections="none", add_zero_attn=False)
KEY = jax.random.key(0)


def build(config):
    return jax.jit(config.build)(KEY)


def inputs(rows=2, frames=7):
    z = jax.random.normal(KEY, (rows, frames, 6))
    text = jax.random.normal(jax.random.key(1), (rows, 4, 10))
    batch = {"text_states": text, "text_mask": jnp.ones((rows, 4)), "labels": jnp.arange(rows)}
    return z, jnp.linspace(0.1, 0.9, rows), batch


@pytest.mark.parametrize(
    "config",
    [TINY, ODD, PLAIN, *(dataclasses.replace(TINY, num_layers=n) for n in (1, 3, 6))],
    ids=str,
)
def test_the_formula_counts_what_is_built(config):
    assert count_params(split(abstract(config.build, KEY))[1]) == config.num_params()


@pytest.mark.parametrize("name, millions", [("melodyflow-small", 426), ("melodyflow-medium", 958)])
def test_published_sizes(name, millions):
    config = PRESETS[name]()
    assert round(config.matrix_params() / 1e6) == millions
    d, layers = config.embed_dim, config.num_layers
    assert config.matrix_params() == layers * 16 * d**2 + 11 * 2 * d**2
    assert count_params(split(abstract(config.build, KEY))[1]) == config.num_params()
    # Norms, ends, time embedding and text projection are less than a hundredth.
    assert 1 < config.num_params() / config.matrix_params() < 1.01


def test_the_order_of_skip_projections():
    assert melodyflow_small().skip_order() == (2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1)
    assert TINY.num_skips == 2 and TINY.skip_order() == (1, 0)
    assert dataclasses.replace(TINY, num_layers=6).skip_order() == (0, 1)
    assert PLAIN.num_skips == 0


@pytest.mark.parametrize("config", [TINY, ODD, PLAIN], ids=["tiny", "odd", "plain"])
def test_flops_are_those_of_the_program(config):
    z, t, batch = inputs(3)
    module = build(config)
    jaxpr = jax.make_jaxpr(lambda m: m(z, t, m.condition(batch)))(module)
    tokens = 4 if isinstance(config.conditioner, TextStates) else 1
    assert products(jaxpr.jaxpr) == config.forward_flops(3, 7, tokens)
    assert config.train_flops(3, 7, tokens) == 3 * config.forward_flops(3, 7, tokens)


@pytest.mark.parametrize("norm_first, zero", [(True, True), (True, False), (False, True)])
def test_a_null_condition_is_no_nan_and_no_condition(norm_first, zero):
    z, t, batch = inputs()
    config = dataclasses.replace(TINY, add_zero_attn=zero, norm_first=norm_first, num_layers=1)
    model = build(config)

    @jax.jit
    def velocity(model, mask):
        def loss(model):
            text = {"text_states": batch["text_states"], "text_mask": mask}
            v = model(z, t, model.condition(text))
            return jnp.square(v).sum(), v

        gradient, v = jax.grad(loss, has_aux=True)(model)
        return v, gradient

    v, gradient = velocity(model, jnp.zeros((2, 4)))
    chex.assert_tree_all_finite((v, gradient))
    np.testing.assert_allclose(v, jax.jit(lambda m: m(z, t))(model), atol=1e-5)
    assert jnp.abs(velocity(model, jnp.ones((2, 4)))[0] - v).max() > 1e-3


def test_conditions():
    model = build(ODD)
    condition = model.condition({"labels": np.asarray([2, -1], np.int32)})
    assert condition.mask_BL.tolist() == [[True], [False]]
    assert condition.where(jnp.asarray([False, True])).mask_BL.tolist() == [[False], [False]]
    assert condition.tile(2).states_BLD.shape == (4, 1, 16)
    with pytest.raises(JaxherdError, match="no field 'labels'"):
        model.condition({})
    assert build(PLAIN).condition({}) is None


def test_rescaling_keeps_the_spread(monkeypatch):
    """Input to the first projection has unit variance at every time; so has the target / sqrt 2."""
    seen, call = [], Linear.__call__
    monkeypatch.setattr(Linear, "__call__", lambda self, x: (seen.append(x), call(self, x))[1])
    model = build(dataclasses.replace(PLAIN, num_layers=1))
    x1, x0 = jax.random.normal(KEY, (2, 1, 4000, 6))
    for t in (0.0, 0.3, 1.0):
        seen.clear()
        model((t * x1 + (1 - t) * x0)[:, :64], jnp.full((1,), t))
        z = (t * x1 + (1 - t) * x0) / jnp.sqrt(t**2 + (1 - t) ** 2)
        np.testing.assert_allclose(seen[0], z[:, :64], atol=1e-5)
        assert float(z.std()) == pytest.approx(1, rel=0.02)
    assert float((x1 - x0).std() / jnp.sqrt(2)) == pytest.approx(1, rel=0.02)


def test_bfloat16_is_close_and_time_stays_float32():
    z, t, batch = inputs()
    model = build(TINY)
    low = cast_floating(model, jnp.bfloat16)
    run = jax.jit(lambda m: m(z, t, m.condition(batch)))
    v, v_low = run(model), run(low)
    assert v_low.dtype == jnp.float32
    # bfloat16 has 8 bits: about 1e-2 after five layers.
    assert float(jnp.abs(v - v_low).max()) < 0.05 * float(jnp.abs(v).max())
    assert low._time(t).dtype == jnp.float32


def test_remat_changes_nothing():
    z, t, batch = inputs()
    model = build(dataclasses.replace(TINY, num_layers=1))

    def gradient(remat):
        def loss(m):
            return jnp.square(m(z, t, m.condition(batch), remat=remat)).mean()

        return jax.jit(jax.grad(loss))(model)

    chex.assert_trees_all_close(gradient("none"), gradient("full"), atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(TINY, num_layers=3),
        dataclasses.replace(ODD, num_layers=1),
        dataclasses.replace(PLAIN, num_layers=1),
        dataclasses.replace(TINY, norm_first=False, add_zero_attn=False, num_layers=1),
    ],
    ids=["skips", "odd", "plain", "post_norm"],
)
def test_padding_changes_nothing(config):
    """Velocities of real frames are those of rows without padding, whatever that holds.

    The gradients are compared where there is a loss, in tests/methods/test_flow_matching.py.
    """
    z, t, batch = inputs(2, frames=7)
    lengths = (4, 1)
    mask = jnp.arange(7) < jnp.asarray(lengths)[:, None]
    filled = jnp.where(mask[..., None], z, 1e3)

    @jax.jit
    def run(model):
        condition = model.condition(batch)
        alone = [
            model(
                z[i : i + 1, :n], t[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], condition)
            )
            for i, n in enumerate(lengths)
        ]
        return model(filled, t, condition, seen_BT=mask), model(filled, t, condition), alone

    masked, heard, alone = run(build(config))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(masked[row, :length], alone[row][0], atol=1e-5)
        # Without the mask the padding would be heard.
        assert float(jnp.abs(heard[row, :length] - alone[row][0]).max()) > 1e-3
    assert np.isfinite(masked).all()


def test_a_mask_of_ones_is_no_mask():
    z, t, batch = inputs()
    ones = jnp.ones((2, 7), bool)
    config = dataclasses.replace(TINY, num_layers=1)
    with_it, without = jax.jit(
        lambda m: [m(z, t, m.condition(batch), seen_BT=seen) for seen in (ones, None)]
    )(build(config))
    np.testing.assert_allclose(with_it, without, atol=1e-6)


def test_saved_and_loaded(tmp_path):
    for name, config in (("text", TINY), ("labels", ODD)):
        model = build(config)
        save(model, tmp_path / name)
        again = load(tmp_path / name)
        assert again.config == config
        chex.assert_trees_all_equal(jax.tree.leaves(again), jax.tree.leaves(model))
    with pytest.raises(JaxherdError, match="format='jaxherd'"):
        save(build(TINY), tmp_path / "hf", format="hf")


@pytest.mark.parametrize(
    "layout", [Layout("fsdp", fsdp=8), Layout("tensor", fsdp=4, tensor=2)], ids=lambda x: x.name
)
def test_the_1b_model_divides_over_eight_devices(layout, devices):
    definition, params, _ = split(abstract(melodyflow_medium().build, KEY))
    axes, shapes = flatten(definition.axes()[0]), flatten(params)
    partitioner = Partitioner.create(layout, devices)
    held = 0
    for path, leaf in shapes.items():
        sharding = partitioner.sharding(axes[path], leaf.shape, path)
        held += math.prod(sharding.shard_shape(leaf.shape))
        # Only norms, and biases of the latent width, are whole everywhere.
        assert leaf.size < 1e5 or math.prod(sharding.shard_shape(leaf.shape)) < leaf.size, path
    assert held < 1.01 * melodyflow_medium().num_params() / 8


def test_a_sharded_step_gives_the_same(devices):
    z, t, batch = inputs(8)
    config = dataclasses.replace(TINY, num_layers=3)
    model = build(config)
    wanted = jax.jit(lambda m: m(z, t, m.condition(batch)))(model)
    partitioner = Partitioner.create(Layout("mixed", fsdp=4, tensor=2), devices)
    definition, params, _ = split(model)
    shardings = partitioner.tree_shardings(definition.axes()[0], params)

    def run(params):
        with partitioner.activate():
            m = definition.merge(params)
            return m(z, t, m.condition(batch))

    got = jax.jit(run, in_shardings=(shardings,))(params)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_impossible_configs():
    with pytest.raises(ValueError, match="heads of even size"):
        VelocityTransformerConfig(18, 1, 4)
    with pytest.raises(ValueError, match="at least 1"):
        VelocityTransformerConfig(16, 0, 2)
