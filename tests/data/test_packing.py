import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxherd.core.batch import check
from jaxherd.core.errors import JaxherdError
from jaxherd.data.corpus import Document, DocumentList
from jaxherd.data.packing import ConcatRows, OnePass, Stretches, empty_row, row_spec
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.data.tokens import TokenStore, cached_tokens, tokenize_shard

TOKENIZER = ByteTokenizer()
COMMON = {"token_bytes": TOKENIZER.token_bytes(), "pad_id": 256}


def corpus_of(texts) -> DocumentList:
    return DocumentList("demo", [Document("demo", str(n), text) for n, text in enumerate(texts)])


def pairs_of(rows) -> list[tuple[int, int]]:
    """All (input, target) pairs that count, sorted."""
    found = []
    for row in rows:
        use = row["loss_weights"] > 0
        found += zip(row["tokens"][use].tolist(), row["targets"][use].tolist())
    return sorted(found)


def expected_pairs(texts) -> list[tuple[int, int]]:
    found = []
    for text in texts:
        ids = [257, *text.encode(), 258]
        found += zip(ids[:-1], ids[1:])
    return sorted(found)


def check_row(row, length):
    check({k: v[None] for k, v in row.items()}, row_spec(1, length))
    segments, positions = row["segment_ids"], row["positions"]
    content = segments > 0
    # Padding comes last, segments count up from 1, positions restart with each.
    assert not np.any(np.diff(content.astype(int)) > 0)
    inside = segments[content]
    if len(inside):
        assert inside[0] == 1 and set(np.diff(inside)) <= {0, 1}
    for segment in np.unique(inside):
        np.testing.assert_array_equal(
            positions[segments == segment], np.arange((segments == segment).sum())
        )
    assert not row["loss_weights"][~content].any()
    assert set(np.unique(row["loss_weights"])) <= {0.0, 1.0}
    # A target inside a segment is the next token; its bytes are counted where it counts.
    same = (segments[1:] == segments[:-1]) & content[1:]
    np.testing.assert_array_equal(row["targets"][:-1][same], row["tokens"][1:][same])
    assert row["loss_weights"][:-1][same].all()
    use = row["loss_weights"] > 0
    sizes = np.where(use, TOKENIZER.token_bytes()[row["targets"]], 0)
    np.testing.assert_array_equal(row["target_bytes"], sizes)


texts_strategy = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(texts=texts_strategy, length=st.integers(2, 30), seed=st.none() | st.integers(0, 3))
def test_concat_keeps_every_target_once(tmp_path_factory, texts, length, seed):
    folder = tmp_path_factory.mktemp("t")
    tokenize_shard(corpus_of(texts), TOKENIZER, folder)
    rows = ConcatRows(TokenStore(folder), length, order_seed=seed, **COMMON)
    made = [rows[i] for i in range(len(rows))]
    for row in made:
        check_row(row, length)
    assert pairs_of(made) == expected_pairs(texts)
    assert all((row["segment_ids"] > 0).all() for row in made[:-1])
    total = sum(int(row["target_bytes"].sum()) for row in made)
    assert total == sum(len(text.encode()) for text in texts)


@settings(max_examples=40, deadline=None)
@given(texts=texts_strategy, length=st.integers(2, 30))
def test_stretches_keep_every_target_once(tmp_path_factory, texts, length):
    folder = tmp_path_factory.mktemp("t")
    tokenize_shard(corpus_of(texts), TOKENIZER, folder)
    parts = Stretches(TokenStore(folder), length, **COMMON)
    made = [parts[i] for i in range(len(parts))]
    assert all(1 <= len(part["tokens"]) <= length for part in made)
    assert pairs_of(made) == expected_pairs(texts)


@settings(max_examples=30, deadline=None)
@given(texts=texts_strategy, batch=st.integers(1, 5), limit=st.none() | st.integers(1, 3))
def test_one_pass(tmp_path_factory, texts, batch, limit):
    folder = tmp_path_factory.mktemp("t")
    tokenize_shard(corpus_of(texts), TOKENIZER, folder)
    part = ConcatRows(TokenStore(folder), 8, order_seed=0, **COMMON)
    rows = OnePass([part, part], batch, padding=empty_row(8, 256), max_batches=limit)
    made = [rows[i] for i in range(len(rows))]
    assert len(made) % batch == 0
    if limit is None:
        assert pairs_of(made) == sorted(expected_pairs(texts) * 2)
        assert len(made) - 2 * len(part) < batch
    else:
        assert len(made) <= limit * batch


def test_known_row(tmp_path):
    tokenize_shard(corpus_of(["é", "ab"]), TOKENIZER, tmp_path)
    rows = ConcatRows(TokenStore(tmp_path), 6, order_seed=None, **COMMON)
    first, last = rows[0], rows[1]
    assert first["tokens"].tolist() == [257, 195, 169, 258, 257, 97]
    assert first["targets"].tolist() == [195, 169, 258, 256, 97, 98]
    assert first["loss_weights"].tolist() == [1, 1, 1, 0, 1, 1]
    assert first["positions"].tolist() == [0, 1, 2, 3, 0, 1]
    assert first["segment_ids"].tolist() == [1, 1, 1, 1, 2, 2]
    assert first["target_bytes"].tolist() == [1, 1, 0, 0, 1, 1]
    assert last["tokens"].tolist() == [98, 258, 256, 256, 256, 256]
    assert last["loss_weights"].tolist() == [1, 0, 0, 0, 0, 0]
    assert last["positions"].tolist() == [0, 1, 0, 0, 0, 0]
    assert last["segment_ids"].tolist() == [1, 1, 0, 0, 0, 0]
    with pytest.raises(IndexError):
        rows[2]


def test_shards_equal_one(tmp_path):
    texts = [f"text {n} " * n for n in range(11)]
    corpus = corpus_of(texts)
    tokenize_shard(corpus, TOKENIZER, tmp_path / "one")
    for shard in (2, 0, 1):
        if shard != 1:
            tokenize_shard(corpus, TOKENIZER, tmp_path / "many", shard_index=shard, shard_count=3)
    with pytest.raises(JaxherdError, match="lacks 1 of 3 token shards, the first is 1"):
        TokenStore(tmp_path / "many")
    tokenize_shard(corpus, TOKENIZER, tmp_path / "many", shard_index=1, shard_count=3)
    one, many = TokenStore(tmp_path / "one"), TokenStore(tmp_path / "many")
    copy = pickle.loads(pickle.dumps(many))
    assert len(one) == len(many) == 11 and one.token_count == many.token_count
    for n, text in enumerate(texts):
        for store in (one, many, copy):
            assert store.document(n).tolist() == [257, *text.encode(), 258]
        assert many.document(n, 2, 5).tolist() == [257, *text.encode(), 258][2:5]


def test_tokenised_once(cache, monkeypatch):
    corpus = corpus_of(["one", "two"])
    first = cached_tokens(corpus, TOKENIZER)
    from jaxherd.data import tokens

    monkeypatch.setattr(tokens, "tokenize_shard", None)  # calling it would fail
    assert cached_tokens(corpus, TOKENIZER).folder == first.folder
    with pytest.raises(TypeError):
        cached_tokens(corpus_of(["one", "twO"]), TOKENIZER)
    with pytest.raises(TypeError):
        cached_tokens(corpus, TOKENIZER, add_eos=False)
    assert [p for p in (cache / "tokens").iterdir() if p.is_dir()] == [first.folder]
