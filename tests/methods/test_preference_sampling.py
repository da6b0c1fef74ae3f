"""Pairs of a policy's own answers, and preference optimisation on them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment
from jaxherd.core.layouts import Layout
from jaxherd.core.runner import run_experiment
from jaxherd.data.conversations import AnswerRows, PreferencePairs
from jaxherd.data.examples import Example, ExampleFile
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.methods.online_rl import PolicyRollouts
from jaxherd.methods.preference_optimization import PreferenceOptimization
from jaxherd.methods.preference_sampling import FILE, SamplePairs
from jaxherd.methods.rollouts import Answer
from jaxherd.methods.verifiable_tasks import Problem
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, FrozenModel, RunConfig, StepConfig, TrainStage
from jaxherd.weights.load_stage import LoadWeights
from tests.methods.tiny_policy import CONFIG, Letters


@dataclasses.dataclass(frozen=True)
class Short(Letters):
    """Stop at once: nobody has to say anything."""

    def reward(self, problem, completion):
        return 1.0 / (1 + len(completion))


ROLLOUTS = PolicyRollouts(
    Short(), prompts=4, group=4, batch_size=16, max_new_tokens=6, sequence_length=24, rows=16
)
DPO = TrainStage(
    name="dpo",
    model=CONFIG,
    data=PreferencePairs(
        ExampleFile(FILE, stage="pairs", heldout_fraction=0.3), sequence_length=24, batch_size=4
    ),
    objective=PreferenceOptimization(beta=0.5),
    optimizer=Optimizer(schedule=Schedule(1e-2, "constant", 0), weight_decay=0.0),
    layout=Layout("one"),
    run_config=RunConfig(steps=6, loggers=("jsonl",)),
    evaluations=(Evaluation("heldout"),),
    initial="load",
    reads=("load", "pairs"),
    frozen=(FrozenModel("reference", CONFIG, "load"),),
)


def pair_of(*answers, rewards):
    stage = SamplePairs("pairs", "load", ROLLOUTS)
    group = [
        Answer(tuple(text.encode()) + ((258,) if stopped else ()), text, stopped)
        for text, stopped in answers
    ]
    return stage._pair(Problem("p:", "", "say"), group, np.asarray(rewards), ByteTokenizer())


def test_the_best_and_the_worst_of_a_group():
    answers = [("a", True), ("b", True), ("c", True), ("d", True)]
    pair = pair_of(*answers, rewards=[0.1, 1.0, 1.0, 0.0])
    assert pair == {"prompt": "p:", "chosen": "b", "rejected": "d", "capability": "say"}
    assert pair_of(*answers, rewards=[0.5] * 4) is None
    # An answer that was cut is none: without it nothing is better than the rest.
    assert pair_of(("a", True), ("b", False), rewards=[0.0, 1.0]) is None
    # Bytes that are no text would come back as others.
    group = [Answer((255, 258), "�", True), Answer((97, 258), "a", True)]
    stage = SamplePairs("pairs", "load", ROLLOUTS)
    assert (
        stage._pair(Problem("p:", "", ""), group, np.asarray([1.0, 0.0]), ByteTokenizer()) is None
    )


def run(workdir, *stages):
    thing = Experiment("tests/pairs", "cpu", "cpu", stages)
    devices = tuple(jax.devices()[:1])
    run_experiment(thing, workdir, target="cpu", devices=devices, say=lambda _: None, quiet=True)


@dataclasses.dataclass(frozen=True)
class Words:
    """Transcripts of answers of a few letters, none of them right or wrong."""

    def examples(self, split, folder=None):
        return [Example(f"say {n % 12}:", "abc"[: n // 12]) for n in range(48)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A policy that has learned to say a few letters, or none, and to stop."""
    workdir = tmp_path_factory.mktemp("source")
    sft = TrainStage(
        name="sft",
        model=CONFIG,
        data=AnswerRows(Words(), sequence_length=24, batch_size=16, packing="none"),
        objective=NextToken(),
        optimizer=Optimizer(schedule=Schedule(2e-2, "constant", 0), weight_decay=0.0),
        layout=Layout("one"),
        run_config=RunConfig(steps=40, loggers=("jsonl",)),
    )
    run(workdir, sft)
    return LoadWeights("load", str(workdir / "sft"), CONFIG)


def test_from_answers_to_preferences(source, tmp_path):
    run(tmp_path, source, SamplePairs("pairs", "load", ROLLOUTS), DPO)
    pairs = [json.loads(line) for line in (tmp_path / "pairs" / FILE).read_text().splitlines()]
    assert all(len(p["chosen"]) < len(p["rejected"]) for p in pairs)
    lines = (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    train = [r for r in records if r["kind"] == "train"]
    assert train[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert train[-1]["loss"] < 0.69
    assert records[-1]["heldout/accuracy"] > 0.5


def test_accumulation_does_not_part_pairs(source, tmp_path):
    losses = []
    for parts in (1, 2):
        stage = dataclasses.replace(DPO, step=StepConfig(accumulate=parts), evaluations=())
        stages = (source, SamplePairs("pairs", "load", ROLLOUTS), stage)
        run(tmp_path / str(parts), *stages)
        lines = (tmp_path / str(parts) / "dpo" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.69


def test_nothing_to_prefer_is_told(source, tmp_path):
    equal = dataclasses.replace(ROLLOUTS, tasks=Letters(count=1, exact=True), group=2, batch_size=8)
    with pytest.raises(JaxherdError, match="temperature=0"):
        SamplePairs("pairs", "load", equal, temperature=0.0)
    # Almost greedy answers to a prompt are all alike.
    with pytest.raises(JaxherdError, match="there is nothing to prefer: raise rollouts.group"):
        run(tmp_path, source, SamplePairs("pairs", "load", equal, temperature=1e-3))
