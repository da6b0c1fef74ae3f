"""Online RL: rounds, exact resumption from any moment, the filter, and that reward rises."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from jaxherd.core import batch as batch_lib
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment
from jaxherd.core.layouts import Layout
from jaxherd.core.runner import run_experiment
from jaxherd.methods import online_rl
from jaxherd.methods.heldout_reward import HeldoutReward
from jaxherd.methods.online_rl import PolicyRollouts, row_order
from jaxherd.methods.policy_optimization import GroupPolicyOptimization
from jaxherd.methods.prompt_filter import PromptFilter
from jaxherd.training.guards import Guards
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import RunConfig, TrainStage
from tests.methods.tiny_policy import CONFIG, Letters

# Two steps a round and an estimate every second round: of eight steps, rounds begin at 0, 2, 4, 6
# and estimates come before 0 and 4.
DATA = PolicyRollouts(
    Letters(),
    prompts=4,
    group=4,
    batch_size=16,
    epochs=2,
    max_new_tokens=6,
    sequence_length=24,
    rows=16,
    filter=PromptFilter(every=2, samples=2, pass_reward=0.25, least=2),
)


def stage(**changes) -> TrainStage:
    settings: dict[str, Any] = dict(
        name="rl",
        model=CONFIG,
        data=DATA,
        objective=GroupPolicyOptimization(temperature=0.9),
        optimizer=Optimizer(schedule=Schedule(1e-2, "constant", 0), weight_decay=0.0),
        layout=Layout("one"),
        guards=Guards(spike_sigmas=None),
        run_config=RunConfig(steps=8, eval_every=5, checkpoint_every=3, loggers=("jsonl",)),
        callbacks=(HeldoutReward(Letters(), max_new_tokens=6, rows=16),),
    )
    return TrainStage(**settings | changes)


def run(workdir, devices=1, **changes):
    """Return (what was said, records)."""
    said: list[str] = []
    thing = Experiment("tests/rl", "cpu", "cpu", (stage(**changes),))
    used = tuple(jax.devices()[:devices])
    run_experiment(thing, workdir, target="cpu", devices=used, say=said.append, quiet=True)
    lines = (workdir / "rl" / "metrics.jsonl").read_text().splitlines()
    return said, [json.loads(line) for line in lines]


def files(workdir) -> dict:
    """Return what the rounds hold and what the filters decided."""
    found = {}
    for path in sorted((workdir / "rl" / "rollouts").iterdir()):
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found[path.name] = {name: arrays[name].tolist() for name in arrays.files}
        else:
            found[path.name] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    said, records = run(workdir)
    return said, records, files(workdir)


def test_a_run_as_it_should_be(whole):
    said, records, kept = whole
    assert list(kept) == [
        "filter-000000.json", "filter-000001.json", *(f"round-{n:06d}.npz" for n in range(4))
    ]  # fmt: skip
    train = [r for r in records if r["kind"] == "train"]
    # At a round's first step the policy is the one that was asked, at its second no longer.
    ratios = [r["ratio"] for r in train]
    assert ratios[::2] == pytest.approx([1.0] * 4, abs=1e-5)
    assert all(abs(ratio - 1) > 1e-4 for ratio in ratios[1::2])
    measured = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in measured] == [5, 8]
    assert set(measured[0]) >= {"heldout/reward", "heldout/pass", "heldout/pass/say"}
    assert sum("pass rate" in line and "prompts stay (say" in line for line in said) == 2
    for number, problems in ((n, kept[f"round-{n:06d}.npz"]["problems"]) for n in range(4)):
        # Both capabilities by turns, of the prompts that the filter kept.
        assert [p // 6 for p in problems] == ([0, 1, 0, 1] if number % 2 == 0 else [1, 0, 1, 0])
        assert set(problems) <= set(kept[f"filter-{number // 2:06d}.json"]["kept"])


@pytest.mark.slow  # compiles the step again, for two devices
def test_several_devices_of_one_process(tmp_path, whole):
    """One of them samples, all of them train."""
    config = RunConfig(steps=4, checkpoint_every=4, loggers=("jsonl",))
    layout = Layout("fsdp", fsdp=-1)
    _, found = run(tmp_path, 2, run_config=config, layout=layout, callbacks=())
    _, records, kept = whole
    assert files(tmp_path)["round-000000.npz"]["tokens"] == kept["round-000000.npz"]["tokens"]
    wanted = [r["grad_norm"] for r in records if r["kind"] == "train"][:2]
    assert [r["grad_norm"] for r in found][:2] == pytest.approx(wanted, rel=1e-3)


class Killed(BaseException):
    """Nobody catches it."""


def kill_at(monkeypatch, name, call, after):
    """Let a function of the iterator die at its n-th call, before or after its work."""
    original, calls = getattr(online_rl, name), []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == call and after:
            raise Killed
        return result

    monkeypatch.setattr(online_rl, name, dies)


# (function, call, before or after): checkpoints are at steps 3 and 6.
MOMENTS = [
    pytest.param("roll_out", 1, False, id="before-the-first-answers"),
    pytest.param("write_round", 1, True, id="the-first-round-is-written"),
    pytest.param("roll_out", 3, False, id="between-rounds-in-the-sampling"),
    pytest.param("write_round", 3, True, id="a-round-is-written-and-not-used"),
    pytest.param("write_json", 2, False, id="an-estimate-is-made-and-not-written"),
    pytest.param("write_json", 2, True, id="an-estimate-is-written-and-not-used"),
    pytest.param("rollout_take", 6, False, id="inside-a-round"),
    pytest.param("rollout_take", 8, False, id="inside-the-last-round"),
]


@pytest.mark.parametrize("name, call, after", MOMENTS)
def test_a_kill_at_any_moment_resumes_to_the_same_batches(
    tmp_path, whole, monkeypatch, name, call, after
):
    _, records, kept = whole
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, name, call, after)
        run(tmp_path)
    _, found = run(tmp_path)
    assert found == records
    assert files(tmp_path) == kept


def test_a_batch_is_what_the_spec_says_and_order_keeps_groups(whole):
    _, _, kept = whole
    pool = {k: np.asarray(v) for k, v in kept["round-000000.npz"].items()}
    rows = {k: v for k, v in pool.items() if k in DATA.batch_spec()}
    casted = {k: v.astype(DATA.batch_spec()[k].dtype) for k, v in rows.items()}
    batch_lib.check(casted, DATA.batch_spec())
    order = row_order(list("abab"), 4, 3, (0, 0)).reshape(3, 4, 4)
    assert order[0].reshape(-1).tolist() == list(range(16))
    for groups in order:
        assert (groups % 4 == np.arange(4)).all()
        # A capability keeps its places in every pass.
        assert [g // 4 % 2 for g in groups[:, 0]] == [0, 1, 0, 1]


def test_what_is_gone_damaged_or_other_is_told(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "rollout_take", 6, False)  # the checkpoint stands inside round 1
        run(tmp_path)
    path = tmp_path / "rl" / "rollouts" / "round-000001.npz"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(JaxherdError, match="round-000001.npz is damaged"):
        run(tmp_path)
    path.unlink()
    with pytest.raises(JaxherdError, match="round-000001.npz is gone"):
        run(tmp_path)
    with np.load(path.with_name("round-000000.npz")) as arrays:
        entries = {**arrays, "data": np.asarray("of another run")}
    np.savez(path, **entries)
    with pytest.raises(JaxherdError, match="belongs to other rollouts"):
        run(tmp_path)


def test_what_cannot_run_is_refused():
    with pytest.raises(JaxherdError, match="sampled by one process and this run has 2"):
        DATA.build(split="train", seed=0, process_index=0, process_count=2)
    with pytest.raises(JaxherdError, match="no 'heldout' split"):
        DATA.build(split="heldout", seed=0)
    rows = DATA.build(split="train", seed=0)
    with pytest.raises(JaxherdError, match="within a training stage"):
        next(rows)
    with pytest.raises(JaxherdError, match="belongs to other rollouts"):
        DATA.build(split="train", seed=1).set_state(rows.get_state())
    for changes, words in (
        ({"group": 1}, "group=1"),
        ({"batch_size": 6}, "whole groups of 4"),
        ({"prompts": 5}, "divide the 20 answers"),
        ({"max_new_tokens": 24}, "no room for a prompt"),
    ):
        with pytest.raises(JaxherdError, match=words):
            dataclasses.replace(DATA, **changes)
    with pytest.raises(JaxherdError, match="longest prompt has 8 tokens"):
        dataclasses.replace(DATA, sequence_length=13).build(split="train", seed=0)


def test_rewards_rise(tmp_path):
    """From letters by chance (one character in ten) to hardly anything else, in 30 steps."""
    data = dataclasses.replace(
        DATA, prompts=8, group=8, batch_size=64, epochs=1, rows=64, filter=PromptFilter(every=0)
    )
    changes = dict(
        data=data,
        objective=GroupPolicyOptimization(),
        optimizer=Optimizer(schedule=Schedule(2e-2, "constant", 0), weight_decay=0.0),
        run_config=RunConfig(steps=30, checkpoint_every=30, loggers=("jsonl",)),
    )
    _, records = run(tmp_path, **changes)
    rewards = [r["reward"] for r in records if r["kind"] == "train"]
    assert rewards[0] < 0.25
    assert np.mean(rewards[-5:]) > 0.6
