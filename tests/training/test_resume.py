"""Whatever stops a run, the resumed one tells the same story as the one that was left alone."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import time

import pytest

from jaxherd.core.errors import StorageError

STEPS = 30


def records(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "pretrain" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_steps(workdir: pathlib.Path) -> list[int]:
    folder = workdir / "pretrain" / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def logged(workdir: pathlib.Path) -> int:
    """Return how many whole lines the log has so far."""
    path = workdir / "pretrain" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def inode(workdir: pathlib.Path) -> int | None:
    path = workdir / "pretrain" / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def wait_for_lines(process: subprocess.Popen, workdir: pathlib.Path, lines: int) -> None:
    end = time.monotonic() + 150
    while logged(workdir) < lines and process.poll() is None:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.002)


def same_story(workdir: pathlib.Path, expected: list[dict]) -> None:
    """Every step once, in order, with bit-identical numbers."""
    found = records(workdir)
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    assert found == expected


@pytest.fixture(scope="module")
def left_alone(run, tmp_path_factory) -> list[dict]:
    workdir = tmp_path_factory.mktemp("left-alone")
    status, output = run(workdir)
    assert status == 0, output
    found = records(workdir)
    assert [r["step"] for r in found if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in found if r["kind"] == "eval"] == [20, STEPS]
    assert found[STEPS - 1]["loss"] < found[0]["loss"] - 1
    return found


def kill_often(command, workdir, expected, kills: int, seed: int) -> None:
    """Kill the run `kills` times at random moments, then let it finish."""
    chance = random.Random(seed)
    for _ in range(kills):
        before = saved_steps(workdir) if (workdir / "pretrain" / "checkpoints").exists() else []
        old = inode(workdir)
        process = command(workdir)
        # A resumed run first replaces the log; then a few steps and a part of one go by.
        while inode(workdir) == old and process.poll() is None:
            time.sleep(0.002)
        wanted = logged(workdir) + chance.choice((0, 1, 2, 5, 7, 8, 9))
        wait_for_lines(process, workdir, min(wanted, len(expected)))
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not before or max(saved_steps(workdir), default=0) >= before[-1], "a step is lost"
        found = records_of_whole_lines(workdir)
        assert found == expected[: len(found)]
    process = command(workdir)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    same_story(workdir, expected)


def records_of_whole_lines(workdir: pathlib.Path) -> list[dict]:
    text = (workdir / "pretrain" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_three_kills(command, left_alone, tmp_path):
    kill_often(command, tmp_path, left_alone, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_twenty_kills(command, left_alone, tmp_path, seed):
    kill_often(command, tmp_path, left_alone, kills=5, seed=seed)


@pytest.mark.slow
def test_killed_after_the_last_checkpoint(run, left_alone, tmp_path):
    """The moment between the last save and the record that the stage is done."""
    status, output = run(tmp_path, "--quiet")
    assert status == 0, output
    done = tmp_path / "pretrain" / "done.json"
    summary = json.loads(done.read_text())["summary"]
    done.unlink()
    status, output = run(tmp_path, "--quiet")
    assert status == 0, output
    same_story(tmp_path, left_alone)
    assert json.loads(done.read_text())["summary"] == summary


def test_a_run_is_a_model_source(run, left_alone, tmp_path):
    """What was trained can be loaded, by the run's folder or the stage's, with its tokenizer."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxherd

    assert run(tmp_path, "--quiet")[0] == 0
    module = jaxherd.load(tmp_path)
    tokenizer = jaxherd.load_tokenizer(tmp_path / "pretrain")
    tokens = tokenizer.encode("king sees a dark sea and sings of old")
    logits = jax.jit(lambda m, t: m(t))(module, jnp.asarray([tokens]))[0]
    nll = -jax.nn.log_softmax(logits[:-1])[np.arange(len(tokens) - 1), np.asarray(tokens[1:])]
    # Close to what the run's own evaluation says, far from the untrained model's ln 256.
    assert float(nll.mean()) < left_alone[-1]["heldout/loss"] + 0.5 < 5.0
    with pytest.raises(jaxherd.JaxherdError, match="has a checkpoint yet"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "run.json").write_text('{"experiment": {"stages": []}}')
        jaxherd.load(tmp_path / "empty")


def test_sigterm_saves_and_resumes(command, run, left_alone, tmp_path):
    process = command(tmp_path)
    wait_for_lines(process, tmp_path, 9)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "checkpoint saved; run the same command to go on" in output
    stopped_at = records(tmp_path)[-1]["step"]
    assert saved_steps(tmp_path)[-1] == stopped_at < STEPS
    status, output = run(tmp_path)
    assert status == 0 and f"resuming at step {stopped_at}" in output, output
    same_story(tmp_path, left_alone)
    # A third time there is nothing to do, and nothing is done.
    status, output = run(tmp_path)
    assert status == 0 and "nothing to do" in output, output
    same_story(tmp_path, left_alone)


@pytest.mark.slow
def test_checkpoint_cut_short(command, run, left_alone, tmp_path):
    process = command(tmp_path)
    wait_for_lines(process, tmp_path, 20)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    *_, older, newest = saved_steps(tmp_path)
    folder = tmp_path / "pretrain" / "checkpoints" / str(newest)
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    status, output = run(tmp_path)
    assert status == 0, output
    assert f"checkpoint {newest} is damaged" in output
    assert f"resuming at step {older}" in output
    same_story(tmp_path, left_alone)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, which only root can make."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("this machine does not allow mounts")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(50_000, id="room_for_the_log"),
        pytest.param(0, id="room_for_nothing", marks=pytest.mark.slow),
    ],
)
def test_full_disk(command, run, left_alone, small_disk, left):
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    process = command(workdir)
    wait_for_lines(process, workdir, 4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    saved = saved_steps(workdir)
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while free_bytes(small_disk) > left:
            file.write(b"x" * 4096)
    status, output = run(workdir)
    assert status == StorageError.exit_status, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("jaxherd: ") and "disk" in last and "is full" in last, output
    assert "make room and run the same command to go on" in last
    assert "Traceback" not in output
    if left:
        assert f"the last good checkpoint is step {saved[-1]}" in last
    assert saved_steps(workdir)[: len(saved)] == saved
    ballast.unlink()
    status, output = run(workdir)
    assert status == 0 and f"resuming at step {saved[-1]}" in output, output
    same_story(workdir, left_alone)


def free_bytes(disk: pathlib.Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def test_other_settings_in_the_same_folder(run, tmp_path):
    steps = ("--set", "run_config.steps=6")
    status, output = run(tmp_path, *steps)
    assert status == 0, output
    status, output = run(tmp_path, *steps, "--set", "model.embed_dim=32")
    assert status == 2
    assert "model.embed_dim was 16 and is now 32" in output
    assert len(output.strip().splitlines()) <= 2
    # Even without the record of the run, the checkpoint is not taken for another model's.
    (tmp_path / "run.json").unlink()
    (tmp_path / "pretrain" / "done.json").unlink()
    status, output = run(tmp_path, *steps, "--set", "model.embed_dim=32")
    assert status == 2
    assert "is of another config" in output and "Traceback" not in output
