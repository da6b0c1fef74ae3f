import pathlib

import numpy as np
import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAXHERD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> pathlib.Path:
    """Sixty small files of nonsense with accents, of very different lengths."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["sea", "naïve", "tree", "über", "日本", "if", "x == 1", "\n", "stone", "🙂"]
    for n in range(60):
        count = int(rng.integers(1, 60))
        text = " ".join(rng.choice(words, count)) + f" end {n}."
        (folder / f"{n:02d}.txt").write_text(text, encoding="utf-8")
    return folder
