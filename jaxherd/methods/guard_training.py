"""Training a guard's classifier, and the threshold that goes with it.

The threshold is the lowest that lets at most a given share of harmless texts be vetoed, on texts that
the classifier has not seen; recall, false positives and AUC are then told of yet others.  Recall at a
false-positive rate of 1 % is the figure that Meta gives for PromptGuard 2 (llama4.md 11).
"""

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import StageContext
from jaxherd.data.labelled_text import LabelledText
from jaxherd.inference.guards.classifier import ClassifierGuard
from jaxherd.methods.intervals import wilson
from jaxherd.training.metrics import Metrics, pair
from jaxherd.weights.trained import load_trained

# Meta's own figures for PromptGuard 2, to be printed beside those of a guard trained here.
PROMPT_GUARD_2 = (
    ("PromptGuard 2 86M", {"auc": 0.998, "recall": 0.975, "false_positive_rate": 0.01}),
    ("PromptGuard 2 22M", {"auc": 0.995, "recall": 0.887, "false_positive_rate": 0.01}),
)
PROMPT_GUARD_SOURCE = "LlamaFirewall, arXiv 2505.03574, by a summary of perea.ai; English"


@dataclasses.dataclass(frozen=True)
class MultiLabel:
    """Binary cross-entropy of every class, the mean over classes and texts.

    Batch fields: ngrams [B, N], labels [B, C] and loss_weights [B] (`jaxherd.data.labelled_text`).

    Attributes:
      smoothing: labels are moved by so much towards one half.
    """

    smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.smoothing < 0.5:
            raise JaxherdError(f"smoothing={self.smoothing} must lie from 0 to below 0.5.")

    def __call__(
        self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array, *, frozen: Any = None
    ) -> tuple[jax.Array, Metrics]:
        """Return the mean loss, and the share of labels that are right at one half."""
        logits_BC, labels_BC = model(batch["ngrams"]), batch["labels"]
        weights_B = batch["loss_weights"]
        wanted = labels_BC * (1 - 2 * self.smoothing) + self.smoothing
        loss_B = optax.sigmoid_binary_cross_entropy(logits_BC, wanted).mean(axis=-1)
        right_B = ((logits_BC > 0) == (labels_BC > 0.5)).mean(axis=-1, dtype=jnp.float32)
        weight = weights_B.sum()
        loss = (loss_B * weights_B).sum() / jnp.maximum(weight, 1.0)
        return loss, {
            "loss": pair(loss * weight, weight),
            "accuracy": pair((right_B * weights_B).sum(), weight),
        }


def threshold_at(harmless: Float[np.ndarray, " N"], false_positive_rate: float) -> float:
    """Return the lowest threshold at or above which at most this share of the scores lies.

    Args:
      harmless: scores of texts that should pass, from 0 to 1.
      false_positive_rate: above 0 and below 1.
    Raises:
      JaxherdError: too few scores for such a rate (one false positive would be more than it), or too
        many that are 1.
    """
    if not 0 < false_positive_rate < 1:
        raise JaxherdError(f"a false-positive rate of {false_positive_rate} is none.")
    least = math.ceil(1 / false_positive_rate)
    if len(harmless) < least:
        raise JaxherdError(
            f"{len(harmless)} harmless texts cannot tell a false-positive rate of "
            f"{false_positive_rate:g}: give at least {least}."
        )
    allowed = math.floor(false_positive_rate * len(harmless))
    ranked = np.sort(np.asarray(harmless, np.float64))[::-1]
    if ranked[allowed] >= 1:
        raise JaxherdError(
            f"more than {false_positive_rate:g} of the harmless texts have the score 1, so that no "
            "threshold lets them pass: train the guard for longer, or on more like them."
        )
    # Just above the first score that must pass; equal scores pass or fall together.
    return float(np.nextafter(ranked[allowed], 2.0))


def area_under_curve(harmful: Sequence[float], harmless: Sequence[float]) -> float:
    """Return the chance that a harmful text scores above a harmless one; ties count half."""
    above, below = np.asarray(harmful, np.float64), np.sort(np.asarray(harmless, np.float64))
    less = np.searchsorted(below, above, side="left")
    equal = np.searchsorted(below, above, side="right") - less
    return float((less + 0.5 * equal).mean() / len(below))


