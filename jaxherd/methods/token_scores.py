"""What a decoder thinks of given tokens: log-probabilities, position by position.

Axis letters: B sequences, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxherd.core.modules import split
from jaxherd.training.losses import token_nll
from jaxherd.training.positions import CHUNK_BYTES, over_positions


def forward_batch(model: Any, batch: Mapping[str, jax.Array], remat: str = "none") -> Any:
    """Return the model's output for a batch's tokens, positions and segments."""
    return model.forward(
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        remat=remat,
    )


def token_log_probs(
    model: Any,
    batch: Mapping[str, jax.Array],
    *,
    remat: str = "none",
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Array, "B T"]:
    """Return log p(target | tokens before it) of every position, float32, differentiable.

    Logits are never held for all positions at once.

    Args:
      model: a decoder.
      batch: tokens and targets [B, T]; positions and segment_ids where rows have them.
      remat: see `jaxherd.core.remat`.
      temperature: logits are divided by it: p as sampling at this temperature sees it.
      chunk_bytes: most bytes of logits on one device.
    """
    hidden_BTD = forward_batch(model, batch, remat).hidden_BTD
    score, head = model.head()
    definition, arrays, _ = split(head)

    def function(arrays, hidden_BtD, targets_Bt):
        logits_BtV = score(definition.merge(arrays), hidden_BtD) / temperature
        return -token_nll(logits_BtV, targets_Bt)[0]

    return over_positions(
        function,
        arrays,
        (hidden_BTD, batch["targets"]),
        bytes_per_position=4 * model.config.vocab_size,
        chunk_bytes=chunk_bytes,
        axes=definition.axes()[0],
    )
