import dataclasses
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxherd.core.batch import BatchIterator, DataConfig, check
from jaxherd.core.errors import JaxherdError
from jaxherd.data.mixture import MixtureComponent
from jaxherd.data.packed_text import Bytes, PackedText, TokenizerFile, TrainedBpe

VARIANTS = {
    "concat": {},
    "first_fit": {"packing": "first_fit", "packing_bins": 3},
    "best_fit": {"packing": "best_fit", "packing_bins": 3},
    "stream": {"tokenize": "stream"},
    "stream_first_fit": {"tokenize": "stream", "packing": "first_fit", "packing_bins": 2},
}


@pytest.fixture(scope="module")
def folders(text_folder, tmp_path_factory):
    """Two corpora that can be told apart by their letters."""
    other = tmp_path_factory.mktemp("other")
    for n in range(30):
        (other / f"{n}.txt").write_text("Z" * (5 + 3 * n), encoding="utf-8")
    return str(text_folder), str(other), tmp_path_factory.mktemp("cache")


def config(folders, variant="concat", *, mixture=True, **changes) -> PackedText:
    first, second, _ = folders
    corpus = (MixtureComponent(first, 3.0), MixtureComponent(second, 1.0)) if mixture else first
    options = {"sequence_length": 32, "batch_size": 4, "heldout_fraction": 0.2}
    return PackedText(corpus, Bytes(), **{**options, **VARIANTS[variant], **changes})


