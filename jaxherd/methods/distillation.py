"""Co-distillation: a student learns from the data and from a teacher's distribution at once.

    L = l T^2 KL(teacher_T || student_T) + (1 - l) CE,   p_T = softmax(logits / T)

and l, the weight of the soft targets, changes over training and, if asked to, from token to token.
That Llama 4 Maverick was trained so ("a loss that dynamically weights soft and hard targets") is
disclosed, the rule is not (llama4.md section 7): the rules here are jaxherd's.  Meta computed most
targets ahead, during the teacher's own training: `top_k_targets` makes them, and a batch that holds
them needs no teacher.  Axis letters: B sequences, T tokens, V vocabulary, K kept tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import split
from jaxherd.methods.token_scores import forward_batch
from jaxherd.training.losses import token_nll
from jaxherd.training.metrics import Metrics, pair
from jaxherd.training.positions import CHUNK_BYTES, over_positions

TEACHER = "teacher"


@dataclasses.dataclass(frozen=True)
class SoftWeight:
    """l, the weight of the soft targets.

    Attributes:
      start, end: l at the first and at the last step; between them `shape`.
      shape: "linear" or "cosine" in the share of steps done.
      rule: "schedule", the same for every token; "agreement", times the probability that the teacher
        gives the token that came: where the teacher is wrong the data speak.
    """

    start: float = 0.5
    end: float = 0.5
    shape: Literal["linear", "cosine"] = "linear"
    rule: Literal["schedule", "agreement"] = "schedule"

    def __post_init__(self):
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise JaxherdError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        if self.shape not in ("linear", "cosine") or self.rule not in ("schedule", "agreement"):
            raise JaxherdError(
                f"shape {self.shape!r} must be 'linear' or 'cosine' and rule {self.rule!r} "
                "'schedule' or 'agreement'."
            )

    def at(self, progress: Any) -> jax.Array:
        """Return l after this share of the steps, before any rule for single tokens."""
        done = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
        if self.shape == "cosine":
            done = (1 - jnp.cos(jnp.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclasses.dataclass(frozen=True)
class CoDistillation:
    """The objective.

    Batch fields: those of `jaxherd.training.objectives.NextToken`; and either the frozen model
    "teacher" is given, or the batch holds teacher_ids and teacher_log_probs [B, T, K] of
    `top_k_targets` at the same temperature (what is not among the K counts as one further token).

    Attributes:
      weight: of the soft targets.
      temperature: T of both distributions.
      remat: what the forward pass keeps (`jaxherd.core.remat`).

    Metrics, as means over weighted tokens: loss; nll; soft, T^2 KL; soft_weight, l;
    teacher_nll where a teacher is asked; bits_per_byte.
    """

    weight: SoftWeight = SoftWeight()
    temperature: float = 1.0
    remat: str = "none"

    uses_progress = True

    def __post_init__(self):
        if self.temperature <= 0:
            raise JaxherdError(f"temperature must be positive, got {self.temperature}.")

    def __call__(
        self,
        model: Any,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        *,
        frozen: Any = None,
        progress: Any = 1.0,
    ) -> tuple[jax.Array, Metrics]:
        """Return the mean loss over weighted tokens, and its metrics.

        Raises:
          JaxherdError: there is neither a teacher nor a batch with its targets.
        """
        soft_BT, nll_BT, teacher_nll_BT = self._terms(model, batch, frozen)
        weight_BT = self.weight.at(progress) * jnp.ones_like(soft_BT)
        if self.weight.rule == "agreement":
            weight_BT = weight_BT * jnp.exp(-teacher_nll_BT)
        loss_BT = weight_BT * soft_BT + (1 - weight_BT) * nll_BT
        counted_BT = batch["loss_weights"]
        count = counted_BT.sum()

        def mean(values_BT):
            return pair((values_BT * counted_BT).sum(), count)

        metrics: Metrics = {
            "loss": mean(loss_BT),
            "nll": mean(nll_BT),
            "soft": mean(soft_BT),
            "soft_weight": mean(weight_BT),
            "teacher_nll": mean(teacher_nll_BT),
        }
        if "target_bytes" in batch:
            size = (batch["target_bytes"] * (counted_BT > 0)).sum()
            metrics["bits_per_byte"] = pair(metrics["nll"][0] / jnp.log(2.0), size)
        return metrics["loss"][0] / jnp.maximum(count, 1.0), metrics

    def _terms(self, model, batch, frozen):
        """Return (T^2 KL, -log p(target), -log teacher(target)), each [B, T]."""
        hidden_BTD = forward_batch(model, batch, self.remat).hidden_BTD
        score, head = model.head()
        definition, arrays, _ = split(head)
        own_axes, size = definition.axes()[0], 4 * model.config.vocab_size
        t = self.temperature

        def logits(arrays, hidden):
            return score(definition.merge(arrays), hidden)

        if "teacher_ids" in batch:

            def from_store(arrays, hidden, targets, ids, log_probs):
                own = logits(arrays, hidden)
                soft = t**2 * top_k_divergence(jax.nn.log_softmax(own / t), ids, log_probs)
                here = jnp.where(ids == targets[..., None], log_probs, -jnp.inf)
                # Of a token that was not kept only this is known: it is among what is left.
                known = jnp.where(
                    jnp.isfinite(here).any(axis=-1), here.max(axis=-1), _rest(log_probs)
                )
                return soft, token_nll(own, targets)[0], -known

            inputs = (hidden_BTD, batch["targets"], batch["teacher_ids"])
            return over_positions(
                from_store, arrays, (*inputs, batch["teacher_log_probs"]),
                bytes_per_position=2 * size, axes=own_axes,
            )  # fmt: skip
        if not frozen or TEACHER not in frozen:
            raise JaxherdError(
                "distillation needs a frozen model called 'teacher' "
                "(frozen=(FrozenModel('teacher', model, stage),)) or a batch with teacher_ids."
            )
        teacher = frozen[TEACHER]
        if teacher.config.vocab_size != model.config.vocab_size:
            raise JaxherdError(
                f"the teacher knows {teacher.config.vocab_size} tokens and the student "
                f"{model.config.vocab_size}: they need the same tokenizer."
            )
        seen_BTD = jax.lax.stop_gradient(forward_batch(teacher, batch, self.remat).hidden_BTD)
        score_of, head_of = teacher.head()
        definition_of, arrays_of, _ = split(head_of)

        def from_teacher(both, hidden, seen, targets):
            own = logits(both[0], hidden)
            theirs = jax.lax.stop_gradient(score_of(definition_of.merge(both[1]), seen))
            log_q, log_p = jax.nn.log_softmax(own / t), jax.nn.log_softmax(theirs / t)
            soft = t**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)
            return soft, token_nll(own, targets)[0], token_nll(theirs, targets)[0]

        return over_positions(
            from_teacher, (arrays, arrays_of), (hidden_BTD, seen_BTD, batch["targets"]),
            bytes_per_position=3 * size, axes=(own_axes, definition_of.axes()[0]),
        )  # fmt: skip


def _rest(log_probs: Float[Array, "... K"]) -> Float[Array, "..."]:
    """Return the log of what K probabilities leave, at least of float32's resolution."""
    return jnp.log(jnp.maximum(1 - jnp.exp(log_probs).sum(axis=-1), 1e-7))


