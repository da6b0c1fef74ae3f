"""Adversarial phases, moving averages, frozen models and what later stages take over."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.batch import BatchField
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment
from jaxherd.core.modules import Module, buffer, flatten, parameter, unflatten
from jaxherd.core.runner import run_experiment
from jaxherd.training.metrics import pair
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.phases import Phase, phases_of
from jaxherd.training.stage import Evaluation, FrozenModel, RunConfig, StepConfig, TrainStage

RATE = 0.1


class Pair(Module):
    def __init__(self, key):
        self.follower = parameter(jnp.zeros(2), ("embed",))
        self.leader = parameter(jnp.ones(2), ("embed",))
        self.seen = buffer(jnp.zeros(()), ())


@dataclasses.dataclass(frozen=True)
class PairConfig:
    def build(self, key):
        return Pair(key)

    def num_params(self):
        return 4


@dataclasses.dataclass(frozen=True)
class Distance:
    """Half the squared distance of one parameter from another, at which nothing flows back."""

    moved: str
    target: str

    def __call__(self, model, batch, key, *, frozen=None):
        gap = getattr(model, self.moved)[...] - getattr(model, self.target)[...]
        loss = 0.5 * (gap**2).sum() + 0 * batch["x"].sum()
        return loss, {"loss": pair(loss, 1.0), f"gap/{self.moved}": pair(gap[0], 1.0)}


@dataclasses.dataclass(frozen=True)
class Game:
    """The follower moves towards the leader; then the leader towards the new follower."""

    order: tuple[str, str] = ("follower", "leader")

    @property
    def phases(self):
        a, b = self.order
        return (Phase(a, (a,), Distance(a, b)), Phase(b, (b,), Distance(b, a)))

    def __call__(self, model, batch, key, *, frozen=None):
        return Distance("follower", "leader")(model, batch, key)

    def update_buffers(self, buffers, metrics):
        flat = flatten(buffers)
        return unflatten({"seen": flat["seen"] + 1.0})


@dataclasses.dataclass(frozen=True)
class Ones:
    rows: int = 8

    def batch_spec(self, split="train"):
        return {
            "x": BatchField((self.rows if split == "train" else 4, 2), "float32", ("batch", None))
        }

    def build(self, *, split, seed, process_index=0, process_count=1, cache_dir=None):
        rows = self.batch_spec(split)["x"].shape[0]
        return Stream({"x": np.ones((rows, 2), np.float32)}, 2 if split == "heldout" else None)


class Stream:
    def __init__(self, batch, length):
        self._batch, self._left, self._n = batch, length, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self._left == self._n:
            raise StopIteration
        self._n += 1
        return self._batch

    def get_state(self):
        return self._n

    def set_state(self, state):
        self._n = state


def stage(**changes) -> TrainStage:
    settings = dict(
        name="play",
        model=PairConfig(),
        data=Ones(),
        objective=Game(),
        optimizer=Optimizer(
            "sgd", Schedule(RATE, "constant", 0), beta1=0.0, weight_decay=0.0, clip=None
        ),
        run_config=RunConfig(steps=3, checkpoint_every=2, loggers=("jsonl",)),
    )
    return TrainStage(**settings | changes)


def run(workdir, *stages):
    thing = Experiment("tests/play", "cpu", "cpu", stages)
    devices = tuple(jax.devices()[:1])
    return run_experiment(
        thing, workdir, target="cpu", devices=devices, say=lambda _: None, quiet=True
    )


def records(workdir, name="play", kind="train"):
    lines = (workdir / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def by_hand(steps, order=("follower", "leader")):
    """Return the gaps that each phase sees, from the definition."""
    place, gaps = {"follower": 0.0, "leader": 1.0}, []
    for _ in range(steps):
        row = {}
        for name, other in (order, order[::-1]):
            row[name] = place[name] - place[other]
            place[name] -= RATE * row[name]
        gaps.append(row)
    return gaps, place


@pytest.mark.parametrize("order", [("follower", "leader"), ("leader", "follower")])
def test_each_phase_sees_what_earlier_phases_did(tmp_path, order):
    run(tmp_path, stage(objective=Game(order)))
    gaps, _ = by_hand(3, order)
    found = records(tmp_path)
    for row, record in zip(gaps, found, strict=True):
        for name, gap in row.items():
            np.testing.assert_allclose(record[f"gap/{name}"], gap, rtol=1e-6)
        # The last phase's loss is the step's; the first one's carries its name.
        np.testing.assert_allclose(record["loss"], row[order[1]] ** 2, rtol=1e-6)
        np.testing.assert_allclose(record[f"{order[0]}/loss"], row[order[0]] ** 2, rtol=1e-6)


def test_phases_accumulate_and_resume(tmp_path):
    run(tmp_path / "whole", stage(step=StepConfig(accumulate=2)))
    assert records(tmp_path / "whole") == records_of_resumed(tmp_path / "cut")


def records_of_resumed(workdir):
    """Train three steps with a stop after the second, from whose checkpoint it goes on."""
    from jaxherd.training import stage as module

    original, ask = module._Run._log, stage(step=StepConfig(accumulate=2))

    def log(self, number, *rest):
        if number == 2:
            self.stop.set()
        return original(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(module.Interrupted):
        patch.setattr(module._Run, "_log", log)
        run(workdir, ask)
    run(workdir, ask)
    return records(workdir)


def test_every_parameter_needs_one_owner():
    tree = {"a": {"w": 1}, "b": {"w": 2}}
    whole = dataclasses.make_dataclass("Objective", [("phases", tuple)])
    with pytest.raises(JaxherdError, match="'b/w' is owned by no phase"):
        phases_of(whole((Phase("one", ("a/",), None),)), tree)
    with pytest.raises(JaxherdError, match=r"'a/w' is owned by \['one', 'two'\]"):
        phases_of(whole((Phase("one", ("a/",), None), Phase("two", ("a", "b"), None))), tree)
    phase = Phase("one", ("a/",), None)
    assert phase.put(*phase.take(tree)) == tree


def test_moving_average_is_what_evaluations_and_later_stages_see(tmp_path):
    first = stage(
        step=StepConfig(average_decay=0.5),
        evaluations=(Evaluation("held", objective=Distance("follower", "leader")),),
    )
    later = stage(
        name="later", reads=("play",), initial="play", objective=Distance("follower", "leader")
    )
    run(tmp_path, first, later)
    average, place = {"follower": 0.0, "leader": 1.0}, {}
    for steps in (1, 2, 3):
        _, place = by_hand(steps)
        average = {name: 0.5 * average[name] + 0.5 * place[name] for name in place}
    gap = average["follower"] - average["leader"]
    assert abs(gap - (place["follower"] - place["leader"])) > 0.05
    held = records(tmp_path, kind="eval")[-1]
    np.testing.assert_allclose(held["held/gap/follower"], gap, rtol=1e-6)
    np.testing.assert_allclose(records(tmp_path, "later")[0]["gap/follower"], gap, rtol=1e-6)


def test_buffers_go_on_in_a_later_stage(tmp_path):
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Look:
        def __call__(self, running, moment):
            seen.append((moment, float(running.state.buffers["seen"])))

    later = stage(name="later", reads=("play",), initial="play", callbacks=(Look(),))
    run(tmp_path, stage(), later)
    assert seen[0] == ("start", 3.0) and seen[-1] == ("end", 6.0)


@dataclasses.dataclass(frozen=True)
class Imitate:
    """Move the follower to a frozen model's follower."""

    def __call__(self, model, batch, key, *, frozen=None):
        gap = model.follower[...] - frozen["teacher"].follower[...]
        loss = 0.5 * (gap**2).sum() + 0 * batch["x"].sum() + 0 * model.leader[...].sum()
        return loss, {"loss": pair(loss, 1.0)}