def build(folders, data, **options):
    return data.build(**{"split": "train", "seed": 0, "cache_dir": folders[2], **options})


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_meet_their_description(folders, variant):
    data = config(folders, variant)
    assert isinstance(data, DataConfig)
    iterator = build(folders, data)
    assert isinstance(iterator, BatchIterator)
    for batch in take(iterator, 12):
        check(batch, data.batch_spec())
        segments = batch["segment_ids"]
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        np.testing.assert_array_equal(batch["targets"][:, :-1][same], batch["tokens"][:, 1:][same])
        assert (batch["loss_weights"][:, :-1][same] == 1).all()
        assert (batch["loss_weights"][segments == 0] == 0).all()
        assert (batch["tokens"][segments == 0] == 256).all()
        starts = np.diff(segments, prepend=0, axis=1) > 0
        assert (batch["positions"][starts] == 0).all()
    assert "tokenizer" in json.loads(json.dumps(iterator.describe()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_anywhere_is_exact(folders, variant):
    data = config(folders, variant)
    batches, states = [], []
    iterator = build(folders, data)
    for _ in range(14):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    other = build(folders, data)
    for step in (3, 11, 0, 7, 4, 5):  # back and forth
        other.set_state(json.loads(states[step]))
        assert_same(take(other, 3), batches[step : step + 3])
    for step in range(14):  # a new iterator, as after a restart
        restarted = build(folders, data)
        restarted.set_state(json.loads(states[step]))
        assert_same([next(restarted)], [batches[step]])
        assert restarted.get_state()["steps"] == step + 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(folders, variant, processes):
    data = config(folders, variant)
    whole = take(build(folders, data), 10)
    parts = [
        take(build(folders, data, process_index=p, process_count=processes), 10)
        for p in range(processes)
    ]
    joined = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in whole[0]}
        for step in range(10)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("variant", ["first_fit", "stream"])
def test_position_of_another_process_is_refused(folders, variant):
    data = config(folders, variant)
    state = build(folders, data).get_state()
    with pytest.raises(JaxherdError, match="same number of processes"):
        build(folders, data, process_index=1, process_count=2).set_state(state)


def test_random_access_position_moves_between_process_counts(folders):
    data = config(folders)
    whole = build(folders, data)
    take(whole, 5)
    half = build(folders, data, process_index=1, process_count=2)
    half.set_state(whole.get_state())
    assert_same([next(half)], [{k: v[2:] for k, v in next(whole).items()}])


def test_position_of_other_data_is_refused(folders):
    state = build(folders, config(folders)).get_state()
    for other in (config(folders, sequence_length=16), config(folders, mixture=False)):
        with pytest.raises(JaxherdError, match="other data"):
            build(folders, other).set_state(state)
    with pytest.raises(JaxherdError, match="other data"):
        build(folders, config(folders), seed=1).set_state(state)
    with pytest.raises(JaxherdError, match="format"):
        build(folders, config(folders)).set_state({**state, "format": 99})


def _rows(batches):
    return [tuple(row) for batch in batches for row in batch["tokens"].tolist()]


def test_an_epoch_is_a_permutation_and_epochs_differ(folders):
    data = config(folders, mixture=False, batch_size=1)
    iterator = build(folders, data)
    count = iterator.describe()["rows_per_epoch"]
    first, second = _rows(take(iterator, count)), _rows(take(iterator, count))
    assert sorted(first) == sorted(second) and first != second
    assert len(set(first)) == count
    other = _rows(take(build(folders, data, seed=1), count))
    assert other != first
    plain = config(folders, mixture=False, batch_size=1, shuffle=False)
    ordered = build(folders, plain)
    assert _rows(take(ordered, count)) == _rows(take(ordered, count))


@pytest.mark.parametrize("variant", ["concat", "first_fit"])
def test_mixture_has_its_weights(folders, variant):
    z = other = 0
    for batch in take(build(folders, config(folders, variant)), 150):
        text = batch["tokens"][batch["segment_ids"] > 0]
        z += int((text == ord("Z")).sum())
        other += int((text < 256).sum()) - int((text == ord("Z")).sum())
    assert z / (z + other) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_one_exact_pass(folders, size):
    data = config(folders, eval_batch_size=size)
    iterator = build(folders, data, split="heldout")
    batches = list(iterator)
    assert len(batches) == len(iterator) == iterator.describe()["batches"]
    for batch in batches:
        check(batch, data.batch_spec("heldout"))
    from jaxherd.data.corpus import load_corpus

    texts = [
        document.text
        for folder in folders[:2]
        for document in load_corpus(folder, split="heldout", heldout_fraction=0.2)
    ]
    assert sum(int(b["target_bytes"].sum()) for b in batches) == sum(len(t.encode()) for t in texts)
    weights = sum(float(b["loss_weights"].sum()) for b in batches)
    assert weights == sum(len(t.encode()) + 1 for t in texts)
    again = build(folders, data, split="heldout", seed=5)
    assert_same(list(again), batches)
    halves = [
        list(build(folders, data, split="heldout", process_index=p, process_count=size))
        for p in range(size)
    ]
    assert _rows(batches) == [row for step in zip(*halves) for row in _rows(step)]


def test_evaluation_limits(folders):
    few = build(folders, config(folders, max_eval_batches=2), split="heldout")
    assert len(list(few)) == len(few) == 2
    one = build(folders, config(folders, max_eval_documents=1), split="heldout")
    assert sum(c["documents"] for c in one.describe()["corpora"]) == 2


def test_evaluation_resumes(folders):
    data = config(folders)
    iterator = build(folders, data, split="heldout")
    next(iterator)
    state, rest = iterator.get_state(), list(iterator)
    again = build(folders, data, split="heldout")
    again.set_state(state)
    assert_same(list(again), rest)


def test_training_never_sees_heldout_text(folders):
    data = config(folders, mixture=False, batch_size=1, sequence_length=4096)
    seen = "".join(data.preview(batch, rows=1) for batch in take(build(folders, data), 4))
    from jaxherd.data.corpus import load_corpus

    for document in load_corpus(folders[0], split="heldout", heldout_fraction=0.2):
        assert document.text[-10:] not in seen or "end" not in document.text[-10:]


def test_trained_tokenizer_and_preview(folders, tmp_path):
    data = dataclasses.replace(config(folders), tokenizer_config=TrainedBpe(300))
    tokenizer = data.tokenizer(cache_dir=folders[2])
    assert tokenizer.vocab_size <= data.vocab_size == 300
    batch = next(build(folders, data))
    text = data.preview(batch, rows=2, cache_dir=folders[2])
    assert "row 1" in text and "document 1" in text
    ids = batch["tokens"][0][batch["segment_ids"][0] == 1]
    assert tokenizer.decode(ids.tolist(), skip_special=False) in text
    tokenizer.save(tmp_path / "t")
    by_file = dataclasses.replace(data, tokenizer_config=TokenizerFile(str(tmp_path / "t")))
    assert_same([next(build(folders, by_file))], [batch])


def test_description_needs_no_files():
    data = PackedText(
        "tfds://c4/en:3.0.1",
        TokenizerFile("gs://nowhere/tokenizer.model", vocab_size=202_048),
        sequence_length=8192,
        batch_size=512,
        tokenize="stream",
    )
    assert data.batch_spec()["tokens"].shape == (512, 8192)
    assert data.vocab_size == 202_048


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sequence_length": 1}, "sequence_length=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"packing": "bestfit"}, "did you mean 'best_fit'"),
        ({"tokenize": "caché"}, "did you mean 'cache'"),
        ({"packing_bins": 0}, "packing_bins"),
        ({"workers": 1, "packing": "first_fit"}, "workers needs"),
        ({"corpus": ()}, "corpus is empty"),
    ],
)
def test_bad_settings(changes, words):
    from beartype.roar import BeartypeCallHintParamViolation
    from jaxtyping import TypeCheckError

    with pytest.raises((JaxherdError, TypeCheckError, BeartypeCallHintParamViolation)) as caught:
        PackedText(**changes)
    if isinstance(caught.value, JaxherdError):
        assert words in str(caught.value)
    else:
        assert "packing" in changes or "tokenize" in changes


