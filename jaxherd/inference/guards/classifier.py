"""A guard that is a small trained classifier of character n-grams.

A text is judged window by window and by its worst one.  The folder is a checkpoint of ours
(`jaxherd.models.ngram_classifier`) with a `guard.json` that holds the threshold and how it was found.

Axis letters: W windows, C classes.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError
from jaxherd.inference.guards.guard import Conversation, Verdict, texts_of
from jaxherd.inference.requests import bucket
from jaxherd.models.ngram_classifier import NgramClassifier
from jaxherd.weights import registry
from jaxherd.weights.load import load
from jaxherd.weights.save import save

FILE, FORMAT = "guard.json", 1
# Windows that are scored together at most, and characters of one text.
_ROWS, _MOST = 64, 200_000


@jax.jit
def _scores(module: Any, ngrams: Any) -> jax.Array:
    return jax.nn.sigmoid(module(ngrams))


class ClassifierGuard:
    """Vetoes a text one of whose windows has a class at or above the threshold."""

    def __init__(
        self,
        module: NgramClassifier,
        threshold: float,
        *,
        name: str = "classifier",
        calibration: Mapping[str, Any] | None = None,
    ):
        """Take a trained classifier.

        Args:
          module: the classifier.
          threshold: of the highest score of a text, above 0 and up to 1.
          name: in verdicts.
          calibration: how the threshold was found, for the record.
        Raises:
          JaxherdError: a threshold outside of its range.
        """
        if not 0 < threshold <= 1:
            raise JaxherdError(f"{name}: threshold={threshold} must be above 0 and up to 1.")
        self.module, self.threshold, self.name = module, float(threshold), name
        self.calibration = dict(calibration or {})
        self.labels: tuple[str, ...] = module.config.labels
        # A window that holds the last character that was shown is full, and was judged.
        self.reach = module.config.ngrams.window

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ClassifierGuard":
        """Return the guard of a folder.

        Raises:
          JaxherdError: it holds no classifier, or no threshold.
        """
        path = pathlib.Path(folder)
        entries = registry.read_json(path / FILE)
        if entries.get("format") != FORMAT:
            raise JaxherdError(
                f"{str(path / FILE)!r} has format {entries.get('format')!r}; this jaxherd reads {FORMAT}."
            )
        module = load(path)
        if not isinstance(module, NgramClassifier):
            raise JaxherdError(f"{str(path)!r} holds a {type(module).__name__} and no classifier.")
        name, calibration = entries.get("name", path.name), entries.get("calibration", {})
        threshold: Any = entries.get("threshold")
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not isinstance(name, str) or not isinstance(calibration, Mapping):
            raise JaxherdError(
                f"{str(path / FILE)!r}: threshold must be a number, name a text, calibration an object."
            )
        return cls(module, float(threshold), name=name, calibration=calibration)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the guard to a new folder, whole or not at all; errors as of `jaxherd.save`."""
        entries = {
            "format": FORMAT,
            "name": self.name,
            "threshold": self.threshold,
            "calibration": self.calibration,
        }
        save(self.module, folder, texts={FILE: json.dumps(entries, indent=2) + "\n"})

    def window_scores(self, windows: Sequence[str]) -> Float[np.ndarray, "W C"]:
        """Return the probability of every class for folded windows of text."""
        ngrams = self.module.config.ngrams
        found = [np.zeros((0, len(self.labels)), np.float32)]
        for begin in range(0, len(windows), _ROWS):
            some = list(windows[begin : begin + _ROWS])
            # A few sizes, so that few programs are compiled.
            padded = some + [""] * (bucket(len(some), 1) - len(some))
            found.append(np.asarray(_scores(self.module, ngrams.numbers(padded)))[: len(some)])
        return np.concatenate(found)

    def scores(self, texts: Sequence[str]) -> Float[np.ndarray, "W C"]:
        """Return the highest score of every class in each text."""
        cut = [self.module.config.ngrams.windows(text) for text in texts]
        rows = self.window_scores([window for windows in cut for window in windows])
        ends = np.cumsum([len(windows) for windows in cut])
        return np.stack([rows[end - len(w) : end].max(axis=0) for w, end in zip(cut, ends)])

    def pre(self, conversation: Conversation) -> Verdict:
        """Judge every message of a prompt."""
        return self._judge(texts_of(conversation), True)

    def post(self, conversation: Conversation, answer: str, *, complete: bool = True) -> Verdict:
        """Judge an answer; the prompt plays no part."""
        return self._judge([answer], complete)

    def _judge(self, texts: Sequence[str], complete: bool) -> Verdict:
        windows: list[str] = []
        for text in texts:
            if len(text) > _MOST:
                reason = f"{len(text)} characters, of which {_MOST} are read"
                return Verdict(True, {"unread": 1.0}, self.name, (reason,))
            windows += self.module.config.ngrams.windows(text, complete=complete)
        rows = self.window_scores(windows)
        if not len(rows):
            return Verdict(False, {}, self.name)
        worst = rows.max(axis=0)
        scores = {label: float(score) for label, score in zip(self.labels, worst)}
        found = tuple(label for label in self.labels if scores[label] >= self.threshold)
        return Verdict(bool(found), scores, self.name, found)
