"""The guard's recipe: sizes, and one step's shapes."""

import jax

from jaxherd.core import catalog


def test_the_recipe():
    experiment = catalog.load("llama4/guard", "cpu")
    train, calibrate = experiment.stages
    assert 0.9e6 < train.model.num_params() < 1.2e6
    assert calibrate.reads == ("classifier",)
    train.check(jax.devices("cpu")[:1])
    assert catalog.load("llama4/guard", "full").stages[0].model == train.model
