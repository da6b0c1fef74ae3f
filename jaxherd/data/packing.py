"""Documents of any length to rows of one length.

A row has, for each of its T places, all int32 but the weights:

    tokens         the input
    targets        the next token of the same document
    loss_weights   float32: 1 where there is such a token, 0 at a document's end and on padding
    positions      0, 1, ... from the start of each document's stretch in the row
    segment_ids    1, 2, ... per document's stretch; 0 on padding
    target_bytes   UTF-8 bytes of the target, so that sum(nll) / ln 2 / sum(bytes) is bits per byte

A document cut by a row's edge goes on in another row, where positions start at 0 again; the
target across the cut is kept, so that each token but a document's first is a target exactly once.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from jaxherd.core.batch import BatchField, BatchSpec
from jaxherd.core.errors import JaxherdError
from jaxherd.data.tokenizers.base import Tokenizer
from jaxherd.data.tokens import TokenStore

Row = dict[str, np.ndarray]

ROW_DTYPES = {
    "tokens": "int32",
    "targets": "int32",
    "loss_weights": "float32",
    "positions": "int32",
    "segment_ids": "int32",
    "target_bytes": "int32",
}
CONTENT_FIELDS = ("tokens", "targets", "loss_weights", "target_bytes")


def row_spec(batch_size: int, sequence_length: int) -> BatchSpec:
    """Return the batch specification of packed rows."""
    shape = (batch_size, sequence_length)
    return {
        name: BatchField(shape, dtype, ("batch", "length")) for name, dtype in ROW_DTYPES.items()
    }


def stretch(
    ids: np.ndarray, start: int, stop: int, token_bytes: Int32[np.ndarray, " V"], pad_id: int
) -> Row:
    """Return inputs and targets of `ids[start:stop]`, where `ids` may go on after `stop`."""
    tokens = np.asarray(ids[start:stop], np.int32)
    following = np.asarray(ids[start + 1 : stop + 1], np.int32)
    n = len(following)
    targets = np.full(len(tokens), pad_id, np.int32)
    targets[:n] = following
    weights = np.zeros(len(tokens), np.float32)
    weights[:n] = 1.0
    sizes = np.zeros(len(tokens), np.int32)
    sizes[:n] = token_bytes[following]
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": weights,
        "target_bytes": sizes,
    }


def answer_stretch(
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    token_bytes: Int32[np.ndarray, " V"],
    pad_id: int,
    *,
    learn_prompt: bool = False,
) -> Row:
    """Return a prompt and its answer as one stretch, of whose targets the answer's alone count.

    Args:
      prompt_ids: at least one token.
      answer_ids: with the token that ends the answer.
      token_bytes, pad_id: as for `stretch`.
      learn_prompt: let the prompt's targets count as well.
    """
    ids = np.asarray([*prompt_ids, *answer_ids], np.int32)
    row = stretch(ids, 0, len(ids), token_bytes, pad_id)
    if not learn_prompt:
        # The prompt's last token is the first to have a target of the answer.
        row["loss_weights"][: len(prompt_ids) - 1] = 0.0
    return row


def join_stretches(stretches: Iterable[Row], sequence_length: int, pad_id: int) -> Row:
    """Lay stretches side by side in one row and pad the rest."""
    row = empty_row(sequence_length, pad_id)
    at = 0
    for segment, part in enumerate(stretches, 1):
        end = at + len(part["tokens"])
        for name in CONTENT_FIELDS:
            row[name][at:end] = part[name]
        row["positions"][at:end] = np.arange(end - at, dtype=np.int32)
        row["segment_ids"][at:end] = segment
        at = end
    return row


def empty_row(sequence_length: int, pad_id: int) -> Row:
    """Return a row of padding; its weights are 0."""
    row = {name: np.zeros(sequence_length, dtype) for name, dtype in ROW_DTYPES.items()}
    row["tokens"][:] = pad_id
    row["targets"][:] = pad_id
    return row


def preview_rows(
    batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, rows: int, *, show_learned: bool = False
) -> str:
    """Return the text of a batch's first rows, document by document, for a person to read.

    Args:
      batch: fields of a row, [B, T] each.
      tokenizer: that made it.
      rows: how many.
      show_learned: put what has loss weight between ⟦ and ⟧.
    """
    lines = []
    for row in range(min(rows, len(batch["tokens"]))):
        segments = np.asarray(batch["segment_ids"][row])
        tokens = np.asarray(batch["tokens"][row])
        # A token is learned where it is the target of the place before it.
        learned = np.append(False, np.asarray(batch["loss_weights"][row])[:-1] > 0)
        padding = int((segments == 0).sum())
        lines.append(f"── row {row}: {len(tokens) - padding} tokens, {padding} padding")
        for segment in range(1, int(segments.max(initial=0)) + 1):
            inside = segments == segment
            ids = tokens[inside]
            lines.append(f"┌ document {segment} ({len(ids)} tokens)")
            if not show_learned:
                lines.append(tokenizer.decode(ids.tolist(), skip_special=False))
                continue
            edges = np.flatnonzero(np.diff(learned[inside])) + 1
            parts = np.split(ids, edges)
            texts = [tokenizer.decode(part.tolist(), skip_special=False) for part in parts]
            lines.append(
                "".join(f"⟦{t}⟧" if n % 2 != learned[inside][0] else t for n, t in enumerate(texts))
            )
    return "\n".join(lines)


class ConcatRows(Sequence[Row]):
    """All documents end to end, cut every T tokens; row r is made on demand.

    Args:
        store: the documents.
        sequence_length: T.
        token_bytes: bytes of each token.
        pad_id: fills the last row.
        order_seed: documents are put in the random order of this seed; None keeps the corpus's.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        *,
        token_bytes: Int32[np.ndarray, " V"],
        pad_id: int,
        order_seed: int | None,
    ):
        self._store = store
        self._length = sequence_length
        self._token_bytes = token_bytes
        self._pad_id = pad_id
        self._order = np.arange(len(store))
        if order_seed is not None:
            self._order = np.random.default_rng((0x6F72646572, order_seed)).permutation(len(store))
        self._ends = np.cumsum(store.lengths[self._order])
        self._rows = -(-store.token_count // sequence_length)
        if not self._rows:
            raise JaxherdError("The corpus has no tokens: its documents are all empty.")

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index):
        if not 0 <= index < self._rows:
            raise IndexError(index)
        start = index * self._length
        stop = min(start + self._length, self._store.token_count)
        place = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < stop:
            document = int(self._order[place])
            begin = int(self._ends[place] - self._store.lengths[document])
            end = min(stop, int(self._ends[place]))
            if end > start:
                # One token more than the inputs, for the last target.
                ids = self._store.document(document, start - begin, end - begin + 1)
                parts.append(stretch(ids, 0, end - start, self._token_bytes, self._pad_id))
            start = end
            place += 1
        return join_stretches(parts, self._length, self._pad_id)


