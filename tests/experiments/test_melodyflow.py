"""The MelodyFlow recipes: their steps at full size, traced; the codec's game on real music."""

import json
import statistics

import jax
import jax.extend.core as jex
import pytest

from jaxherd.core import catalog
from jaxherd.core.errors import JaxherdError
from jaxherd.core.runner import run_experiment


def primitives(jaxpr) -> set[str]:
    """Return the names of all primitives of a program, those of inner programs included."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, jex.Jaxpr | jex.ClosedJaxpr),
        ):
            if isinstance(inner, jex.ClosedJaxpr | jex.Jaxpr):
                found |= primitives(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize("stage", ["codec", "flow", "samples"])
def test_no_step_calls_the_host(stage, devices):
    """Not at full size: the coupling of noise and data is solved where the data is read."""
    chosen = catalog.load("melodyflow/text_to_music", "full").stage(stage)
    program = chosen.program(devices)
    found = primitives(program.step.trace(*chosen.abstract_inputs(program)).jaxpr.jaxpr)
    assert {"dot_general", "conv_general_dilated"} & found and "scan" in found or stage == "codec"
    assert not [name for name in found if "callback" in name or "outfeed" in name]


def test_a_callback_would_be_found():
    def told(x):
        jax.debug.callback(lambda: None)
        return x

    program = jax.jit(lambda x: jax.lax.scan(lambda c, _: (told(c), None), x, None, 3)[0])
    found = primitives(program.trace(1.0).jaxpr.jaxpr)
    assert any("callback" in name for name in found)


def test_the_codec_alone_is_the_recipes():
    whole = catalog.load("melodyflow/text_to_music", "full").stage("codec")
    assert catalog.load("melodyflow/codec", "full").stages == (whole,)
    small = catalog.load("melodyflow/codec", "cpu").stages[0]
    assert small.model.discriminator is not None and len(small.objective.phases) == 2


@pytest.mark.slow
@pytest.mark.debian
def test_codec_and_discriminator_learn_on_real_music(tmp_path):
    """`jaxherd run melodyflow/codec --on cpu`, 60 steps of it.

    Means of ten steps: single ones go up and down by more than they have learnt.
    """
    experiment = catalog.load("melodyflow/codec", "cpu").with_overrides(
        ("codec.run_config.steps=60", "codec.run_config.eval_every=30")
    )
    run_experiment(experiment, tmp_path, target="cpu", devices=tuple(jax.devices()[:1]), quiet=True)
    lines = (tmp_path / "codec" / "metrics.jsonl").read_text().splitlines()
    records = list(map(json.loads, lines))
    train = [r for r in records if r["kind"] == "train"]
    assert len(train) == 60

    def mean(name: str, steps: slice) -> float:
        return statistics.fmean(r[name] for r in train[steps])

    first, last = slice(10), slice(-10, None)
    assert mean("mel", last) < 0.85 * mean("mel", first)
    gaps = [mean("discriminator/real", s) - mean("discriminator/fake", s) for s in (first, last)]
    assert gaps[1] > gaps[0] + 0.1
    early, late = (r for r in records if r["kind"] == "eval")
    for name in ("mel", "stft", "mel_distance"):
        assert late[f"heldout/{name}"] < early[f"heldout/{name}"]


def test_overrides_that_only_fit_together_may_come_in_any_order():
    both = ["flow.data.batch_size=32", "flow.data.coupling_group=32"]
    for order in (both, both[::-1]):
        data = (
            catalog.load("melodyflow/text_to_music", "cpu").with_overrides(order).stage("flow").data
        )
        assert (data.batch_size, data.coupling_group) == (32, 32)
    with pytest.raises(JaxherdError, match="does not divide"):
        catalog.load("melodyflow/text_to_music", "cpu").with_overrides(both[:1])
