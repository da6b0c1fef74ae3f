"""The post-training recipes: the disclosed order, their steps at full size, and a run in small."""

import json

import jax
import pytest

from jaxherd.core import catalog
from jaxherd.core.runner import run_experiment
from jaxherd.core.targets import abstract_devices, parse_target

NAMES = ("llama4/post_training", "llama4/post_training_smollm2")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", ["cpu", "gpu", "full"])
def test_the_disclosed_order_and_filters(name, scale):
    experiment = catalog.load(name, scale)
    order = [s.name for s in experiment.stages]
    assert [s for s in order if s in ("sft", "rl", "dpo")] == ["sft", "rl", "dpo"]
    sft, rl, dpo = (experiment.stage(n) for n in ("sft", "rl", "dpo"))
    assert sft.data.keep_hardest <= 0.5
    assert rl.data.filter.every > 0 and rl.data.filter.highest < 1
    assert (rl.initial, dpo.initial) == ("sft", "rl")
    assert [f.stage for f in dpo.frozen] == ["rl"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rl", "dpo"])
def test_steps_at_full_size_can_be_traced(stage):
    pytest.importorskip("libtpu")
    experiment = catalog.load("llama4/post_training", "full")
    chosen = experiment.stage(stage)
    program = chosen.program(abstract_devices(parse_target(experiment.target)))
    program.step.trace(*chosen.abstract_inputs(program))


@pytest.mark.slow
def test_a_run_in_small(tmp_path):
    """`jaxherd run llama4/post_training --on cpu`, a part of it: all stages and the report."""
    experiment = catalog.load("llama4/post_training", "cpu").with_overrides(
        (
            "pretrain.run_config.steps=250",
            "pretrain.run_config.eval_every=0",
            "sft.run_config.steps=20",
            "rl.run_config.steps=20",
            "rl.data.tasks.per_task=16",
            "dpo.run_config.steps=10",
        )
    )
    run_experiment(experiment, tmp_path, target="cpu", devices=tuple(jax.devices()[:1]), quiet=True)
    for stage in ("pretrain", "sft", "rl", "dpo"):
        summary = json.loads((tmp_path / stage / "done.json").read_text())["summary"]
        assert 0 <= summary["heldout/pass"] <= summary["heldout/reward"] <= 1
    lines = (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx(0.6931, abs=1e-3)
    report = (tmp_path / "report.md").read_text()
    assert "![Reward](rl/plots/reward.png)" in report
    assert (tmp_path / "rl" / "plots" / "reward.png").exists()
