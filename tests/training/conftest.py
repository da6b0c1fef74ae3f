import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

EXPERIMENT = pathlib.Path(__file__).with_name("tiny_run.py")


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> pathlib.Path:
    """Small files of sentences that a byte model can learn something from."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ("king", "sees", "a", "dark", "sea", "and", "sings", "of", "old", "stone", "trees")
    for number in range(40):
        text = " ".join(rng.choice(words, int(rng.integers(40, 160)))) + ".\n"
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def command(texts, tmp_path_factory):
    """Return a function that starts `jaxherd run` of the tiny experiment in its own process."""
    cache = tmp_path_factory.mktemp("data-cache")

    def start(workdir, *arguments: str, **environment: str) -> subprocess.Popen:
        settings = {
            **os.environ,
            "JAXHERD_TEST_TEXTS": str(texts),
            "JAXHERD_CACHE": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "",
            **environment,
        }
        line = [sys.executable, "-m", "jaxherd.cli.main", "run", str(EXPERIMENT)]
        return subprocess.Popen(
            [*line, "--workdir", str(workdir), *arguments],
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def run(command):
    """Return a function that runs the tiny experiment to its end: (exit status, output)."""

    def to_the_end(workdir, *arguments: str, **environment: str) -> tuple[int, str]:
        process = command(workdir, *arguments, **environment)
        output, _ = process.communicate(timeout=180)
        return process.returncode, output

    return to_the_end
