"""Rows for fine-tuning and for preferences: prompts with answers, of which the answers count.

Fields and meaning of a row are those of `data/packing.py`; loss_weights is 1 on the answer's tokens
and the token that ends it.  Sources are frozen dataclasses with `examples(split)`
(`jaxherd.data.examples`).  All examples are tokenised at the start and kept in memory; those longer
than a row are left out, and a run says how many.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxherd.core.batch import BatchSpec
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.corpus import SPLITS
from jaxherd.data.examples import (
    Example,
    examples_digest,
    hardest_examples,
    source_folder,
)
from jaxherd.data.lanes import packed_lanes
from jaxherd.data.mixture import endless
from jaxherd.data.packing import (
    OnePass,
    Row,
    answer_stretch,
    empty_row,
    join_stretches,
    preview_rows,
    row_spec,
)
from jaxherd.data.pipeline import GrainBatches, batch_lanes, batch_rows, check_sharding, stack_rows
from jaxherd.data.prompt_format import PromptFormat
from jaxherd.data.tokenizer_config import Bytes, TokenizerFile, given_tokenizer, padding_id
from jaxherd.data.tokenizers import Tokenizer

PACKINGS = ("none", "first_fit", "best_fit")


@dataclasses.dataclass(frozen=True)
class _Answered:
    """What both kinds of rows have; see `AnswerRows`."""

    source: Any
    tokenizer_config: TokenizerFile | Bytes = Bytes()
    prompt_format: PromptFormat = PromptFormat()
    sequence_length: int = 512
    batch_size: int = 8
    eval_batch_size: int | None = None
    max_eval_batches: int | None = None
    shuffle: bool = True
    threads: int = 1
    prefetch: int = 8

    def __post_init__(self):
        if self.sequence_length < 2:
            raise JaxherdError(f"sequence_length={self.sequence_length} must be at least 2.")
        for name in ("batch_size", "eval_batch_size", "max_eval_batches", "threads", "prefetch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise JaxherdError(f"{name}={value} must be at least 1.")

    @property
    def vocab_size(self) -> int | None:
        """Return the vocabulary size as configured; None for an undeclared file."""
        return self.tokenizer_config.vocab_size

    @property
    def needs_artifacts(self) -> bool:
        """Whether the examples are an artifact of an earlier stage."""
        return getattr(self.source, "stage", None) is not None

    def tokenizer(self, *, cache_dir: str | os.PathLike[str] | None = None) -> Tokenizer:
        """Return the tokenizer.

        Raises JaxherdError if its file is missing or has another vocabulary than declared.
        """
        return given_tokenizer(self.tokenizer_config, cache_dir=cache_dir)

    def export(
        self, folder: os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        """Write the tokenizer to a folder, from where a model of this data is used."""
        self.tokenizer(cache_dir=cache_dir).save(folder)

    def preview(
        self,
        batch: Mapping[str, np.ndarray],
        *,
        rows: int = 2,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> str:
        """Return the text of a batch's first rows, the learned part between ⟦ and ⟧."""
        return preview_rows(batch, self.tokenizer(cache_dir=cache_dir), rows, show_learned=True)

    def _size(self, split: str) -> int:
        return self.batch_size if split == "train" else self.eval_batch_size or self.batch_size

    def _examples(self, split: str, artifacts: Mapping[str, Any] | None) -> list[Example]:
        if split not in SPLITS:
            raise JaxherdError(f"There is no split {split!r}: {nearest(split, SPLITS)}")
        found = list(self.source.examples(split, source_folder(self.source, artifacts)))
        if not found:
            raise JaxherdError(f"The {split!r} split of {_named(self.source)} has no examples.")
        return found

    def _fitting(
        self, stretches: Sequence[Sequence[Row]]
    ) -> tuple[list[Sequence[Row]], dict[str, Any]]:
        """Return the examples that fit into rows, and what a log should say."""
        longest = self.sequence_length
        kept = [parts for parts in stretches if max(len(p["tokens"]) for p in parts) <= longest]
        about: dict[str, Any] = {"examples": len(kept), "too_long": len(stretches) - len(kept)}
        if not kept:
            raise JaxherdError(
                f"No example of {_named(self.source)} fits into {longest} tokens: raise "
                "sequence_length."
            )
        if about["too_long"]:
            about["notes"] = [
                f"{about['too_long']} of {len(stretches)} examples have more than {longest} tokens "
                "and are left out: sequence_length says how long they may be."
            ]
        return kept, about

    def _batches(
        self,
        rows: Sequence[Row],
        padding: Row,
        size: int,
        split: str,
        seed: int,
        options: Mapping[str, Any],
        finish: Callable[[Row], Row] | None = None,
    ) -> GrainBatches:
        """Return batches of `size` elements, endless or one pass; `finish` maps each batch."""
        import grain

        length = None
        if split == "train":
            source = endless(rows, seed=seed, shuffle=self.shuffle)
        else:
            once = OnePass([rows], size, padding=padding, max_batches=self.max_eval_batches)
            source, length = grain.MapDataset.source(once), len(once) // size
        dataset = batch_rows(
            source,
            batch_size=size,
            process_index=options["process_index"],
            process_count=options["process_count"],
            threads=self.threads,
            prefetch=self.prefetch,
        )
        dataset = dataset if finish is None else dataset.map(finish)
        return GrainBatches(dataset, portable=True, length=length, **options)

    def _fingerprint(self, tokenizer: Tokenizer, examples: Sequence[Example], *more: Any) -> str:
        parts = (examples_digest(examples), tokenizer.fingerprint(), repr(self), repr(more))
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class AnswerRows(_Answered):
    """Rows for supervised fine-tuning.

    Attributes:
      source: has `examples(split, folder)`; see `jaxherd.data.examples`.
      tokenizer_config: TokenizerFile or Bytes: what the model was trained with.
      prompt_format: plain text or the tokenizer's chat template.
      sequence_length: T.
      batch_size, eval_batch_size: rows over all processes; None means batch_size.
      max_eval_batches: stop an evaluation after so many batches; None means all.
      shuffle: in a new order every epoch.
      threads, prefetch: as for `batch_rows`.
      keep_hardest: share of the training examples to keep, by their difficulty (`keep_hardest` in
        `jaxherd.data.examples`).  Disclosed of Llama 4: judges found more than half of the data
        easy, and it was removed (0.5 or less here); 95 % of Behemoth's (0.05).  How difficulty was
        judged is not disclosed.  The held-out examples are not filtered.
      packing: "none", one example a row; "first_fit" and "best_fit", several side by side.
      packing_bins: rows that are filled at once.
      learn_prompts: let prompts count as well, as in pre-training on transcripts.
    """

    keep_hardest: float = 1.0
    packing: Literal["none", "first_fit", "best_fit"] = "first_fit"
    packing_bins: int = 16
    learn_prompts: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.packing not in PACKINGS:
            raise JaxherdError(f"packing={self.packing!r}: {nearest(self.packing, PACKINGS)}")
        if self.packing_bins < 1 or not 0 < self.keep_hardest <= 1:
            raise JaxherdError(
                f"packing_bins={self.packing_bins} must be at least 1 and keep_hardest="
                f"{self.keep_hardest} above 0 and at most 1."
            )

    def batch_spec(self, split: str = "train") -> BatchSpec:
        """Return the global shapes of a batch; does no input or output."""
        return row_spec(self._size(split), self.sequence_length)

    def build(
        self,
        *,
        split: str,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        artifacts: Mapping[str, Any] | None = None,
    ) -> GrainBatches:
        """Open the data: endless for "train", exactly one pass for "heldout".

        Raises:
          JaxherdError: a bad line, an unjudged example where the hardest are to be kept, no example
            that fits, or no tokenizer.
        """
        size = self._size(split)
        check_sharding(size, process_index, process_count)
        tokenizer = self.tokenizer(cache_dir=cache_dir)
        examples = self._examples(split, artifacts)
        given, pad_id = len(examples), padding_id(tokenizer)
        if split == "train":
            examples = hardest_examples(examples, self.keep_hardest)
        stretches, about = self._stretches(tokenizer, examples, pad_id)
        options = {
            "fingerprint": self._fingerprint(tokenizer, examples, split, seed),
            "about": {**about, "filtered_out": given - len(examples)},
            "process_index": process_index,
            "process_count": process_count,
        }
        if split == "train" and self.packing != "none":
            return self._in_lanes(stretches, pad_id, seed, options)
        return self._in_rows(stretches, pad_id, split, seed, options)

    def _stretches(
        self, tokenizer: Tokenizer, examples: Sequence[Example], pad_id: int
    ) -> tuple[list[Row], dict[str, Any]]:
        token_bytes = tokenizer.token_bytes()
        made = [
            answer_stretch(
                self.prompt_format.prompt_ids(tokenizer, e.prompt),
                self.prompt_format.answer_ids(tokenizer, e.prompt, e.answer),
                token_bytes,
                pad_id,
                learn_prompt=self.learn_prompts,
            )
            for e in examples
        ]
        kept, about = self._fitting([[one] for one in made])
        return [one for (one,) in kept], about

    def _in_lanes(self, stretches, pad_id, seed, options) -> GrainBatches:
        lane = packed_lanes(
            [stretches],
            [1.0],
            [seed],
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            packing=self.packing,
            bins=self.packing_bins,
            shuffle=self.shuffle,
            pad_id=pad_id,
        )
        place = {name: options[name] for name in ("process_index", "process_count")}
        dataset = batch_lanes(lane, batch_size=self.batch_size, prefetch=self.prefetch, **place)
        return GrainBatches(dataset, **options)

    def _in_rows(self, stretches, pad_id, split, seed, options) -> GrainBatches:
        groups = [[place] for place in range(len(stretches))]
        if self.packing != "none":
            groups = next_fit([len(s["tokens"]) for s in stretches], self.sequence_length)
        rows = _JoinedRows(stretches, groups, self.sequence_length, pad_id)
        padding = empty_row(self.sequence_length, pad_id)
        return self._batches(rows, padding, self._size(split), split, seed, options)


