"""Texts with the classes that they belong to, as batches of n-grams.

Fields of a batch: ngrams [B, N] int32 (-1 after the last), labels [B, C] float32 of 0 and 1, and
loss_weights [B] float32, 0 for rows that only fill the last batch.  A text longer than a window gives a
row for each of its windows.

A file has a line for each text: {"text": ..., "labels": ["S7", ...]}; no label means harmless.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxherd.core.batch import BatchField, BatchSpec
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.corpus import SPLITS
from jaxherd.data.examples import is_heldout_prompt, json_lines
from jaxherd.data.mixture import endless
from jaxherd.data.ngrams import NgramConfig
from jaxherd.data.packing import OnePass
from jaxherd.data.pipeline import GrainBatches, batch_rows, check_sharding
from jaxherd.data.sources import beside, resolve


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """A text and its classes; none of them means harmless."""

    text: str
    labels: tuple[str, ...] = ()


@runtime_checkable
class LabelledSource(Protocol):
    """Where texts come from: a frozen dataclass."""

    def texts(self, split: str) -> Sequence[LabelledText]:
        """Return the texts of "train" or "heldout", the same at every call."""
        ...


@dataclasses.dataclass(frozen=True)
class LabelledFile:
    """A JSON Lines file in the form above.

    Attributes:
      path: any source that `resolve` takes.
      heldout_fraction: the expected share of texts held out, decided by each text alone.
    """

    path: str
    heldout_fraction: float = 0.2

    def provenance_folders(self) -> list[pathlib.Path]:
        """Return the folder of the file: texts of a model have that model's origin."""
        return beside(self.path)

    def texts(self, split: str) -> list[LabelledText]:
        """Read one split; raises JaxherdError naming the first line that is wrong."""
        path = pathlib.Path(resolve(self.path))
        found = []
        for number, entry in json_lines(path):
            text, labels = entry.get("text"), entry.get("labels", [])
            good = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
            if not isinstance(text, str) or not good:
                raise JaxherdError(
                    f"Line {number} of {str(path)!r} has no text, or labels that are no list of "
                    "names."
                )
            if is_heldout_prompt(text, self.heldout_fraction) == (split == "heldout"):
                found.append(LabelledText(text, tuple(labels)))
        return found


@dataclasses.dataclass(frozen=True)
class LabelledBatches:
    """The data of a classifier's training.

    Attributes:
      source: see `LabelledSource`.
      labels: C, in the classifier's order.
      ngrams: the classifier's.
      batch_size: B, over all processes.
    """

    source: Any
    labels: tuple[str, ...]
    ngrams: NgramConfig = NgramConfig()
    batch_size: int = 64

    def batch_spec(self, split: str = "train") -> BatchSpec:
        """Return the global shapes of a batch; does no input or output."""
        size = self.batch_size
        return {
            "ngrams": BatchField((size, self.ngrams.length), "int32", ("batch", None)),
            "labels": BatchField((size, len(self.labels)), "float32", ("batch", None)),
            "loss_weights": BatchField((size,), "float32", ("batch",)),
        }

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

        Raises:
          JaxherdError: no such split, no texts in it, or a label that is not among `labels`.
        """
        import grain

        if split not in SPLITS:
            raise JaxherdError(f"There is no split {split!r}: {nearest(split, SPLITS)}")
        check_sharding(self.batch_size, process_index, process_count)
        texts = list(self.source.texts(split))
        if not texts:
            raise JaxherdError(f"the {split!r} split of {self.source!r} has no texts.")
        rows = [row for text in texts for row in self._rows(text)]
        digest = hashlib.sha256(repr((self, split, seed if split == "train" else 0)).encode())
        for text in texts:
            digest.update(repr(text).encode())
        length = None
        if split == "train":
            dataset = endless(rows, seed=seed, shuffle=True)
        else:
            once = OnePass([rows], self.batch_size, padding=self._padding())
            dataset, length = grain.MapDataset.source(once), len(once) // self.batch_size
        place = {"process_index": process_index, "process_count": process_count}
        return GrainBatches(
            batch_rows(dataset, batch_size=self.batch_size, threads=1, **place),
            fingerprint=digest.hexdigest()[:32],
            portable=True,
            length=length,
            about={"texts": len(texts), "rows": len(rows)},
            **place,
        )

    def _rows(self, text: LabelledText) -> list[dict[str, np.ndarray]]:
        for label in text.labels:
            if label not in self.labels:
                raise JaxherdError(f"a text has the label {label!r}: {nearest(label, self.labels)}")
        labels = np.array([label in text.labels for label in self.labels], np.float32)
        windows = self.ngrams.windows(text.text)
        return [
            {"ngrams": numbers, "labels": labels, "loss_weights": np.array(1, np.float32)}
            for numbers in self.ngrams.numbers(windows)
        ]

    def _padding(self) -> dict[str, np.ndarray]:
        return {
            "ngrams": np.full(self.ngrams.length, -1, np.int32),
            "labels": np.zeros(len(self.labels), np.float32),
            "loss_weights": np.array(0, np.float32),
        }
