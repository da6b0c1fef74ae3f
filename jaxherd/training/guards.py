"""Guards against broken steps: non-finite gradients and sudden jumps of the loss.

A guarded step leaves the state as it was and counts; the trainer says what happened.  The guard's
own state is part of the train state, so that a resumed run guards alike.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
    """Running mean and variance of the loss, accepted steps, and skipped steps in a row.

    Scalars; as part of a train state also their shapes or shardings.
    """

    mean: Any
    variance: Any
    accepted: Any
    skipped_in_a_row: Any

    @classmethod
    def create(cls) -> "GuardState":
        """Return the state before the first step."""
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return cls(zero, zero, none, none)


@dataclasses.dataclass(frozen=True)
class Guards:
    """When to skip an update.

    Attributes:
      non_finite: "skip" leaves out updates with a non-finite loss or gradient; "raise" stops the
        run at once; "off" applies them.
      spike_sigmas: skip when the loss is this many standard deviations above its running mean;
        None applies every finite update.
      spike_after: accepted steps before spikes are judged.
      decay: of the running mean and variance.
      stop_after: skipped steps in a row that stop the run.
    """

    non_finite: Literal["skip", "raise", "off"] = "skip"
    spike_sigmas: float | None = 10.0
    spike_after: int = 50
    decay: float = 0.98
    stop_after: int = 20

    def __post_init__(self):
        if self.stop_after < 1 or self.spike_after < 0:
            raise JaxherdError("guards.stop_after must be at least 1, spike_after not negative.")
        if not 0 <= self.decay < 1 or (self.spike_sigmas is not None and not self.spike_sigmas > 0):
            raise JaxherdError("guards.decay must be from 0 to below 1, spike_sigmas positive.")

    def judge(
        self, state: GuardState, loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], GuardState]:
        """Return (apply the update?, reasons as 0/1, the next guard state)."""
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spread = jnp.sqrt(state.variance) + 1e-3 * jnp.abs(state.mean)
        spike = jnp.zeros((), bool)
        if self.spike_sigmas is not None:
            high = loss > state.mean + self.spike_sigmas * spread
            spike = finite & high & (state.accepted >= self.spike_after)
        accept = ~spike if self.non_finite == "off" else finite & ~spike
        delta = jnp.where(finite, loss - state.mean, 0.0)
        rate = jnp.maximum(1.0 - self.decay, 1.0 / (state.accepted + 1.0))
        moved = GuardState(
            mean=state.mean + rate * delta,
            variance=(1 - rate) * (state.variance + rate * delta**2),
            accepted=state.accepted + 1,
            skipped_in_a_row=jnp.zeros((), jnp.int32),
        )
        kept = dataclasses.replace(state, skipped_in_a_row=state.skipped_in_a_row + 1)
        new = jax.tree.map(lambda a, b: jnp.where(accept, a, b), moved, kept)
        reasons = {"guard/non_finite": ~finite, "guard/spike": spike}
        return accept, {k: v.astype(jnp.float32) for k, v in reasons.items()}, new

    def explain(self, step: int, metrics: dict) -> str | None:
        """Return a sentence about what the guards did in this step, or None."""
        if metrics.get("guard/non_finite"):
            action = "applied all the same" if self.non_finite == "off" else "update skipped"
            return (
                f"step {step}: loss {metrics.get('loss', 0.0):.4g}, gradient norm "
                f"{metrics['grad_norm']:.4g}: not finite, {action}."
            )
        if metrics.get("guard/spike"):
            return (
                f"step {step}: loss {metrics['loss']:.4g} is more than {self.spike_sigmas:g} "
                "standard deviations above its running mean, update skipped."
            )
        return None
