"""Key-value pairs planted in real text: a retrieval task whose rows are those of packed text.

A row is one stretch of one document with P pairs planted in it, each asked for later; the value is
the next token to predict.  As "pair", a key symbol is followed by its value, which takes two steps
of attention to recall (the token before, then the key); as "fused", one symbol stands for both, and
the key comes alone as a question, which takes one:

    pair    ... text k7 v3 text text k2 v9 text ... text k2 [v9] text k7 [v3]
    fused   ... text k7v3 text text k2v9 text ... text k2 [k2v9] text k7 [k7v3]

Symbols lie beyond the tokenizer's vocabulary.  What cannot be known (a symbol's coming, a value at
first sight) has loss weight 0; text and asked values have weight 1.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from jaxherd.core.batch import BatchSpec
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.corpus import SPLITS
from jaxherd.data.packed_text import PackedText
from jaxherd.data.packing import Row, empty_row, row_spec
from jaxherd.data.pipeline import GrainBatches, batch_rows, check_sharding
from jaxherd.data.tokens import TokenStore

# Rows of the training split; made on demand, no two alike.
_TRAINING_ROWS = 2**40


@dataclasses.dataclass(frozen=True)
class RetrievalText:
    """Rows of text, some with planted pairs; fields are those of `data/packing.py`.

    Attributes:
      text: corpus, tokenizer (with a declared vocabulary size), T and batch sizes; an evaluation
        has `max_eval_batches` batches of rows drawn with a fixed seed.
      pairs: P, different keys of a row.
      occurrences: how often each pair comes in a spread row, the first time included.
      keys, values: different keys, and values that each may have.
      planting: "pair" or "fused", see above.
      plain_share: rows without pairs.
      end_share: of rows with pairs, those that are asked for every key once, at the very end, in
        random order; in the others all occurrences are spread over the row.
    """

    text: PackedText
    pairs: int = 6
    occurrences: int = 3
    keys: int = 64
    values: int = 64
    planting: Literal["pair", "fused"] = "pair"
    plain_share: float = 0.25
    end_share: float = 0.5

    def __post_init__(self):
        if not 1 <= self.pairs <= self.keys or self.values < 1:
            raise JaxherdError(
                f"pairs={self.pairs} must lie between 1 and keys={self.keys}, and values="
                f"{self.values} must be at least 1."
            )
        if self.occurrences < 2:
            raise JaxherdError(
                f"occurrences={self.occurrences}: a key must come twice to be asked."
            )
        for name in ("plain_share", "end_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise JaxherdError(f"{name}={getattr(self, name)} must lie in [0, 1].")
        if self.planting not in ("pair", "fused"):
            raise JaxherdError(
                f"planting={self.planting!r}: " + nearest(self.planting, ("pair", "fused"))
            )
        planted = self.pairs * (self.plant_size + 2 * (self.occurrences - 1))
        if planted >= self.text.sequence_length:
            raise JaxherdError(
                f"{self.pairs} pairs take {planted} of {self.text.sequence_length} tokens and "
                "leave no text: lower pairs or occurrences, or raise sequence_length."
            )
        if self.text.vocab_size is None:
            raise JaxherdError(
                "Symbols are numbered after the tokenizer's tokens: declare tokenizer_config."
                "vocab_size."
            )

    @property
    def first_key(self) -> int:
        """Return the id of the first key symbol."""
        assert self.text.vocab_size is not None
        return self.text.vocab_size

    @property
    def first_value(self) -> int:
        """Return the id of the first value symbol."""
        return self.first_key + self.keys

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, symbols included."""
        return self.first_value + self.values * (self.keys if self.planting == "fused" else 1)

    @property
    def plant_size(self) -> int:
        """Return the tokens of a planted pair; asking for it takes two in any case."""
        return 1 if self.planting == "fused" else 2

    def batch_spec(self, split: str = "train") -> BatchSpec:
        """Return the global shapes of a batch; does no input or output."""
        t = self.text
        size = t.batch_size if split == "train" else t.eval_batch_size or t.batch_size
        return row_spec(size, t.sequence_length)

    def build(
        self,
        *,
        split: str,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> GrainBatches:
        """Open the data: endless for "train", `text.max_eval_batches` batches for "heldout".

        Row r depends on the settings, the seed (training only) and r alone.

        Raises:
          JaxherdError: no such split, an evaluation without a size, or no document is as long as
            a row.
        """
        import grain

        if split not in SPLITS:
            raise JaxherdError(f"There is no split {split!r}: {nearest(split, SPLITS)}")
        size = self.batch_spec(split)["tokens"].shape[0]
        check_sharding(size, process_index, process_count)
        tokenizer = self.text.tokenizer(cache_dir=cache_dir)
        corpora, stores = self.text.token_stores(split, tokenizer, cache_dir=cache_dir)
        if split == "heldout":
            if self.text.max_eval_batches is None:
                raise JaxherdError("RetrievalText draws its evaluation: set text.max_eval_batches.")
            count, seed = size * self.text.max_eval_batches, 0
        else:
            count = _TRAINING_ROWS
        rows = _Rows(self, stores, tokenizer.token_bytes(), split, seed, count)
        place = {"process_index": process_index, "process_count": process_count}
        parts = [tokenizer.fingerprint(), *(c.fingerprint() for c in corpora)]
        parts += [split, str(seed), repr(self)]
        return GrainBatches(
            batch_rows(
                grain.MapDataset.source(rows),
                batch_size=size,
                threads=self.text.threads,
                prefetch=self.text.prefetch,
                **place,
            ),
            fingerprint=hashlib.sha256("/".join(parts).encode()).hexdigest()[:32],
            portable=True,
            about={
                "corpora": [
                    {"name": c.name, "documents": len(c), "fingerprint": c.fingerprint()}
                    for c in corpora
                ],
                "sequence_length": self.text.sequence_length,
                "pairs": self.pairs,
            },
            length=None if split == "train" else count // size,
            **place,
        )

    def answers(self, batch: Mapping[str, np.ndarray]) -> Int[np.ndarray, "N 3"]:
        """Return (row, place, planted) of each asked value.

        At `place` the input is the key and the target its value; `planted` is the place where the
        pair first came in the row.
        """
        tokens, targets = np.asarray(batch["tokens"]), np.asarray(batch["targets"])
        asked = (targets >= self.first_value) & (np.asarray(batch["loss_weights"]) > 0)
        rows, places = np.nonzero(asked)
        sought = targets if self.planting == "fused" else tokens
        planted = (tokens[rows] == sought[rows, places][:, None]).argmax(axis=1)
        return np.stack([rows, places, planted], axis=1)


class _Rows(Sequence[Row]):
    """Rows by number."""

    def __init__(
        self,
        config: RetrievalText,
        stores: Sequence[TokenStore],
        token_bytes: np.ndarray,
        split: str,
        seed: int,
        count: int,
    ):
        self._config, self._stores, self._count = config, list(stores), count
        self._bytes = np.zeros(config.vocab_size, np.int32)
        self._bytes[: len(token_bytes)] = token_bytes
        self._seed = (0x72657472, SPLITS.index(split), seed)
        length = config.text.sequence_length
        lengths = np.concatenate([store.lengths for store in self._stores])
        self._owner = np.repeat(np.arange(len(self._stores)), [len(s) for s in self._stores])
        self._first = np.cumsum([0, *(len(s) for s in self._stores)])
        # A start is drawn evenly from those that leave a whole row and one token more.
        self._ends = np.cumsum(np.maximum(lengths - length, 0))
        if not self._ends[-1]:
            raise JaxherdError(
                f"No document of the {split} split has more than {length} tokens (the longest has "
                f"{int(lengths.max(initial=0))}): lower sequence_length or use another corpus."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if not 0 <= index < self._count:
            raise IndexError(index)
        c, rng = self._config, np.random.default_rng((*self._seed, int(index)))
        length = c.text.sequence_length
        text = self._text(rng, length + 1)
        if rng.random() < c.plain_share:
            known = np.ones(length, bool)
            return self._row(text, known)
        keys = rng.choice(c.keys, c.pairs, replace=False)
        values = c.first_value + rng.integers(c.values, size=c.pairs)
        if c.planting == "fused":
            values += c.values * keys
        at_end = rng.random() < c.end_share
        spread = rng.permutation(np.repeat(np.arange(c.pairs), 1 if at_end else c.occurrences))
        asked = rng.permutation(c.pairs) if at_end else np.zeros(0, np.int64)
        events, planted, seen = [], [], set()
        for pair in [*spread, *asked]:
            planted.append(pair not in seen)
            seen.add(int(pair))
            whole = [c.first_key + keys[pair], values[pair]]
            events.append(whole[-c.plant_size :] if planted[-1] else whole)
        filler = length + 1 - sum(map(len, events))
        # An event goes before some token of the text, several may stand side by side; or at the
        # very end.
        gaps = np.full(len(events), filler)
        gaps[: len(spread)] = np.sort(rng.integers(filler, size=len(spread)))
        sizes = np.cumsum([0, *map(len, events)])
        ids = np.zeros(length + 1, np.int32)
        is_text = np.ones(length + 1, bool)
        known = np.ones(length + 1, bool)  # whether the token at a place can be predicted
        for number, symbols in enumerate(events):
            start = gaps[number] + sizes[number]
            stop = start + len(symbols)
            ids[start:stop], is_text[start:stop] = symbols, False
            known[start] = False
            known[stop - 1] = not planted[number]
        ids[is_text] = text[:filler]
        return self._row(ids, known[1:])

    def _text(self, rng: np.random.Generator, size: int) -> np.ndarray:
        at = int(rng.integers(self._ends[-1]))
        document = int(np.searchsorted(self._ends, at, side="right"))
        start = at - (int(self._ends[document - 1]) if document else 0)
        owner = int(self._owner[document])
        local = document - int(self._first[owner])
        return self._stores[owner].document(local, start, start + size)

    def _row(self, ids: np.ndarray, known: np.ndarray) -> Row:
        """Return the row of T + 1 ids; `known` says which targets count."""
        row = empty_row(len(known), 0)
        row["tokens"][:], row["targets"][:] = ids[:-1], ids[1:]
        row["loss_weights"][:] = known
        row["positions"][:] = np.arange(len(known))
        row["segment_ids"][:] = 1
        row["target_bytes"][:] = self._bytes[ids[1:]]
        return row


def replace_length(data: RetrievalText, length: int, **changes: Any) -> RetrievalText:
    """Return the same task with rows of another length, and other changes.

    Args:
      data: the task.
      length: T of the result.
      changes: of fields of `RetrievalText`, or of its `text`.
    """
    of_text = {f.name for f in dataclasses.fields(PackedText)}
    inner = {k: v for k, v in changes.items() if k in of_text}
    outer = {k: v for k, v in changes.items() if k not in of_text}
    text = dataclasses.replace(data.text, sequence_length=length, **inner)
    return dataclasses.replace(data, text=text, **outer)
