"""The trainer with a toy model: guards, accumulation, records, checkpoints, interrupts."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.batch import BatchField
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import Module, parameter
from jaxherd.core.runner import run_experiment
from jaxherd.training.checkpoints import Checkpoints
from jaxherd.training.guards import Guards
from jaxherd.training.metrics import pair
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import RunConfig, StepConfig, TrainStage
from jaxherd.training.stopping import Interrupted


class Line(Module):
    def __init__(self, key):
        self.w = parameter(jax.random.normal(key, (4,)), ("embed",))


@dataclasses.dataclass(frozen=True)
class LineConfig:
    width: int = 4

    def build(self, key):
        return Line(key)

    def num_params(self):
        return 4


class Numbers:
    """Batch n is made from n alone; marks tell the objective what to spoil."""

    def __init__(self, bad):
        self._bad, self.n = bad, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.n += 1
        x = np.random.default_rng(self.n).normal(size=(8, 4)).astype(np.float32)
        return {"x": x * dict(self._bad).get(self.n, 1.0)}

    def get_state(self):
        return {"n": self.n}

    def set_state(self, state):
        self.n = state["n"]


@dataclasses.dataclass(frozen=True)
class NumbersConfig:
    bad: tuple[tuple[int, float], ...] = ()

    def batch_spec(self):
        return {"x": BatchField((8, 4), "float32", ("batch", None))}

    def build(self, *, split, seed, process_index=0, process_count=1, cache_dir=None):
        return Numbers(self.bad)


@dataclasses.dataclass(frozen=True)
class Squares:
    def __call__(self, model, batch, key, *, frozen=None):
        error = ((batch["x"] @ (model.w[...] - jnp.arange(4.0))) ** 2).sum()
        rows = batch["x"].shape[0]
        return error / rows, {"loss": pair(error, rows)}


def stage(bad=(), **changes) -> TrainStage:
    settings = dict(
        name="fit",
        model=LineConfig(),
        data=NumbersConfig(tuple(bad)),
        objective=Squares(),
        optimizer=Optimizer(schedule=Schedule(0.1, "constant", 0), weight_decay=0.0),
        layout=Layout("one"),
        guards=Guards(spike_after=5, spike_sigmas=30.0),
        run_config=RunConfig(steps=20, checkpoint_every=6, loggers=("jsonl",)),
    )
    return TrainStage(**settings | changes)


def run(workdir, **changes):
    """Return (what was said, records)."""
    said: list[str] = []
    thing = Experiment("tests/line", "cpu", "cpu", (stage(**changes),))
    run_experiment(
        thing, workdir, target="cpu", devices=tuple(jax.devices()[:1]), say=said.append, quiet=True
    )
    return said, records(workdir)


def records(workdir):
    return [json.loads(line) for line in (workdir / "fit/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))[1]


def test_nan_is_skipped_and_told(tmp_path, story, capsys):
    _, found = run(tmp_path, bad=[(4, np.nan), (12, np.inf)])
    told = [x for x in capsys.readouterr().out.splitlines() if "not finite, update skipped" in x]
    assert [x.split(":")[0] for x in told] == ["step 4", "step 12"]
    assert [r["step"] for r in found if r["guard/non_finite"]] == [4, 12]
    assert found[3]["loss"] is None and np.isfinite(found[-1]["loss"])
    assert [r["loss"] for r in found[:3]] == [r["loss"] for r in story[:3]]


def test_spike_is_skipped_and_told(tmp_path, capsys):
    _, found = run(tmp_path, bad=[(15, 1e3)])
    out = capsys.readouterr().out
    assert "step 15: loss" in out and "standard deviations above" in out
    assert [r["step"] for r in found if r["guard/spike"]] == [15]
    assert found[15]["loss"] < found[13]["loss"] * 5


def test_bad_updates_stop_the_run(tmp_path):
    with pytest.raises(JaxherdError, match="4 updates in a row were skipped up to step 10"):
        run(tmp_path, bad=[(n, np.nan) for n in range(7, 20)], guards=Guards(stop_after=4))
    assert [r["step"] for r in records(tmp_path)][-1] >= 9


def test_raising_guard(tmp_path):
    with pytest.raises(JaxherdError, match="step 7: loss nan.*not finite"):
        run(tmp_path, bad=[(7, np.nan)], guards=Guards(non_finite="raise"))


def test_accumulation_is_the_same_run(tmp_path, story):
    _, found = run(tmp_path, step=StepConfig(accumulate=4))
    np.testing.assert_allclose(
        [r["loss"] for r in found], [r["loss"] for r in story], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(JaxherdError, match="accumulate=3 does not divide the 8 rows"):
        run(tmp_path / "other", step=StepConfig(accumulate=3))
    assert not (tmp_path / "other").exists()


def interrupted_at(workdir, step, monkeypatch, **changes):
    from jaxherd.training import stage as module

    original = module._Run._log

    def log(self, number, *rest):
        if number == step:
            self.stop.set()
        return original(self, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="checkpoint saved"):
        patch.setattr(module._Run, "_log", log)
        run(workdir, **changes)


@pytest.mark.parametrize("step", [1, 11, 18, 20])
def test_a_stop_at_any_step_resumes_alike(tmp_path, story, monkeypatch, step):
    interrupted_at(tmp_path, step, monkeypatch)
    assert not (tmp_path / "fit" / "done.json").exists()
    _, found = run(tmp_path)
    assert found == story
    assert json.loads((tmp_path / "fit/done.json").read_text())["summary"]["train/loss"]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_with_its_status(tmp_path, story, monkeypatch, number, status):
    from jaxherd.training import stage as module

    original = module._Run._log

    def log(self, step, *rest):
        if step == 7:
            os.kill(os.getpid(), number)
        return original(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_log", log)
        with pytest.raises(Interrupted, match="run the same command to go on") as stopped:
            run(tmp_path)
    assert stopped.value.exit_status == status
    assert run(tmp_path)[1] == story


@dataclasses.dataclass(frozen=True)
class SlowNumbers(NumbersConfig):
    """Data whose opening can be told."""

    def build(self, *, split, seed, process_index=0, process_count=1, cache_dir=None, report=None):
        if report is not None:
            report("counting", 0, 2)
        return Numbers(self.bad)


@pytest.mark.parametrize("quiet", [False, True])
def test_the_opening_of_data_is_shown(tmp_path, capsys, quiet):
    config = RunConfig(steps=1, loggers=("jsonl",))
    thing = Experiment("t/line", "cpu", "cpu", (stage(data=SlowNumbers(), run_config=config),))
    devices = tuple(jax.devices()[:1])
    run_experiment(thing, tmp_path, target="cpu", devices=devices, say=lambda _: None, quiet=quiet)
    told = capsys.readouterr().err
    assert ("fit: counting: 0 of 2\nfit: compiling the step\n" in told) == (not quiet)


@dataclasses.dataclass(frozen=True)
class Now:
    """Squares with a metric that is counted in the batches of positive sums alone."""

    def __call__(self, model, batch, key, *, frozen=None):
        loss, metrics = Squares()(model, batch, key)
        counted = (batch["x"].sum() > 0).astype(jnp.float32)
        return loss, {**metrics, "sometimes": pair(counted * 3.0, counted)}


def test_a_metric_is_absent_where_nothing_was_counted(tmp_path):
    _, found = run(tmp_path, objective=Now())
    there = [r["sometimes"] for r in found if "sometimes" in r]
    assert 0 < len(there) < len(found) and set(there) == {3.0}


FILES = [
    "_CHECKPOINT_METADATA",
    "state/_METADATA",
    "state/manifest.ocdbt",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "state/ocdbt.process_0/manifest.ocdbt",
    "state/d",
]


@pytest.mark.parametrize(
    "how", ["half", *(pytest.param(how, marks=pytest.mark.slow) for how in ("empty", "gone"))]
)
@pytest.mark.parametrize("name", FILES)
def test_checkpoint_cut_short(tmp_path, story, monkeypatch, name, how):
    """Each kind of file of a checkpoint; with the list of sizes and, for some, without it."""
    interrupted_at(tmp_path, 14, monkeypatch)
    folder = tmp_path / "fit" / "checkpoints"
    *_, older, newest = sorted(int(p.name) for p in folder.iterdir())
    path = folder / str(newest) / name
    if path.is_dir():
        path = next(p for p in path.rglob("*") if p.is_file())
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if how == "half" else 0)
    said, found = run(tmp_path)
    assert any(f"checkpoint {newest} is damaged" in line for line in said), said
    assert any(f"resuming at step {older}" in line for line in said), said
    assert found == story


def test_all_checkpoints_damaged(tmp_path, monkeypatch):
    interrupted_at(tmp_path, 14, monkeypatch)
    for path in (tmp_path / "fit" / "checkpoints").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(JaxherdError, match="none of the checkpoints .* can be read: restore"):
        run(tmp_path)


def test_checkpoint_of_another_config(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"w": jnp.ones((4,))}, {"n": 3})
    checkpoints.wait()
    with pytest.raises(JaxherdError, match=r"of another config: w \(4,\) \(wanted \(5,\)\)"):
        checkpoints.restore({"w": jax.ShapeDtypeStruct((5,), jnp.float32)})
    checkpoints.close()


def test_retention(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, {"w": jnp.full((4,), float(step))}, {"n": step})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 6, 7]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"w": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=here)}
    step, state, position = checkpoints.restore(wanted)
    assert (step, position, float(state["w"][0])) == (7, {"n": 7}, 7.0)
    checkpoints.close()


def test_a_redone_checkpoint_is_not_taken_for_damaged(tmp_path):
    """Sizes of an earlier checkpoint of the same number do not count."""
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "3.json").write_text('{"state/gone": 7}')
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, {"w": jnp.ones((4,))}, {"n": 3})
    checkpoints._checkpointer.wait()  # killed before the sizes are written
    assert checkpoints._damage(3) is None
    checkpoints.close()


@pytest.mark.parametrize("settings", [
    lambda: Schedule(peak=float("nan")),
    lambda: Schedule(warmup_steps=-5),
    lambda: Optimizer(clip=-1.0),
    lambda: Guards(stop_after=0),
    lambda: RunConfig(steps=5, profile_at=99),
    lambda: StepConfig(compute_dtype="float16"),
    lambda: StepConfig(average_decay=1.0),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(JaxherdError):
        settings()


def test_a_missing_logger_is_told_before_anything_is_written(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else find(n))
    config = RunConfig(steps=2, loggers=("jsonl", "wandb"))
    with pytest.raises(JaxherdError, match="wandb"):
        run(tmp_path / "w", run_config=config)
    assert not (tmp_path / "w").exists()


def test_a_later_stage_starts_from_the_parameters_whatever_its_optimiser(tmp_path):
    later = stage(
        name="tune",
        reads=("fit",),
        initial="fit",
        optimizer=Optimizer("sgd", Schedule(1e-6, "constant", 0), weight_decay=0.0),
    )
    thing = Experiment("tests/line", "cpu", "cpu", (stage(), later))
    devices = tuple(jax.devices()[:1])
    run_experiment(thing, tmp_path, target="cpu", devices=devices, say=lambda _: None, quiet=True)
    path = tmp_path / "tune" / "metrics.jsonl"
    tuned = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    fitted = [r["loss"] for r in records(tmp_path)]
    # The same batches again, now with the parameters of the end and almost no change.
    assert tuned[0] < fitted[0] / 2 and tuned[3] < fitted[3] / 2


@dataclasses.dataclass(frozen=True)
class Counter:
    """A callback that measures: returns the step, at evaluations."""

    def __call__(self, run, moment):
        return {"heldout/reward": float(run.step)} if moment == "eval" else None


def test_what_callbacks_measure_is_logged_once_a_step(tmp_path, monkeypatch):
    changes = dict(
        callbacks=(Counter(),),
        run_config=RunConfig(steps=12, eval_every=5, checkpoint_every=6, loggers=("jsonl",)),
    )
    _, whole = run(tmp_path / "whole", **changes)
    wanted = [(s, float(s)) for s in (5, 10, 12)]
    found = [(r["step"], r["heldout/reward"]) for r in whole if r["kind"] == "eval"]
    assert found == wanted
    summary = json.loads((tmp_path / "whole/fit/done.json").read_text())["summary"]
    assert summary["heldout/reward"] == 12.0
    # A stop just before the measurement of step 10: the resumed run makes up for it.
    # (Step 9 is logged while step 10 runs.)
    interrupted_at(tmp_path / "stopped", 9, monkeypatch, **changes)
    assert [r["step"] for r in records(tmp_path / "stopped") if r["kind"] == "eval"] == [5]
    assert run(tmp_path / "stopped", **changes)[1] == whole


@dataclasses.dataclass(frozen=True)
class Differences:
    """An objective of pairs: the square of the difference of two successive rows."""

    rows_together = 2

    def __call__(self, model, batch, key, *, frozen=None):
        scores = batch["x"] @ model.w[...]
        error = ((scores[0::2] - scores[1::2] - 1.0) ** 2).sum()
        pairs = len(batch["x"]) // 2
        return error / pairs, {"loss": pair(error, pairs)}


def test_accumulation_keeps_rows_together(tmp_path):
    once = run(tmp_path / "once", objective=Differences())[1]
    parts = run(tmp_path / "parts", objective=Differences(), step=StepConfig(accumulate=4))[1]
    np.testing.assert_allclose(
        [r["loss"] for r in parts], [r["loss"] for r in once], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(JaxherdError, match="8 rows of batch field 'x', 2 of which belong together"):
        run(tmp_path / "eight", objective=Differences(), step=StepConfig(accumulate=8))
