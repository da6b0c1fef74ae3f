"""Two processes share out the recordings, train, and sample what one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxherd.data.audio.files import read_audio, write_audio

pytestmark = pytest.mark.slow  # a minute and a half on two idle cores

EXPERIMENT = pathlib.Path(__file__).with_name("tiny_music_run.py")


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    root, rate = tmp_path_factory.mktemp("music"), 2000
    t = np.arange(rate * 4) / rate
    for number in range(3):
        for label, speed in (("slow", 1.0), ("fast", 8.0)):
            (root / label).mkdir(exist_ok=True)
            wave = 0.5 * np.sin(2 * np.pi * (150 + 40 * number) * t) * np.cos(np.pi * speed * t)
            write_audio(root / label / f"{number}.wav", wave[:, None].astype("f4"), rate)
    return root


def run(workdir, music, cache, processes: int) -> list[str]:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    started = []
    for number in range(processes):
        settings = {**os.environ, "JAXHERD_TEST_MUSIC": str(music), "XLA_FLAGS": "",
                    "JAXHERD_CACHE": str(cache)}  # fmt: skip
        if processes > 1:
            settings |= {
                "JAXHERD_COORDINATOR": f"127.0.0.1:{port}",
                "JAXHERD_PROCESSES": str(processes),
                "JAXHERD_PROCESS": str(number),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "jaxherd.cli.main", "run", str(EXPERIMENT),
                 "--workdir", str(workdir)],
                env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        outputs = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, outputs
    return outputs


def metrics(folder: pathlib.Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def test_two_processes_do_what_one_does(music, tmp_path):
    run(tmp_path / "one", music, tmp_path / "cache", 1)
    outputs = run(tmp_path / "two", music, tmp_path / "cache", 2)
    # The first process speaks, and of its own share: half of the six.
    encoded = [sum("encoded" in line for line in out.splitlines()) for out in outputs]
    assert encoded == [3, 0], outputs
    assert len(list((tmp_path / "two" / "latents").glob("*.npy"))) == 6
    one, two = (
        json.loads((tmp_path / name / "latents" / "index.json").read_text())
        for name in ("one", "two")
    )
    assert [t["name"] for t in one["tracks"]] == [t["name"] for t in two["tracks"]]
    np.testing.assert_allclose(two["mean"], one["mean"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(two["std"], one["std"], rtol=1e-3, atol=1e-3)
    steps = [metrics(tmp_path / name / "flow") for name in ("one", "two")]
    assert len(steps[0]) == 6 and all(0 < step["real_frames"] < 1 for step in steps[0])
    for one, two in zip(*steps, strict=True):
        # Each process counts its own frames; what is logged is the mean over all of them.
        assert two["real_frames"] == pytest.approx(one["real_frames"], rel=1e-6)
        for name in ("loss", "coupling/paired", "coupling/independent"):
            assert two[name] == pytest.approx(one[name], rel=2e-2)
    waves = [read_audio(tmp_path / n / "samples" / "0-slow.wav")[0] for n in ("one", "two")]
    assert waves[0].shape == waves[1].shape
    assert np.abs(waves[0] - waves[1]).max() < 0.05 * np.abs(waves[0]).max()
    assert not list((tmp_path / "two").rglob("*.partial"))
