"""Direct preference optimisation: the better of two answers becomes likelier than it was.

    m = beta ((log p(y+) - log q(y+)) - (log p(y-) - log q(y-)))      p policy, q frozen reference
    loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m) + w NLL(y+)

log p(y) sums over the tokens of the answer.  Llama 4's "light" DPO has no disclosed settings
(llama4.md section 7).  Axis letters: P pairs, B = 2 P rows, T tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError
from jaxherd.methods.token_scores import token_log_probs
from jaxherd.training.metrics import Metrics, pair

REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class PreferenceOptimization:
    """The objective.

    Batch fields, all [B, T] with a pair in two rows, the better answer first: tokens, targets,
    positions, segment_ids (int32), loss_weights (float32; 1 on the answer's tokens, 0 on the
    prompt's and on padding; a pair of zeros does not count).  The frozen model "reference" is what
    the policy was before.

    Attributes:
      beta: how hard the policy is held to the reference.
      label_smoothing: e, the share of pairs taken to be labelled the wrong way round.
      nll_weight: w, weight of the better answer's mean negative log-probability a token.
      length_normalized: compare means over tokens instead of sums.
      remat: what the forward pass keeps (`jaxherd.core.remat`).

    Metrics, as means over pairs: loss, ln 2 where policy and reference agree; margin, m; accuracy,
    the share of pairs with m > 0; chosen/log_ratio and rejected/log_ratio, log p - log q; nll, of
    the better answer a token.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    length_normalized: bool = False
    remat: str = "none"

    rows_together = 2

    def __post_init__(self):
        if self.beta <= 0:
            raise JaxherdError(f"beta must be positive, got {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise JaxherdError(
                f"label_smoothing must be from 0 to below 0.5, got {self.label_smoothing}."
            )

    def __call__(
        self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array, *, frozen: Any = None
    ) -> tuple[jax.Array, Metrics]:
        """Return the mean loss over pairs, and its metrics.

        Raises:
          JaxherdError: no reference is given, or a row has no partner.
        """
        if not frozen or REFERENCE not in frozen:
            raise JaxherdError(
                "preference optimisation needs a frozen model called 'reference': "
                "frozen=(FrozenModel('reference', model, stage),)."
            )
        if batch["tokens"].shape[0] % 2:
            raise JaxherdError("a batch of pairs has an even number of rows.")
        weights_BT = batch["loss_weights"]
        own_BT = token_log_probs(model, batch, remat=self.remat)
        reference_BT = token_log_probs(frozen[REFERENCE], batch, remat=self.remat)
        tokens_B = weights_BT.sum(axis=1)
        ratio_B = (weights_BT * (own_BT - jax.lax.stop_gradient(reference_BT))).sum(axis=1)
        if self.length_normalized:
            ratio_B = ratio_B / jnp.maximum(tokens_B, 1.0)
        chosen_P, rejected_P = ratio_B[0::2], ratio_B[1::2]
        margin_P = self.beta * (chosen_P - rejected_P)
        loss_P = -(1 - self.label_smoothing) * jax.nn.log_sigmoid(margin_P)
        loss_P -= self.label_smoothing * jax.nn.log_sigmoid(-margin_P)
        nll_P = -(weights_BT * own_BT).sum(axis=1)[0::2] / jnp.maximum(tokens_B[0::2], 1.0)
        loss_P += self.nll_weight * nll_P
        counts_P = ((tokens_B[0::2] > 0) & (tokens_B[1::2] > 0)).astype(jnp.float32)
        pairs = counts_P.sum()

        def mean(values_P):
            return pair((values_P * counts_P).sum(), pairs)

        metrics: Metrics = {
            "loss": mean(loss_P),
            "margin": mean(margin_P),
            "accuracy": mean(margin_P > 0),
            "chosen/log_ratio": mean(chosen_P),
            "rejected/log_ratio": mean(rejected_P),
            "nll": mean(nll_P),
        }
        return metrics["loss"][0] / jnp.maximum(pairs, 1.0), metrics