@dataclasses.dataclass(frozen=True)
class PreferencePairs(_Answered):
    """Rows for `jaxherd.methods.preference_optimization`: a pair in two rows, the better first.

    Attributes: as of `AnswerRows`; a batch has batch_size rows, half as many pairs.  A pair of
    which one answer does not fit is left out.
    """

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "eval_batch_size"):
            if (getattr(self, name) or 2) % 2:
                raise JaxherdError(
                    f"{name}={getattr(self, name)} must be even: a pair has two rows."
                )

    def batch_spec(self, split: str = "train") -> BatchSpec:
        """Return the global shapes of a batch; does no input or output."""
        return row_spec(self._size(split), self.sequence_length)

    def build(
        self,
        *,
        split: str,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        artifacts: Mapping[str, Any] | None = None,
    ) -> GrainBatches:
        """Open the data: endless for "train", exactly one pass for "heldout".

        Raises:
          JaxherdError: a bad line, an example without a rejected answer, no pair that fits, no
            tokenizer, or pairs that do not divide over the processes.
        """
        pairs = self._size(split) // 2
        check_sharding(pairs, process_index, process_count)
        tokenizer = self.tokenizer(cache_dir=cache_dir)
        examples = self._examples(split, artifacts)
        pad_id, token_bytes = padding_id(tokenizer), tokenizer.token_bytes()
        stretches = []
        for number, e in enumerate(examples, 1):
            if e.rejected is None:
                raise JaxherdError(f"{e.where or f'Example {number}'} has no rejected answer.")
            prompt = self.prompt_format.prompt_ids(tokenizer, e.prompt)
            answers = (
                self.prompt_format.answer_ids(tokenizer, e.prompt, answer)
                for answer in (e.answer, e.rejected)
            )
            stretches.append([answer_stretch(prompt, a, token_bytes, pad_id) for a in answers])
        kept, about = self._fitting(stretches)
        options = {
            "fingerprint": self._fingerprint(tokenizer, examples, split, seed),
            "about": about,
            "process_index": process_index,
            "process_count": process_count,
        }
        rows = _PairRows(kept, self.sequence_length, pad_id)
        padding = stack_rows([empty_row(self.sequence_length, pad_id)] * 2)
        return self._batches(rows, padding, pairs, split, seed, options, _in_rows)


