"""Documents as token ids, tokenised once and kept in memory-mapped files.

A store is a folder of shards; shard k of n holds documents k, k + n, k + 2n, ... in order, as

    tokens-kkkkk-of-nnnnn.npy   all ids one after the other, uint16 or int32
    ends-kkkkk-of-nnnnn.npy     int64, the end of each document in it

`tokenize_shard` writes one shard, so that an engine can map it over machines for a large corpus.
"""

import hashlib
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.data.cache import atomic_folder, cache_root, locked
from jaxherd.data.corpus import Corpus
from jaxherd.data.tokenizers.base import Tokenizer

# Documents handed to the tokenizer at once: enough to keep its threads busy.
_CHUNK = 256


def document_ids(
    tokenizer: Tokenizer, text_ids: list[int], *, add_bos: bool, add_eos: bool
) -> list[int]:
    """Return a document's ids with the beginning and end tokens that the tokenizer has."""
    begin = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    end = [tokenizer.eos_id] if add_eos and tokenizer.eos_id is not None else []
    return [*begin, *text_ids, *end]


def _name(kind: str, shard: int, count: int) -> str:
    return f"{kind}-{shard:05d}-of-{count:05d}.npy"


def tokenize_shard(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    shard_index: int = 0,
    shard_count: int = 1,
    add_bos: bool = True,
    add_eos: bool = True,
) -> int:
    """Tokenise documents `shard_index::shard_count` into one shard; return its token count."""
    if not 0 <= shard_index < shard_count:
        raise JaxherdError(f"shard_index={shard_index} must lie in [0, {shard_count}).")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    raw = folder / f".{_name('tokens', shard_index, shard_count)}.raw"
    ends: list[int] = []
    total = 0
    try:
        with raw.open("wb") as file:
            for chunk in _chunks(range(shard_index, len(corpus), shard_count)):
                texts = [corpus[i].text for i in chunk]
                for text_ids in tokenizer.encode_batch(texts):
                    ids = document_ids(tokenizer, text_ids, add_bos=add_bos, add_eos=add_eos)
                    np.asarray(ids, dtype).tofile(file)
                    total += len(ids)
                    ends.append(total)
        target = np.lib.format.open_memmap(
            folder / _name("tokens", shard_index, shard_count), "w+", dtype, (total,)
        )
        if total:
            source = np.memmap(raw, dtype, "r")
            step = 1 << 24
            for start in range(0, total, step):
                target[start : start + step] = source[start : start + step]
        target.flush()
        # The ends come last: a shard with ends is whole.
        np.save(folder / _name("ends", shard_index, shard_count), np.asarray(ends, np.int64))
    finally:
        raw.unlink(missing_ok=True)
    return total


def _chunks(indices: range) -> Iterator[range]:
    for start in range(0, len(indices), _CHUNK):
        yield indices[start : start + _CHUNK]


class TokenStore:
    """Random access to the ids of each document; raises JaxherdError if a shard is missing."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)
        self._open()

    def _open(self) -> None:
        found = sorted(self.folder.glob("ends-*.npy"))
        if not found:
            raise JaxherdError(f"There are no tokens in {str(self.folder)!r}: tokenise first.")
        count = int(found[0].stem.rsplit("-", 1)[1])
        missing = [k for k in range(count) if not (self.folder / _name("ends", k, count)).is_file()]
        if missing:
            raise JaxherdError(
                f"{str(self.folder)!r} lacks {len(missing)} of {count} token shards, the first is "
                f"{missing[0]}: tokenise them with tokenize_shard."
            )
        names = [(_name("tokens", k, count), _name("ends", k, count)) for k in range(count)]
        self._tokens = [np.load(self.folder / tokens, mmap_mode="r") for tokens, _ in names]
        self._ends = [np.load(self.folder / ends) for _, ends in names]
        documents = sum(len(ends) for ends in self._ends)
        self.lengths = np.zeros(documents, np.int64)
        for k, ends in enumerate(self._ends):
            self.lengths[k::count] = np.diff(ends, prepend=0)
        self.token_count = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return ids `start:stop` of a document, as int32."""
        place, shard = divmod(int(index), len(self._tokens))
        ends = self._ends[shard]
        begin = int(ends[place - 1]) if place else 0
        end = int(ends[place])
        stop = end if stop is None else min(begin + stop, end)
        return np.asarray(self._tokens[shard][begin + start : stop], np.int32)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled by value; worker processes map the files themselves.
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._open()


def cached_tokens(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    add_bos: bool = True,
    add_eos: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> TokenStore:
    """Return the corpus's tokens, from the cache if the same texts met the same tokenizer before."""
    parts = ("1", corpus.fingerprint(), tokenizer.fingerprint(), str(add_bos), str(add_eos))
    key = hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]
    folder = cache_root(cache_dir) / "tokens" / key
    if not folder.is_dir():
        with locked(folder):
            if not folder.is_dir():
                started = time.time()
                with atomic_folder(folder) as scratch:
                    tokenize_shard(corpus, tokenizer, scratch, add_bos=add_bos, add_eos=add_eos)
                    note = f"{corpus.name}, {len(corpus)} documents, {time.time() - started:.1f} s"
                    (scratch / "about.txt").write_text(note + "\n", encoding="utf-8")
    return TokenStore(folder)