def test_frozen_models_come_from_earlier_stages_and_stay(tmp_path, devices):
    copy = stage(
        name="copy",
        reads=("play",),
        objective=Imitate(),
        frozen=(FrozenModel("teacher", PairConfig(), "play"),),
        evaluations=(Evaluation("held"),),
    )
    program = copy.program(devices[:2])
    assert jax.tree.leaves(copy.abstract_inputs(program)[2])
    run(tmp_path, stage(), copy)
    teacher = by_hand(3)[1]["follower"]
    gap = 0.0 - teacher
    for record in records(tmp_path, "copy"):
        np.testing.assert_allclose(record["loss"], gap**2, rtol=1e-5)
        gap -= RATE * gap
    np.testing.assert_allclose(
        records(tmp_path, "copy", "eval")[-1]["held/loss"], gap**2, rtol=1e-5
    )
    with pytest.raises(JaxherdError, match="'play' is needed and not among reads"):
        dataclasses.replace(copy, reads=())


def test_an_evaluation_that_does_not_fit_is_told_before_anything_runs(tmp_path, devices):
    @dataclasses.dataclass(frozen=True)
    class Odd(Ones):
        def batch_spec(self, split="train"):
            rows = 8 if split == "train" else 3
            return {"x": BatchField((rows, 2), "float32", ("batch", None))}

    odd = stage(data=Odd(), evaluations=(Evaluation("held"),))
    with pytest.raises(JaxherdError, match="evaluation 'held'.*of size 3 does not divide by 2"):
        run_experiment(
            Experiment("tests/play", "cpu", "cpu", (odd,)),
            tmp_path / "w",
            target="cpu",
            devices=tuple(devices[:2]),
        )
    assert not (tmp_path / "w").exists()
