"""Group-relative policy optimisation: answers are judged against others to the same prompt.

    A_i = (r_i - mean r) / (std r + eps)  over the answers i to one prompt; no critic
    L_t = -min(w_t A, clip(w_t, 1 - lo, 1 + hi) A) + beta k_t
    w_t = p(y_t) / p_sampling(y_t),   k_t = q/p - log(q/p) - 1 for a frozen reference q

How tokens are averaged is an option with the published names; denominators are those of the whole
batch, over microbatches and devices.  Meta disclosed that Llama 4's online RL alternates training
with filtering prompts, and no algorithm (llama4.md section 7): this one is jaxherd's choice.
Axis letters: B answers, G answers to one prompt, T tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError
from jaxherd.methods.token_scores import token_log_probs
from jaxherd.training.metrics import Metrics, pair

REFERENCE = "reference"


def group_advantages(
    rewards: Float[np.ndarray, "N G"], *, normalize: bool = True, eps: float = 1e-6
) -> Float[np.ndarray, "N G"]:
    """Return each answer's reward minus its group's mean, over the group's standard deviation.

    A group of equal rewards gets exactly zero.

    Args:
      rewards: of G answers to each of N prompts.
      normalize: divide by the standard deviation (of the G values, not their sample estimate);
        False leaves the difference, which weighs hard and easy prompts alike.
      eps: added to the standard deviation.
    """
    rewards = np.asarray(rewards, np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    spread = rewards.std(axis=1, keepdims=True)
    equal = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    advantages = centred / (spread + eps) if normalize else centred
    return np.where(equal, 0.0, advantages).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class GroupPolicyOptimization:
    """The objective.

    Batch fields: tokens, targets, positions, segment_ids [B, T] int32; loss_weights [B, T], 1 on the
    tokens that the policy chose; sampled_log_probs [B, T], of those under the policy that chose them
    (at its temperature); advantages [B]; rewards [B], for the log alone.

    Attributes:
      clip_low, clip_high: how far w may fall or rise before its gradient stops; the same value for
        both is the usual form, a larger `clip_high` lets unlikely tokens grow.
      kl_weight: beta; above zero the frozen model "reference" is needed.
      average: "token", each token of the batch counts the same; "sequence", each answer counts the
        same, its tokens by its length; "constant", the sum over `constant_length` tokens an answer,
        which does not depend on lengths at all.
      constant_length: T when None.
      skip_equal_groups: answers with an advantage of zero (a group of equal rewards) leave the
        denominators too, so that a batch full of them does not shrink the step.
      temperature: of the sampling; the policy is scored at it.
      remat: what the forward pass keeps (`jaxherd.core.remat`).

    Metrics: loss; reward, over answers; useful, the share of answers with an advantage; ratio, w, and
    clipped, the share of tokens beyond a bound in the direction of their advantage; kl (k_t, with a
    reference) and entropy_bound (-log p of the chosen tokens), over tokens; length, tokens an answer.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    average: Literal["token", "sequence", "constant"] = "token"
    constant_length: int | None = None
    skip_equal_groups: bool = True
    temperature: float = 1.0
    remat: str = "none"

    def __post_init__(self):
        if self.average not in ("token", "sequence", "constant"):
            raise JaxherdError(
                f"average={self.average!r} must be 'token', 'sequence' or 'constant'."
            )
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise JaxherdError(
                f"clip_low must be between 0 and 1 and clip_high positive, got {self.clip_low} and "
                f"{self.clip_high}."
            )
        if self.temperature <= 0:
            raise JaxherdError(f"temperature must be positive, got {self.temperature}.")

    def __call__(
        self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array, *, frozen: Any = None
    ) -> tuple[jax.Array, Metrics]:
        """Return the loss over the batch's denominator, and its metrics.

        Raises:
          JaxherdError: kl_weight is set and no frozen model "reference" is given.
        """
        mask_BT, advantage_B = batch["loss_weights"], batch["advantages"]
        log_p_BT = token_log_probs(model, batch, remat=self.remat, temperature=self.temperature)
        ratio_BT = jnp.exp(jnp.where(mask_BT > 0, log_p_BT - batch["sampled_log_probs"], 0.0))
        clipped_BT = jnp.clip(ratio_BT, 1 - self.clip_low, 1 + self.clip_high)
        advantage_B1 = advantage_B[:, None]
        loss_BT = -jnp.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
        kl_BT = self._kl(log_p_BT, mask_BT, batch, frozen)
        if kl_BT is not None:
            loss_BT = loss_BT + self.kl_weight * kl_BT
        useful_B = (advantage_B != 0).astype(jnp.float32)
        counted_BT = mask_BT * useful_B[:, None] if self.skip_equal_groups else mask_BT
        total, weight = self._averaged(loss_BT, counted_BT)
        tokens, answers = mask_BT.sum(), (mask_BT.sum(axis=1) > 0).astype(jnp.float32).sum()
        beyond_BT = jnp.where(
            advantage_B1 > 0, ratio_BT > 1 + self.clip_high, ratio_BT < 1 - self.clip_low
        )
        beyond_BT &= advantage_B1 != 0
        metrics: Metrics = {
            "loss": pair(total, weight),
            "reward": pair(batch["rewards"].sum(), batch["rewards"].size),
            "useful": pair(useful_B.sum(), useful_B.size),
            "ratio": pair((ratio_BT * mask_BT).sum(), tokens),
            "clipped": pair((beyond_BT * mask_BT).sum(), tokens),
            "entropy_bound": pair(-(log_p_BT * mask_BT).sum(), tokens),
            "length": pair(tokens, answers),
        }
        if kl_BT is not None:
            metrics["kl"] = pair((kl_BT * mask_BT).sum(), tokens)
        return total / jnp.maximum(weight, 1e-9), metrics

    def _kl(self, log_p_BT, mask_BT, batch, frozen):
        if not self.kl_weight:
            return None
        if not frozen or REFERENCE not in frozen:
            raise JaxherdError(
                "kl_weight needs a frozen model called 'reference': "
                "frozen=(FrozenModel('reference', model, stage),)."
            )
        log_q_BT = token_log_probs(
            frozen[REFERENCE], batch, remat=self.remat, temperature=self.temperature
        )
        difference_BT = jnp.where(mask_BT > 0, jax.lax.stop_gradient(log_q_BT) - log_p_BT, 0.0)
        return jnp.exp(difference_BT) - difference_BT - 1.0

    def _averaged(self, loss_BT, counted_BT):
        """Return the (sum, denominator) of the loss; both add up over microbatches and devices."""
        length_B = counted_BT.sum(axis=1)
        if self.average == "token":
            return (loss_BT * counted_BT).sum(), length_B.sum()
        answers = (length_B > 0).astype(jnp.float32).sum()
        if self.average == "sequence":
            mean_B = (loss_BT * counted_BT).sum(axis=1) / jnp.maximum(length_B, 1.0)
            return mean_B.sum(), answers
        constant = self.constant_length or loss_BT.shape[1]
        return (loss_BT * counted_BT).sum() / constant, answers
