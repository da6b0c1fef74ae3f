"""What a model makes of sequences longer than those it was trained on.

Two questions, both about held-out text:

* Loss by position: -log p of each token of long documents, in buckets of one trained length, beside
  the same tokens read in windows of the trained length.  Same tokens, same model: a positive
  difference is harm done by the length alone, whatever the text.
* Retrieval: how often the value of a key planted in the text is the most probable token, by the
  length of the row and the depth of the key.

Axis letters: B batch, T tokens, W tokens of a window.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from jaxherd.core.experiment import write_json
from jaxherd.data.retrieval import RetrievalText, replace_length
from jaxherd.training.losses import token_nll

FILE = "long_context.json"


@jax.jit
def score_tokens(
    model: Any, batch: Mapping[str, Array]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return -log p of every target and whether it is the most probable token.

    Args:
      model: with `forward` and `unembed`, such as `jaxherd.models.decoder.Decoder`.
      batch: tokens, targets, positions and segment_ids as in `jaxherd.data.packing`.
    """
    output = model.forward(
        batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    logits = model.unembed(output.hidden_BTD)
    nll, _ = token_nll(logits, batch["targets"])
    return nll, logits.argmax(axis=-1) == batch["targets"]


def windows(batch: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Return a batch whose rows are cut into windows of `size`, each a document of its own."""
    cut = {name: rearrange(x, "B (N W) -> (B N) W", W=size) for name, x in batch.items()}
    cut["positions"] = np.broadcast_to(np.arange(size, dtype=np.int32), cut["tokens"].shape)
    return cut


def loss_by_position(model: Any, data: RetrievalText, bucket: int) -> dict[str, np.ndarray]:
    """Return mean nats a token by position bucket: "whole" rows, and the same tokens in "windows".

    Args:
      model: see `score_tokens`.
      data: rows without pairs; its held-out split is read once.
      bucket: size of buckets and windows; divides the rows' length.
    """
    totals = {"whole": 0.0, "windows": 0.0}
    count = 0
    rows = data.build(split="heldout", seed=0)
    for batch in rows:
        length = batch["tokens"].shape[1]
        whole, _ = score_tokens(model, batch)
        apart, _ = score_tokens(model, windows(batch, bucket))
        apart = rearrange(np.asarray(apart), "(B N) W -> B (N W)", N=length // bucket)
        for name, nll in (("whole", whole), ("windows", apart)):
            values = np.asarray(nll, np.float64)
            totals[name] += rearrange(values, "B (N W) -> N (B W)", W=bucket).sum(axis=1)
        count += batch["tokens"].shape[0] * bucket
    rows.close()
    return {name: np.asarray(total) / count for name, total in totals.items()}


def retrieval_accuracy(model: Any, data: RetrievalText, depths: int) -> tuple[float, np.ndarray]:
    """Return the share of asked values that are predicted, over all and by depth of the key.

    Args:
      model: see `score_tokens`.
      data: rows with pairs; its held-out split is read once.
      depths: equal parts of the row by which the key's first place is counted; NaN where no key
        fell into a part.
    """
    right, asked = np.zeros(depths), np.zeros(depths)
    rows = data.build(split="heldout", seed=0)
    for batch in rows:
        _, hits = score_tokens(model, batch)
        row, place, planted = data.answers(batch).T
        part = planted * depths // batch["tokens"].shape[1]
        np.add.at(right, part, np.asarray(hits)[row, place])
        np.add.at(asked, part, 1)
    rows.close()
    with np.errstate(invalid="ignore"):
        return float(right.sum() / asked.sum()), right / asked


@dataclasses.dataclass(frozen=True)
class LengthSweep:
    """A training callback: after training, measure at several lengths; see `measure`.

    Attributes:
      data: the task that is trained on, at the trained length.
      lengths: of the retrieval rows, multiples of the trained length; the longest is that of the
        rows for the loss.
      tokens: held-out tokens for each measurement.
      batch_tokens: tokens a batch.
      depths: parts of a row by which retrieval is counted.
    """

    data: RetrievalText
    lengths: tuple[int, ...]
    tokens: int = 262144
    batch_tokens: int = 8192
    depths: int = 4

    def __call__(self, run: Any, moment: str) -> None:
        """Measure at the end and write the numbers into the stage's folder."""
        if moment == "end":
            write_json(run.context.folder / FILE, self.measure(run.model()))

    def measure(self, model: Any) -> dict[str, float]:
        """Return the numbers.

        `accuracy/T` and `accuracy/T/depth i of n` for rows of T tokens, without the last depths of
        short rows, where the questions leave no room for a key; `loss/bucket i` by
        position in the longest rows and `loss_in_windows/bucket i` of the same tokens in windows
        of the trained length (nats a token); `loss_harm`, the mean difference of the two beyond
        the trained length.
        """
        trained = self.data.text.sequence_length
        numbers: dict[str, float] = {}
        for length in self.lengths:
            data = self._at(length, plain_share=0.0, end_share=1.0)
            accuracy, by_depth = retrieval_accuracy(model, data, self.depths)
            numbers[f"accuracy/{length}"] = accuracy
            for part, value in enumerate(by_depth, 1):
                if np.isnan(value):
                    continue
                numbers[f"accuracy/{length}/depth {part} of {self.depths}"] = float(value)
        losses = loss_by_position(model, self._at(max(self.lengths), plain_share=1.0), trained)
        for name, label in (("whole", "loss"), ("windows", "loss_in_windows")):
            for bucket, value in enumerate(losses[name], 1):
                numbers[f"{label}/bucket {bucket}"] = float(value)
        harm = (losses["whole"] - losses["windows"])[1:]
        numbers["loss_harm"] = float(harm.mean())
        return numbers

    def _at(self, length: int, **changes: float) -> RetrievalText:
        rows = max(self.batch_tokens // length, 1)
        batches = max(self.tokens // (rows * length), 1)
        return replace_length(
            self.data, length, eval_batch_size=rows, max_eval_batches=batches, **changes
        )
