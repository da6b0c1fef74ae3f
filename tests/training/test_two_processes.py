"""Two processes over loopback tell the one-process story: losses, checkpoints, data positions."""

import signal
import socket

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # about a minute on two idle cores


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def start_two(command, workdir, *arguments):
    address = f"127.0.0.1:{free_port()}"
    return [
        command(
            workdir,
            "--set",
            "layout.fsdp=-1",
            *arguments,
            JAXHERD_COORDINATOR=address,
            JAXHERD_PROCESSES="2",
            JAXHERD_PROCESS=str(number),
        )
        for number in range(2)
    ]


def end(processes) -> list[str]:
    outputs = []
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return outputs


def losses(workdir):
    import json

    lines = (workdir / "pretrain" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    train = {r["step"]: r["loss"] for r in found if r["kind"] == "train"}
    held = {r["step"]: r["heldout/loss"] for r in found if r["kind"] == "eval"}
    assert len(train) + len(held) == len(found), "a step is told twice"
    return train, held


def test_two_processes_give_the_one_process_curve(command, run, tmp_path):
    status, output = run(tmp_path / "one", "--set", "layout.fsdp=-1")
    assert status == 0, output
    train, held = losses(tmp_path / "one")

    # The first attempt is told to stop, in one process only; both save and stop together.
    processes = start_two(command, tmp_path / "two")
    log = tmp_path / "two" / "pretrain" / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert all(process.poll() is None for process in processes), end(processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = end(processes)
    assert [process.returncode for process in processes] == [143, 143], outputs
    processes = start_two(command, tmp_path / "two")
    outputs = end(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resuming at step" in outputs[0] and "pretrain" not in outputs[1]

    found_train, found_held = losses(tmp_path / "two")
    assert found_train.keys() == train.keys() and found_held.keys() == held.keys()
    for step, loss in train.items():
        np.testing.assert_allclose(found_train[step], loss, rtol=2e-4, err_msg=f"step {step}")
    for step, loss in held.items():
        np.testing.assert_allclose(found_held[step], loss, rtol=2e-4, err_msg=f"step {step}")
