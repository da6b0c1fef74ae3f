"""The Maverick recipe: the released size, its layers in turn, and one step's shapes at each scale."""

import jax
import pytest

from jaxherd.core import catalog
from jaxherd.layers.moe import MoeConfig


def test_the_released_size():
    stage = catalog.load("llama4/maverick", "full").stages[0]
    assert stage.model.num_params() == 400_711_848_960
    assert stage.model.active_params() == 17_184_691_200
    routed = [isinstance(layer.feed_forward, MoeConfig) for layer in stage.model.layers]
    assert routed == [False, True] * 24
    assert {layer.attention.qk_norm for layer in stage.model.layers} == {"none"}
    assert stage.units_per_step() == 512 * 8192


@pytest.mark.parametrize("scale, most", [("cpu", 10e6), ("gpu", 2.5e9)])
def test_smaller_scales_are_of_the_same_kind(scale, most):
    model = catalog.load("llama4/maverick", scale).stages[0].model
    assert model.num_params() < most
    routed = [isinstance(layer.feed_forward, MoeConfig) for layer in model.layers]
    assert routed == [False, True] * (len(routed) // 2)
    # Layers in turn, scanned over their period of four where there is more than one.
    assert len(model.segments()) == (4 if len(routed) == 4 else 1)
    assert model.active_params() < model.num_params() / 4


def test_the_step_traces_at_the_cpu_scale():
    catalog.load("llama4/maverick", "cpu").stages[0].check(jax.devices("cpu")[:1])