def measured(
    guard: ClassifierGuard, texts: Sequence[LabelledText], scores: Float[np.ndarray, " N"]
) -> dict[str, Any]:
    """Return recall, false-positive rate (with 95 % Wilson intervals) and AUC at the guard's threshold."""
    harmful = np.array([bool(text.labels) for text in texts])
    # Wide: a threshold just above a score is that score in float32.
    vetoed = scores.astype(np.float64) >= guard.threshold
    hits, alarms = int(vetoed[harmful].sum()), int(vetoed[~harmful].sum())
    return {
        "harmful": int(harmful.sum()),
        "harmless": int((~harmful).sum()),
        "recall": hits / max(1, int(harmful.sum())),
        "recall_interval": list(wilson(hits, int(harmful.sum()))),
        "false_positive_rate": alarms / max(1, int((~harmful).sum())),
        "false_positive_interval": list(wilson(alarms, int((~harmful).sum()))),
        "auc": area_under_curve(scores[harmful].tolist(), scores[~harmful].tolist()),
    }


@dataclasses.dataclass(frozen=True)
class CalibrateGuard:
    """A stage that writes `guard/`, a folder for `--guard`: classifier, threshold, what they reach.

    The held-out texts are parted in two by their own hash: one half gives the threshold, the other
    the figures.

    Attributes:
      name: of the stage.
      classifier: the earlier stage that trained it.
      source: of the texts; its "heldout" split is used.
      false_positive_rate: that the threshold allows.
    """

    name: str
    classifier: str
    source: Any
    false_positive_rate: float = 0.01

    @property
    def reads(self) -> tuple[str, ...]:
        """The classifier's stage."""
        return (self.classifier,)

    def check(self, devices: Any, compiler_options: Mapping[str, Any] | None = None) -> None:
        """Raise JaxherdError on several processes."""
        if jax.process_count() > 1:
            raise JaxherdError(f"{self.name}: a guard is calibrated by one process.")

    def run(self, context: StageContext) -> Mapping[str, Any]:
        """Calibrate, measure and write."""
        module = load_trained(context.artifacts[self.classifier])
        texts = list(self.source.texts("heldout"))
        scored = ClassifierGuard(module, 1.0)
        scores = scored.scores([text.text for text in texts]).max(axis=1)
        first = np.array([_first_half(text.text) for text in texts], bool)
        harmless = np.array([not text.labels for text in texts])
        threshold = threshold_at(scores[first & harmless], self.false_positive_rate)
        guard = ClassifierGuard(module, threshold, name=self.name)
        rest = [text for text, one in zip(texts, first) if not one]
        if not any(text.labels for text in rest) or all(text.labels for text in rest):
            raise JaxherdError(f"{self.name}: the held-out texts need harmful and harmless ones.")
        figures = measured(guard, rest, scores[~first])
        guard.calibration = {
            "allowed_false_positive_rate": self.false_positive_rate,
            "calibrated_on": int((first & harmless).sum()),
            **figures,
        }
        folder = context.folder / "guard"
        # Left over from a run that was killed before this stage was done.
        shutil.rmtree(folder, ignore_errors=True)
        guard.save(folder)
        context.say(
            f"{self.name}: recall {figures['recall']:.3f} at a false-positive rate of "
            f"{figures['false_positive_rate']:.4f} (allowed {self.false_positive_rate:g}), AUC "
            f"{figures['auc']:.4f}; use it with --guard {folder}"
        )
        for name, told in PROMPT_GUARD_2:
            context.say(
                f"published, on other texts: {name} recall {told['recall']:g} at "
                f"{told['false_positive_rate']:g}, AUC {told['auc']:g} ({PROMPT_GUARD_SOURCE})"
            )
        return {
            key: value for key, value in guard.calibration.items() if not isinstance(value, list)
        } | {"threshold": threshold}


def _first_half(text: str) -> bool:
    return hashlib.sha256(f"calibration/{text}".encode()).digest()[0] < 128
