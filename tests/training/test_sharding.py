"""A sharded step is the single-device step: loss, gradients and balancing, for every layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.batch import to_global
from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import flatten, split
from jaxherd.core.sharding import Partitioner
from jaxherd.layers.attention import TemperatureTuning
from jaxherd.models import presets
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.step import Program, StepConfig

BATCH, LENGTH, VOCAB = 8, 32, 64

LAYOUTS = {
    "data": Layout("data", data=8, fsdp=1),
    "fsdp": Layout("fsdp", fsdp=8),
    "expert": Layout("expert", expert=8, fsdp=1),
    "tensor": Layout("tensor", tensor=2, fsdp=4),
    "sequence": Layout("sequence", sequence=8, fsdp=1),
    "fsdp2_expert2_tensor2": Layout("mixed", fsdp=2, expert=2, tensor=2),
    "fsdp2_sequence2_data2": Layout("mixed", fsdp=2, sequence=2, data=2),
}

# Between them these use every mesh axis; each layout compiles for a while.
QUICK = ("fsdp2_expert2_tensor2", "fsdp2_sequence2_data2")


def scout(**changes):
    """A chunked layer with 8 experts and a shared one, and a NoPE layer with temperature."""
    settings = dict(
        vocab_size=VOCAB,
        embed_dim=16,
        num_layers=2,
        moe_layers=(0,),
        dense_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_experts=8,
        expert_dim=16,
        chunk_size=8,
        nope_interval=2,
        rope=presets.SCOUT_ROPE,
        temperature=TemperatureTuning(floor_scale=8),
        selection_bias=True,
        max_length=64,
    )
    return presets.llama4_text(**settings | changes)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows: three documents of uneven length and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    segments = np.zeros((BATCH, LENGTH), np.int32)
    positions = np.zeros((BATCH, LENGTH), np.int32)
    for row in range(BATCH):
        edges = [0, *sorted(rng.choice(np.arange(2, LENGTH - 2), 2, replace=False)), LENGTH - 1]
        for number, (start, end) in enumerate(zip(edges, edges[1:])):
            segments[row, start:end] = number + 1
            positions[row, start:end] = np.arange(end - start)
    weights = (segments > 0).astype(np.float32) * (rng.random((BATCH, LENGTH)) < 0.9)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segment_ids": segments,
        "loss_weights": weights.astype(np.float32),
        "target_bytes": np.ones((BATCH, LENGTH), np.int32),
    }


@functools.cache
def program(layout: Layout, **changes) -> Program:
    config = StepConfig(
        accumulate=changes.pop("accumulate", 1), compute_dtype=changes.pop("dtype", "float32")
    )
    count = 1 if layout.name == "single" else 8
    partitioner = Partitioner.create(layout, jax.devices("cpu")[:count])
    rows = {name: partitioner.sharding(("batch", "length")) for name in batch()}
    # With plain SGD of rate 1 the parameters move by exactly the (unclipped) gradient.
    return Program(
        scout(**changes),
        NextToken(balancing="bias_update", balancing_weight=0.5, z_loss=1e-3, router_z_loss=1e-3),
        Optimizer("sgd", Schedule(1.0, "constant", 0), beta1=0.0, weight_decay=0.0, clip=None),
        partitioner,
        total_steps=10,
        config=config,
        batch_shardings=rows,
    )


def one_step(program: Program, *, skew: bool = False):
    """Return (metrics, gradients, biases) of the first step from the same parameters."""
    state = program.init(0)
    if skew:
        state = dataclasses.replace(state, params=skewed(state.params, program))
    before = jax.device_get(flatten(state.params))
    state, sums = program.step(state, to_global(batch(), program.batch_shardings), None)
    after = jax.device_get(flatten(state.params))
    gradients = {name: before[name] - after[name] for name in before}
    return jax.device_get(sums), gradients, jax.device_get(flatten(state.buffers))


def skewed(params, program):
    """Nearly all tokens to expert 0, none to most: the first column of every router is large."""

    def change(path, leaf):
        if "router" not in jax.tree_util.keystr(path):
            return leaf
        scale = jnp.where(jnp.arange(leaf.shape[-1]) < 2, 1.0, 0.0)
        return leaf * 40.0 * scale

    moved = jax.tree_util.tree_map_with_path(change, params)
    return jax.device_put(moved, program.state_shardings().params)


SINGLE = Layout("single")


@functools.cache
def expected(skew: bool):
    return one_step(program(SINGLE), skew=skew)


def close(found, wanted, rtol=1e-4, atol=1e-5):
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("skew", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS],
)
def test_every_layout_gives_the_single_device_step(name, skew):
    sums, gradients, biases = expected(skew)
    found, found_gradients, found_biases = one_step(program(LAYOUTS[name]), skew=skew)
    loss = sums["loss"][0] / sums["loss"][1]
    np.testing.assert_allclose(found["loss"][0] / found["loss"][1], loss, rtol=1e-5)
    for metric in sums:
        close(dict(enumerate(found[metric])), dict(enumerate(sums[metric])))
    close(found_gradients, gradients)
    close(found_biases, biases)
    assert any(np.abs(value).max() > 0.1 for value in biases.values()), "no bias moved"
    if skew:
        load = sums["expert_load/0"][0]
        assert (load == 0).any() and load.max() > 2 * load.mean()


def test_accumulation_gives_the_same_step():
    sums, gradients, biases = expected(False)
    found, found_gradients, found_biases = one_step(program(SINGLE, accumulate=4))
    # The squared router normaliser is a mean a microbatch: equal to first order only.
    assert found["loss"][1] == sums["loss"][1]
    np.testing.assert_allclose(found["nll"][0], sums["nll"][0], rtol=1e-5)
    close(found_gradients, gradients, rtol=2e-3, atol=2e-5)
    close(found_biases, biases)


@pytest.mark.slow
def test_bfloat16_compute_under_sharding():
    _, gradients, _ = expected(False)
    sums, found, _ = one_step(program(LAYOUTS["fsdp2_expert2_tensor2"], dtype="bfloat16"))
    single = expected(False)[0]
    loss = single["loss"][0] / single["loss"][1]
    np.testing.assert_allclose(sums["loss"][0] / sums["loss"][1], loss, rtol=2e-2)
    for name, wanted in gradients.items():
        assert found[name].dtype == np.float32
        size = np.linalg.norm(wanted)
        assert np.linalg.norm(found[name] - wanted) < 0.1 * size + 1e-3, name


@pytest.mark.parametrize(
    "layout, names",
    [
        (Layout("tensor4", tensor=4, fsdp=2), "act_kv_heads"),
        (Layout("batch", fsdp=8, expert=1), None),
    ],
)
def test_heads_must_divide_the_mesh(layout, names):
    wide = program(layout)
    state, rows = wide.abstract_state(), {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=wide.batch_shardings[name])
        for name, value in batch().items()
    }  # fmt: skip
    if names is None:
        wide.step.trace(state, rows, None)
        return
    with pytest.raises(JaxherdError, match=f"{names}.*of size 2 does not divide by 4.*tensor4"):
        wide.step.trace(state, rows, None)


def test_parameters_are_really_split():
    sharded = program(LAYOUTS["fsdp2_expert2_tensor2"])
    state = sharded.init(0)
    gate = flatten(state.params)["segments/0/0/feed_forward/gate"]
    assert gate.addressable_shards[0].data.size * 8 == gate.size
    _, params, _ = split(scout().build(jax.random.key(1)))
    assert flatten(params).keys() == flatten(state.params).keys()