class _JoinedRows(Sequence[Row]):
    """Row i holds the stretches of group i side by side."""

    def __init__(
        self,
        stretches: Sequence[Row],
        groups: Sequence[Sequence[int]],
        sequence_length: int,
        pad_id: int,
    ):
        self._stretches, self._groups = stretches, groups
        self._length, self._pad_id = sequence_length, pad_id

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index):
        parts = [self._stretches[place] for place in self._groups[index]]
        return join_stretches(parts, self._length, self._pad_id)


class _PairRows(Sequence[Row]):
    """Element i holds both rows of pair i, [2, T] each field."""

    def __init__(self, pairs: Sequence[Sequence[Row]], sequence_length: int, pad_id: int):
        self._pairs, self._length, self._pad_id = pairs, sequence_length, pad_id

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index):
        return stack_rows(
            [join_stretches([one], self._length, self._pad_id) for one in self._pairs[index]]
        )


def _in_rows(batch: Mapping[str, np.ndarray]) -> Row:
    """Lay pairs [P, 2, T] out as rows [2 P, T]."""
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}


def next_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the places of successive lengths that go into one row, none of them split."""
    groups: list[list[int]] = []
    used = capacity
    for place, length in enumerate(lengths):
        if used + length > capacity:
            groups.append([])
            used = 0
        groups[-1].append(place)
        used += length
    return groups


def _named(source: Any) -> str:
    return repr(getattr(source, "path", None) or type(source).__name__)
