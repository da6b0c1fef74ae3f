"""Schedules at their corners; every optimiser's state follows its parameters' shardings."""

import jax
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import abstract, split
from jaxherd.core.sharding import Partitioner
from jaxherd.models import presets
from jaxherd.training.optimizers import Optimizer, Schedule, decay_mask, state_shardings


@pytest.fixture(scope="module")
def tiny():
    config = presets.llama(
        vocab_size=64, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=32
    )
    definition, params, _ = split(abstract(config.build, jax.random.key(0)))
    return definition.axes()[0], params


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_state_is_sharded_like_its_parameters(kind, tiny, devices):
    axes, params = tiny
    partitioner = Partitioner.create(Layout("t", fsdp=4, tensor=2), devices)
    wanted = partitioner.tree_shardings(axes, params)
    optimizer = Optimizer(kind=kind).build(1000, axes)
    state = jax.eval_shape(optimizer.init, params)
    found = state_shardings(optimizer, params, wanted, partitioner.replicated())
    assert jax.tree.structure(found) == jax.tree.structure(state)
    table = wanted["embedding"]["table"]
    moments = [
        sharding
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(found))
        if leaf.shape == (64, 16)
    ]
    assert all(sharding == table for sharding in moments)
    assert moments or kind == "adafactor"


def test_schedules():
    def at(steps, **fields):
        rate = Schedule(peak=2e-3, warmup_steps=1000, **fields).build(5000)
        return [float(rate(step)) for step in steps]

    # mobilellm.md section 5: lr / peak = 0.1 + 0.45 (1 + cos(pi p)).
    np.testing.assert_allclose(
        at([0, 500, 1000, 3000, 5000], kind="cosine", final=0.1), [0, 1e-3, 2e-3, 1.1e-3, 2e-4]
    )
    np.testing.assert_allclose(at([1000, 3000, 5000], kind="linear", final=0.0), [2e-3, 1e-3, 0])
    np.testing.assert_allclose(
        at([1000, 4000, 4200, 5000], kind="wsd", final=0.0, decay_fraction=0.2),
        [2e-3, 2e-3, 2e-3, 0],
        atol=1e-9,
    )
    np.testing.assert_allclose(at([1000, 4000], kind="inverse_sqrt"), [2e-3, 1e-3])
    with pytest.raises(JaxherdError, match="warmup_steps=1000 leaves nothing"):
        Schedule(warmup_steps=1000).build(1000)


def test_decay_leaves_norms_and_biases_alone(tiny):
    mask = decay_mask(tiny[0])
    assert mask["embedding"]["table"] is True
    assert mask["final_norm"]["scale"] is False
    assert mask["segments"]["0"]["0"]["attention_norm"]["scale"] is False
    assert mask["segments"]["0"]["0"]["feed_forward"]["gate"]["kernel"] is True