def top_k_divergence(
    log_q: Float[Array, "... V"], ids: Int[Array, "... K"], log_p: Float[Array, "... K"]
) -> Float[Array, "..."]:
    """Return KL(p || q) where of p the K likeliest tokens are known and the rest is one event.

    A lower bound of the whole divergence, equal to it at K = V.
    """
    chosen = jnp.take_along_axis(log_q, ids, axis=-1)
    known = (jnp.exp(log_p) * (log_p - chosen)).sum(axis=-1)
    if ids.shape[-1] == log_q.shape[-1]:
        return known
    rest_p, rest_q = _rest(log_p), _rest(chosen)
    return known + jnp.exp(rest_p) * (rest_p - rest_q)


def top_k_targets(
    teacher: Any,
    batch: Mapping[str, jax.Array],
    k: int,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, jax.Array]:
    """Return what `CoDistillation` needs of a teacher: the K likeliest tokens of each position.

    Args:
      teacher: a decoder.
      batch: tokens [B, T], and positions and segment_ids where rows have them.
      k: tokens to keep.
      temperature: of the distribution.
      chunk_bytes: most bytes of logits on one device.
    Returns:
      {"teacher_ids" [B, T, K] int32, "teacher_log_probs" [B, T, K] float32}, the likeliest first.
    """
    hidden_BTD = forward_batch(teacher, batch).hidden_BTD
    score, head = teacher.head()
    definition, arrays, _ = split(head)

    def function(arrays, hidden):
        log_p = jax.nn.log_softmax(score(definition.merge(arrays), hidden) / temperature)
        return jax.lax.top_k(log_p, k)

    log_probs, ids = over_positions(
        function, arrays, (hidden_BTD,),
        bytes_per_position=8 * teacher.config.vocab_size, chunk_bytes=chunk_bytes,
        axes=definition.axes()[0],
    )  # fmt: skip
    return {"teacher_ids": ids.astype(jnp.int32), "teacher_log_probs": log_probs}
