"""The text data of an experiment: corpus, tokenizer, packing and batches in one dataclass."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxherd.core.batch import BatchSpec
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.cache import cache_root
from jaxherd.data.corpus import SPLITS, Corpus, load_corpus
from jaxherd.data.lanes import mean_length, packed_lanes, streaming
from jaxherd.data.mixture import MixtureComponent, endless, mix
from jaxherd.data.packing import (
    ConcatRows,
    OnePass,
    Stretches,
    empty_row,
    preview_rows,
    row_spec,
)
from jaxherd.data.pipeline import GrainBatches, batch_lanes, batch_rows, check_sharding
from jaxherd.data.tokenizer_config import (
    Bytes,
    TokenizerFile,
    TrainedBpe,
    given_tokenizer,
    padding_id,
)
from jaxherd.data.tokenizers import Tokenizer, train_bpe
from jaxherd.data.tokens import TokenStore, cached_tokens

PACKINGS = ("concat", "first_fit", "best_fit")


@dataclasses.dataclass(frozen=True)
class PackedText:
    """Documents packed to rows; fields and meaning of a row are those of `data/packing.py`.

    Attributes:
        corpus: a name or source that `load_corpus` takes, or a weighted mixture of them.  Weights
            are shares of tokens; with `tokenize="stream"`, shares of documents.
        tokenizer: TrainedBpe, TokenizerFile or Bytes.
        sequence_length: T, tokens per row.
        batch_size: rows per training batch over all processes.
        eval_batch_size: rows per evaluation batch; None means batch_size.
        max_eval_batches: stop an evaluation after so many batches; None means all.
        packing: "concat" cuts documents at row edges and pads nothing; "first_fit" and "best_fit"
            cut only documents longer than T and pad.  Evaluation always uses "concat".
        packing_bins: rows that the two fits fill at once.
        shuffle: in a new order every epoch.
        tokenize: "cache" tokenises everything once, before the first step; "stream" tokenises
            training documents on the way, for corpora too large to do first.
        max_eval_documents: evaluate on the first so many held-out documents; None means all.
        heldout_fraction, max_bytes, text_field: as for `load_corpus`; max_bytes holds per corpus.
        add_bos, add_eos: begin and end each document with these tokens, if the tokenizer has them.
        threads, prefetch, workers: as for `batch_rows`; workers is for packing="concat" from the
            cache.
    """

    corpus: str | tuple[MixtureComponent, ...] = "python+shakespeare"
    tokenizer_config: TrainedBpe | TokenizerFile | Bytes = TrainedBpe()
    sequence_length: int = 512
    batch_size: int = 8
    eval_batch_size: int | None = None
    max_eval_batches: int | None = None
    packing: Literal["concat", "first_fit", "best_fit"] = "concat"
    packing_bins: int = 16
    shuffle: bool = True
    tokenize: Literal["cache", "stream"] = "cache"
    max_eval_documents: int | None = None
    heldout_fraction: float = 0.04
    max_bytes: int | None = None
    text_field: str = "text"
    add_bos: bool = True
    add_eos: bool = True
    threads: int = 2
    prefetch: int = 8
    workers: int = 0

    def __post_init__(self):
        if self.sequence_length < 2:
            raise JaxherdError(f"sequence_length={self.sequence_length} must be at least 2.")
        for name in ("batch_size", "eval_batch_size", "max_eval_batches", "max_eval_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise JaxherdError(f"{name}={value} must be at least 1.")
        if self.packing not in PACKINGS:
            raise JaxherdError(f"packing={self.packing!r}: {nearest(self.packing, PACKINGS)}")
        if self.tokenize not in ("cache", "stream"):
            raise JaxherdError(
                f"tokenize={self.tokenize!r}: {nearest(self.tokenize, ('cache', 'stream'))}"
            )
        if self.packing_bins < 1 or self.threads < 1 or self.prefetch < 1 or self.workers < 0:
            raise JaxherdError(
                "packing_bins, threads and prefetch must be at least 1, workers at least 0."
            )
        if not self.corpus:
            raise JaxherdError("The corpus is empty: name one, or give a mixture.")
        if self.workers and self._uses_lanes():
            raise JaxherdError("workers needs packing='concat' and tokenize='cache'.")

    def _uses_lanes(self) -> bool:
        return self.packing != "concat" or self.tokenize == "stream"

    def components(self) -> tuple[MixtureComponent, ...]:
        """Return the mixture; a single corpus is a mixture of one."""
        if isinstance(self.corpus, str):
            return (MixtureComponent(self.corpus),)
        return tuple(self.corpus)

    @property
    def vocab_size(self) -> int | None:
        """Return the (largest) vocabulary size as configured; None for an undeclared file."""
        return self.tokenizer_config.vocab_size

    def batch_spec(self, split: str = "train") -> BatchSpec:
        """Return the global shapes of a batch; does no input or output."""
        size = self.batch_size if split == "train" else self.eval_batch_size or self.batch_size
        return row_spec(size, self.sequence_length)

    def tokenizer(self, *, cache_dir: str | os.PathLike[str] | None = None) -> Tokenizer:
        """Return the tokenizer, training it on first use if so configured.

        Raises JaxherdError if its file is missing or has another vocabulary than declared.
        """
        config = self.tokenizer_config
        if isinstance(config, TrainedBpe):
            limits = [n for n in (config.max_bytes, self.max_bytes) if n is not None]
            corpora = self._corpora("train", min(limits, default=None), cache_dir)
            return self._train(config, corpora, cache_dir)
        return given_tokenizer(config, cache_dir=cache_dir)

    def export(
        self, folder: os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        """Write the tokenizer to a folder, from where a model of this data is used."""
        self.tokenizer(cache_dir=cache_dir).save(folder)

    def build(
        self,
        *,
        split: str,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> GrainBatches:
        """Open the data: endless for "train", exactly one pass for "heldout".

        The last batch of a pass is filled up with rows of weight 0.  The same settings and seed
        give the same global batches on any number of processes.
        """
        if split not in SPLITS:
            raise JaxherdError(f"There is no split {split!r}: {nearest(split, SPLITS)}")
        size = self.batch_spec(split)["tokens"].shape[0]
        check_sharding(size, process_index, process_count)
        place = {"process_index": process_index, "process_count": process_count}
        cache_dir = cache_root(cache_dir)
        tokenizer = self.tokenizer(cache_dir=cache_dir)
        if split == "heldout":
            return self._one_pass(tokenizer, size, place, cache_dir)
        return self._endless(tokenizer, size, seed, place, cache_dir)

    def preview(
        self,
        batch: Mapping[str, np.ndarray],
        *,
        rows: int = 2,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> str:
        """Return the text of a batch's first rows, document by document, for a person to read."""
        return preview_rows(batch, self.tokenizer(cache_dir=cache_dir), rows)

    def token_stores(
        self,
        split: str,
        tokenizer: Tokenizer,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> tuple[list[Corpus], list[TokenStore]]:
        """Return the corpora of a split and the tokens of their documents, one entry each."""
        corpora = self._corpora(split, self.max_bytes, cache_dir)
        return corpora, self._stores(corpora, tokenizer, cache_root(cache_dir))

    def _corpora(
        self, split: str, max_bytes: int | None, cache_dir: str | os.PathLike[str] | None
    ) -> list[Corpus]:
        return [
            load_corpus(
                component.corpus,
                split=split,
                heldout_fraction=self.heldout_fraction,
                max_bytes=max_bytes,
                text_field=self.text_field,
                cache_dir=cache_dir,
            )
            for component in self.components()
        ]

    def _train(
        self,
        config: TrainedBpe,
        corpora: Sequence[Corpus],
        cache_dir: str | os.PathLike[str] | None,
    ) -> Tokenizer:
        texts = (corpus[i].text for corpus in corpora for i in range(len(corpus)))
        return train_bpe(texts, config.vocab_size, cache_dir=cache_dir)

    def _common(self, tokenizer: Tokenizer) -> dict[str, Any]:
        return {"token_bytes": tokenizer.token_bytes(), "pad_id": padding_id(tokenizer)}

    def _fingerprint(self, tokenizer: Tokenizer, corpora: Sequence[Corpus], *more: Any) -> str:
        fields = (
            self.sequence_length,
            self.packing,
            self.packing_bins,
            self.shuffle,
            self.tokenize,
            self.add_bos,
            self.add_eos,
            self.workers,
            [component.weight for component in self.components()],
        )
        parts = [tokenizer.fingerprint(), *(c.fingerprint() for c in corpora), repr(fields)]
        return hashlib.sha256("/".join([*parts, repr(more)]).encode()).hexdigest()[:32]

    def _about(self, tokenizer: Tokenizer, corpora: Sequence[Corpus]) -> dict[str, Any]:
        return {
            "corpora": [
                {"name": c.name, "documents": len(c), "fingerprint": c.fingerprint()}
                for c in corpora
            ],
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "name": tokenizer.fingerprint()},
            "sequence_length": self.sequence_length,
        }

    def _stores(self, corpora, tokenizer, cache_dir):
        options = {"add_bos": self.add_bos, "add_eos": self.add_eos, "cache_dir": cache_dir}
        return [cached_tokens(corpus, tokenizer, **options) for corpus in corpora]

    def _one_pass(self, tokenizer, size, place, cache_dir) -> GrainBatches:
        import grain

        corpora = self._corpora("heldout", self.max_bytes, cache_dir)
        if self.max_eval_documents is not None:
            corpora = [_FirstDocuments(c, self.max_eval_documents) for c in corpora]
        common = self._common(tokenizer)
        stores = self._stores(corpora, tokenizer, cache_dir)
        parts = [
            ConcatRows(store, self.sequence_length, order_seed=0, **common) for store in stores
        ]
        padding = empty_row(self.sequence_length, common["pad_id"])
        rows = OnePass(parts, size, padding=padding, max_batches=self.max_eval_batches)
        options = {"threads": self.threads, "prefetch": self.prefetch}
        dataset = batch_rows(grain.MapDataset.source(rows), batch_size=size, **options, **place)
        about = self._about(tokenizer, corpora)
        about["tokens"] = sum(store.token_count for store in stores)
        about["batches"] = len(rows) // size
        return GrainBatches(
            dataset,
            fingerprint=self._fingerprint(tokenizer, corpora, "heldout", size, len(rows)),
            portable=True,
            about=about,
            length=len(rows) // size,
            **place,
        )

    def _endless(self, tokenizer, size, seed, place, cache_dir) -> GrainBatches:
        corpora = self._corpora("train", self.max_bytes, cache_dir)
        common = self._common(tokenizer)
        about = self._about(tokenizer, corpora)
        weights = [component.weight for component in self.components()]
        seeds = [_seed(seed, n) for n in range(len(corpora))]
        stores = []
        if self.tokenize == "cache":
            stores = self._stores(corpora, tokenizer, cache_dir)
            about["tokens"] = sum(store.token_count for store in stores)
        if not self._uses_lanes():
            sources = [
                ConcatRows(
                    store,
                    self.sequence_length,
                    order_seed=one if self.shuffle else None,
                    **common,
                )
                for store, one in zip(stores, seeds)
            ]
            about["rows_per_epoch"] = sum(len(source) for source in sources)
            streams = [endless(s, seed=n, shuffle=self.shuffle) for s, n in zip(sources, seeds)]
            dataset = batch_rows(
                mix(streams, weights),
                batch_size=size,
                threads=self.threads,
                prefetch=self.prefetch,
                workers=self.workers,
                **place,
            )
        else:
            cut = None
            if stores:
                sources = [Stretches(store, self.sequence_length, **common) for store in stores]
                weights = [
                    weight / mean_length(source, store.token_count)
                    for weight, source, store in zip(weights, sources, stores)
                ]
            else:
                sources, cut = streaming(
                    corpora,
                    tokenizer=tokenizer,
                    sequence_length=self.sequence_length,
                    add_bos=self.add_bos,
                    add_eos=self.add_eos,
                    **common,
                )
            lane = packed_lanes(
                sources,
                weights,
                seeds,
                batch_size=size,
                sequence_length=self.sequence_length,
                packing=self.packing,
                bins=self.packing_bins,
                shuffle=self.shuffle,
                pad_id=common["pad_id"],
                to_stretches=cut,
            )
            dataset = batch_lanes(lane, batch_size=size, prefetch=self.prefetch, **place)
        return GrainBatches(
            dataset,
            fingerprint=self._fingerprint(tokenizer, corpora, "train", size, seed),
            portable=not self._uses_lanes() and not self.workers,
            about=about,
            **place,
        )


class _FirstDocuments:
    """The first documents of a corpus."""

    def __init__(self, corpus: Corpus, count: int):
        self.name = corpus.name
        self._corpus = corpus
        self._count = min(count, len(corpus))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int):
        return self._corpus[index]

    def fingerprint(self) -> str:
        return f"{self._corpus.fingerprint()}[:{self._count}]"


def _seed(seed: int, part: int) -> int:
    """Return a seed for one corpus of a mixture, within the range that Grain takes."""
    digest = hashlib.sha256(f"data/{seed}/{part}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31
