"""A classifier as a guard: scores, folders, streams, and a long text that hides nothing."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import split
from jaxherd.data.ngrams import NgramConfig
from jaxherd.inference.guards import HeldText, load_guard
from jaxherd.inference.guards.classifier import ClassifierGuard
from jaxherd.models.ngram_classifier import NgramClassifierConfig

CONFIG = NgramClassifierConfig(("a", "b"), NgramConfig((2, 3), 512, 32, 16), width=8, hidden=8)
TEXTS = [f"some text number {n} about {'this' * (n % 5)}" for n in range(12)]


@pytest.fixture(scope="module")
def guard():
    module = CONFIG.build(jax.random.key(0))
    scores = ClassifierGuard(module, 1.0).scores(TEXTS).max(axis=1)
    return ClassifierGuard(module, float(np.median(scores)), name="tiny", calibration={"x": 1})


def test_numbers_of_ngrams_are_fixed():
    """A folder is used on another machine than the one that trained it."""
    numbers = NgramConfig((2,), 1000, 4, 4).numbers(["ab", ""])
    assert numbers.shape == (2, 5) and numbers.dtype == np.int32
    assert numbers.tolist() == [[*numbers[0, :3].tolist(), -1, -1], [numbers[1, 0], -1, -1, -1, -1]]
    again = NgramConfig((2,), 1000, 4, 4).numbers(["ab"])
    assert (again == numbers[:1]).all() and len(set(numbers[0, :3].tolist())) == 3
    assert numbers[0, :3].tolist() == [FIXED[" a"], FIXED["ab"], FIXED["b "]]


# By the formula of `jaxherd.data.ngrams`, in Python's own integers.
def _by_hand(gram, size=2, buckets=1000, mask=2**64 - 1):
    total = size
    for character in gram:
        total = ((total ^ ord(character)) * 0x100000001B3) & mask
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        total = ((total ^ (total >> 33)) * factor) & mask
    return (total ^ (total >> 33)) % buckets


FIXED = {gram: _by_hand(gram) for gram in (" a", "ab", "b ")}


def test_windows_cover_the_text():
    ngrams = CONFIG.ngrams
    assert ngrams.windows("") == [""] and ngrams.windows("", complete=False) == []
    text = "".join(chr(97 + n % 26) for n in range(100))
    cut = ngrams.windows(text)
    assert cut[0] == text[:32] and cut[1] == text[16:48] and cut[-1].endswith(text[-1])
    assert {c for window in cut for c in window} == set(text)
    assert all(len(w) == 32 for w in ngrams.windows(text, complete=False))


def test_the_worst_window_counts(guard):
    bad = max(TEXTS, key=lambda text: guard.scores([text]).max())
    assert guard.pre([{"role": "user", "content": bad}]).vetoed
    clean = min(TEXTS, key=lambda text: guard.scores([text]).max())
    scores = guard.scores([clean, bad, clean])
    assert scores.shape == (3, 2) and np.allclose(scores[0], scores[2])
    # Beyond other text it is found as well: the windows that hold it score as they did.
    long = "x" * 16 * 8 + bad
    window = guard.window_scores(CONFIG.ngrams.windows(long))
    assert guard.scores([long])[0].tolist() == window.max(axis=0).tolist()
    verdict = guard.post([], bad)
    assert verdict.vetoed and verdict.reasons and set(verdict.scores) == {"a", "b"}


def test_streams_agree_with_the_whole_answer(guard):
    for seed in range(8):
        random = np.random.default_rng(seed)
        text = " ".join(random.choice(["some", "text", "number", "zq", "about", "7"], 60))
        held, shown, begin = HeldText(guard, []), "", 0
        while begin < len(text):
            size = int(random.integers(1, 90))
            shown += held.push(text[begin : begin + size])
            begin += size
        shown += held.finish()
        whole = guard.post([], text)
        assert held.vetoed == whole.vetoed
        assert shown == text if not whole.vetoed else text.startswith(shown) and shown != text


def test_folders(guard, tmp_path):
    guard.save(tmp_path / "guard")
    again = load_guard(tmp_path / "guard")
    assert isinstance(again, ClassifierGuard)
    assert (again.name, again.threshold, again.calibration) == ("tiny", guard.threshold, {"x": 1})
    assert again.scores(TEXTS).tolist() == guard.scores(TEXTS).tolist()
    path = tmp_path / "guard" / "guard.json"
    entries = json.loads(path.read_text())
    for change, told in [
        ({"threshold": 2}, "threshold"),
        ({"threshold": "x"}, "threshold"),
        ({"format": 9}, "format 9"),
    ]:
        path.write_text(json.dumps(entries | change))
        with pytest.raises(JaxherdError, match=told):
            load_guard(tmp_path / "guard")


def test_a_text_that_is_too_long_to_read_is_vetoed(guard):
    assert guard.post([], "x" * 200_001).scores == {"unread": 1.0}
    assert not ClassifierGuard(guard.module, 1.0).post([], "x", complete=False).vetoed


def test_counts():
    module = CONFIG.build(jax.random.key(0))
    sizes = [leaf.size for leaf in jax.tree.leaves(split(module)[1])]
    assert CONFIG.num_params() == sum(sizes) == 512 * 8 + 8 * 8 + 8 + 8 * 2 + 2
    for change in ({"labels": ()}, {"labels": ("a", "a")}, {"width": 0}):
        with pytest.raises(JaxherdError):
            dataclasses.replace(CONFIG, **change)
    wrongs: list[dict[str, Any]] = [
        dict(sizes=()), dict(sizes=(300,)), dict(buckets=1), dict(stride=0),
    ]  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(JaxherdError):
            NgramConfig(**wrong)