def test_bad_build(folders, tmp_path):
    data = config(folders)
    with pytest.raises(JaxherdError, match="not divisible by 3"):
        build(folders, data, process_count=3)
    with pytest.raises(JaxherdError, match=r"must lie in \[0, 2\)"):
        build(folders, data, process_index=2, process_count=2)
    with pytest.raises(JaxherdError, match="did you mean 'train'"):
        build(folders, data, split="trian")
    missing = dataclasses.replace(
        data, tokenizer_config=TokenizerFile(str(tmp_path / "tokenizer.json"))
    )
    with pytest.raises(JaxherdError, match="tokenizer is missing"):
        build(folders, missing, cache_dir=tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(JaxherdError, match="There is no corpus"):
        build(folders, dataclasses.replace(data, corpus="pyhton"))
    with pytest.raises(JaxherdError, match="must be > 0"):
        MixtureComponent("python", 0.0)


def test_closed(folders):
    iterator = build(folders, config(folders))
    next(iterator)
    iterator.close()
    with pytest.raises(JaxherdError, match="closed"):
        next(iterator)


def test_default_corpus_end_to_end(tmp_path):
    """The first thing a user does: real text, a tokenizer trained here, readable batches."""
    data = PackedText(sequence_length=128, batch_size=2, max_bytes=400_000)
    data = dataclasses.replace(data, tokenizer_config=TrainedBpe(512))
    iterator = data.build(split="train", seed=0)
    batch = next(iterator)
    check(batch, data.batch_spec())
    assert (batch["tokens"] < 512).all()
    # Packed without padding, at more than one byte a token.
    assert (batch["segment_ids"] > 0).all()
    assert batch["target_bytes"].sum() > 1.5 * batch["loss_weights"].sum()
    assert len(data.build(split="heldout", seed=0)) > 1


_WORKERS = """
import dataclasses, json, sys
from jaxherd.data.packed_text import Bytes, PackedText
if __name__ == "__main__":
    data = PackedText(sys.argv[1], Bytes(), sequence_length=32, batch_size=4, heldout_fraction=0.2)
    plain = data.build(split="train", seed=0)
    many = dataclasses.replace(data, workers=2).build(split="train", seed=0)
    same = lambda: all((a == b).all() for a, b in zip(next(plain).values(), next(many).values()))
    assert all(same() for _ in range(7))
    state = json.loads(json.dumps(many.get_state()))
    many = dataclasses.replace(data, workers=2).build(split="train", seed=0)
    many.set_state(state)
    assert all(same() for _ in range(5))
    print("same")
"""


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(folders, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_WORKERS)
    done = subprocess.run(
        [sys.executable, str(script), folders[0]],
        capture_output=True,
        text=True,
        env={**os.environ, "JAXHERD_CACHE": str(folders[2])},
        check=False,
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]
