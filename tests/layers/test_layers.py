"""Routing, rotary tables and temperature, each against its formula."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.layers.attention import AttentionConfig, SequenceInfo, TemperatureTuning
from jaxherd.layers.moe import Moe, MoeConfig
from jaxherd.layers.rope import RopeConfig, frequencies, rotate
from jaxherd.models.presets import SCOUT_ROPE

CONFIGS = [
    MoeConfig(4, 1, 6, 5),
    MoeConfig(4, 2, 6, None, scale="output"),
    MoeConfig(4, 2, 6, 5, score="softmax", renormalize=True, scale="output"),
    MoeConfig(3, 3, 6, None, selection_bias=True),
]


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def by_token(moe: Moe, x):
    c, out = moe.config, np.zeros(x.shape)
    router, gate, up, down = (
        np.asarray(v[...], np.float64) for v in (moe.router, moe.gate, moe.up, moe.down)
    )
    for place in np.ndindex(x.shape[:2]):
        token = x[place].astype(np.float64)
        z = token @ router
        score = 1 / (1 + np.exp(-z)) if c.score == "sigmoid" else np.exp(z) / np.exp(z).sum()
        chosen = np.argsort(-z)[: c.top_k]
        gates = score[chosen] / (score[chosen].sum() if c.renormalize else 1)
        for expert, g in zip(chosen, gates):
            weights = gate[expert], up[expert], down[expert]
            inward = c.scale == "input"
            out[place] += swiglu(token * (g if inward else 1), *weights) * (1 if inward else g)
        if moe.shared is not None:
            out[place] += swiglu(
                token,
                *(
                    np.asarray(m.kernel[...], np.float64)
                    for m in (moe.shared.gate, moe.shared.up, moe.shared.down)
                ),
            )
    return out


@pytest.mark.parametrize("config", CONFIGS)
def test_moe_by_token(config):
    moe = Moe(config, 8, key=jax.random.key(0), std=0.5)
    x = np.random.default_rng(0).normal(size=(2, 7, 8)).astype(np.float32)
    y, stats = moe(jnp.asarray(x))
    np.testing.assert_allclose(y, by_token(moe, x), atol=2e-5)
    assert stats.load_E.sum() == 14 * config.top_k and stats.tokens.sum() == 14


def test_input_and_output_scaling_differ():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 8)), jnp.float32)
    found = [
        Moe(dataclasses.replace(CONFIGS[0], scale=s), 8, key=jax.random.key(0), std=0.5)(x)[0]
        for s in ("input", "output")
    ]
    assert jnp.abs(found[0] - found[1]).max() > 1e-2


def test_selection_bias_chooses_and_does_not_scale():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 8)), jnp.float32)
    moe = Moe(MoeConfig(4, 1, 6, selection_bias=True), 8, key=jax.random.key(0), std=0.5)
    from jaxherd.core.modules import split

    definition, params, buffers = split(moe)
    pushed = definition.merge(params, {"selection_bias": jnp.asarray([0.0, 0, 9, 0])})
    y, stats = pushed(x)
    assert stats.load_E.sum(axis=0)[2] == 5
    z = np.asarray(x[0] @ moe.router[...], np.float64)[:, 2:3]
    scaled = np.asarray(x[0]) / (1 + np.exp(-z))
    weights = (np.asarray(w[...][2], np.float64) for w in (moe.gate, moe.up, moe.down))
    np.testing.assert_allclose(y[0], swiglu(scaled, *weights), atol=1e-5)


def test_padding_does_not_count():
    moe = Moe(CONFIGS[0], 8, key=jax.random.key(0))
    counted = jnp.asarray([[True, True, False, False, False]])
    assert moe(jnp.ones((1, 5, 8)), counted)[1].load_E.sum() == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temperature_steps_at_the_exact_position(dtype):
    positions = jnp.asarray([0, 8190, 8191, 16382, 16383])
    found = TemperatureTuning()(positions)
    assert found.dtype == jnp.float32
    wanted = 1 + 0.1 * np.log1p([0, 0, 1, 1, 2])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    query = (jnp.ones(5, dtype) * found).astype(dtype)
    assert query[1] == 1 and query[2] > query[1] and query[4] > query[3]


def test_scout_rope_scaling():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled, factor = frequencies(SCOUT_ROPE, 128)
    plain, _ = frequencies(RopeConfig(500000.0), 128)
    np.testing.assert_array_equal(scaled[:35], plain[:35])
    np.testing.assert_allclose(scaled[35:], plain[35:] / 16, rtol=1e-6)
    assert factor == 1.0 and len(scaled[35:]) == 29


def test_chunk_relative_positions_keep_the_scores():
    absolute = AttentionConfig(2, 2, 16, kind="chunked", size=8, rope=SCOUT_ROPE)
    relative = dataclasses.replace(absolute, rope_positions="chunk_relative")
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 16, 2, 16)), jnp.float32) for _ in range(2))
    positions = jnp.arange(16, dtype=jnp.int32)[None] + 24

    def scores(config):
        table = SequenceInfo.create(positions, None, (config,)).table(config)
        s = jnp.einsum("btnh,bsnh->bnts", rotate(q, table), rotate(k, table))
        same = positions[0][:, None] // 8 == positions[0][None] // 8
        return jnp.where(same, s, 0)

    np.testing.assert_allclose(scores(relative), scores(absolute), atol=1e-4)
