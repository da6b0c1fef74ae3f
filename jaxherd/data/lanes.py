"""Packing that sees documents one after the other: one endless stream per row of the batch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxherd.data.corpus import Corpus, Document
from jaxherd.data.mixture import endless, mix
from jaxherd.data.packing import CONTENT_FIELDS, ROW_DTYPES, Row, Stretches, stretch
from jaxherd.data.tokenizers.base import Tokenizer
from jaxherd.data.tokens import document_ids


def packed_lanes(
    sources: Sequence[Any],
    weights: Sequence[float],
    seeds: Sequence[int],
    *,
    batch_size: int,
    sequence_length: int,
    packing: str,
    bins: int,
    shuffle: bool,
    pad_id: int,
    to_stretches: Callable[[Any], list[Row]] | None = None,
) -> Callable[[int], Any]:
    """Return the function that makes the stream of row r.

    Args:
        sources: random access to `Stretches`, or to documents when `to_stretches` is given.
        weights: the share of each source's elements.
        seeds: one per source.
        batch_size: the number of lanes; lane r takes elements r, r + B, r + 2B, ...
        sequence_length: T.
        packing: "concat", "first_fit" or "best_fit".
        bins: rows filled at once by the two fits; more bins leave less padding.
        shuffle, pad_id: as usual.
        to_stretches: tokenises and cuts one document.
    """
    streams = [endless(s, seed=seed, shuffle=shuffle) for s, seed in zip(sources, seeds)]

    def lane(row: int) -> Any:
        import grain

        # Sliced before mixing: the other way round a mixture's period could meet the batch size
        # and give one lane a single source.
        elements = mix([stream[row::batch_size] for stream in streams], weights)
        # Lanes share the prefetching thread of the whole batch.
        serial = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        parts = elements.to_iter_dataset(serial)
        if to_stretches is not None:
            parts = grain.experimental.FlatMapIterDataset(parts, _flat_map(to_stretches))
        packed = _pack(parts, packing, sequence_length, bins, pad_id, seed=seeds[0] + row)
        return packed.map(_rename)

    return lane


def _pack(parts: Any, packing: str, length: int, bins: int, pad_id: int, *, seed: int) -> Any:
    import grain

    lengths: dict[str, int] = dict.fromkeys(CONTENT_FIELDS, length)
    if packing == "concat":
        return grain.experimental.ConcatThenSplitIterDataset(parts, length_struct=lengths)
    kinds = {
        "first_fit": grain.experimental.FirstFitPackIterDataset,
        "best_fit": grain.experimental.BestFitPackIterDataset,
    }
    padding = {"tokens": pad_id, "targets": pad_id, "loss_weights": 0.0, "target_bytes": 0}
    return kinds[packing](
        parts,
        length_struct=lengths,
        num_packing_bins=bins,
        seed=seed % 2**31,
        padding_struct=padding,
    )


def _rename(packed: dict[str, np.ndarray]) -> Row:
    """Take the one segment and position array of Grain's four equal ones."""
    row = {name: packed[name] for name in CONTENT_FIELDS}
    row["segment_ids"] = packed["tokens_segment_ids"]
    row["positions"] = packed["tokens_positions"]
    return {name: np.asarray(row[name], dtype) for name, dtype in ROW_DTYPES.items()}


def tokenize_to_stretches(
    document: Document,
    *,
    tokenizer: Tokenizer,
    token_bytes: Int32[np.ndarray, " V"],
    sequence_length: int,
    add_bos: bool,
    add_eos: bool,
    pad_id: int,
) -> list[Row]:
    """Tokenise one document and cut it into stretches of at most T tokens."""
    ids = np.asarray(
        document_ids(tokenizer, tokenizer.encode(document.text), add_bos=add_bos, add_eos=add_eos),
        np.int32,
    )
    return [
        stretch(ids, start, min(start + sequence_length, len(ids)), token_bytes, pad_id)
        for start in range(0, len(ids), sequence_length)
    ]


def mean_length(stretches: Stretches, token_count: int) -> float:
    """Return tokens per stretch, which turns shares of tokens into shares of stretches."""
    return token_count / len(stretches)


def streaming(corpora: Sequence[Corpus], **settings: Any) -> tuple[list[Any], Callable]:
    """Return sources and cutter for tokenising while training."""
    return list(corpora), functools.partial(tokenize_to_stretches, **settings)


@functools.cache
def _flat_map_class() -> type:
    import grain

    class Cut(grain.experimental.FlatMapTransform):
        """One document to its stretches."""

        # Grain wants a bound; documents have none that is worth naming.
        max_fan_out = 2**31

        def __init__(self, function: Callable[[Any], list[Row]]):
            self._function = function

        def flat_map(self, element: Any) -> list[Row]:
            """Cut one document."""
            return self._function(element)

    return Cut


def _flat_map(function: Callable[[Any], list[Row]]) -> Any:
    return _flat_map_class()(function)