class Stretches(Sequence[Row]):
    """Documents cut into stretches of at most T tokens, for packing without further cuts."""

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        *,
        token_bytes: Int32[np.ndarray, " V"],
        pad_id: int,
    ):
        self._store = store
        self._length = sequence_length
        self._token_bytes = token_bytes
        self._pad_id = pad_id
        counts = -(-store.lengths // sequence_length)
        self._documents = np.repeat(np.arange(len(store)), counts)
        firsts = np.cumsum(counts) - counts
        self._parts = np.arange(len(self._documents)) - firsts[self._documents]
        if not len(self._documents):
            raise JaxherdError("The corpus has no tokens: its documents are all empty.")

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):
        start = int(self._parts[index]) * self._length
        document = int(self._documents[index])
        ids = self._store.document(document, start, start + self._length + 1)
        return stretch(ids, 0, min(len(ids), self._length), self._token_bytes, self._pad_id)


class OnePass(Sequence[Row]):
    """Rows of several corpora, each once, in a fixed random order, padded to whole batches.

    The order does not depend on the run's seed, so that evaluations can be compared; the first
    batches are therefore a fair sample of all corpora.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Row]],
        batch_size: int,
        *,
        padding: Row,
        max_batches: int | None = None,
    ):
        self._parts = list(parts)
        self._padding = padding
        self._firsts = np.cumsum([0, *(len(part) for part in parts)])
        total = int(self._firsts[-1])
        self._order = np.random.default_rng(0x65766C).permutation(total)
        batches = -(-total // batch_size)
        if max_batches is not None:
            batches = min(batches, max_batches)
        self._rows = batches * batch_size

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index):
        if not 0 <= index < self._rows:
            raise IndexError(index)
        if index >= len(self._order):
            return {name: value.copy() for name, value in self._padding.items()}
        row = self._order[index]
        part = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self._parts[part][int(row - self._firsts[part])]
