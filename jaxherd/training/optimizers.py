"""Optimisers and schedules as frozen configs over optax."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import Tree


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate over steps: linear warm-up from zero to `peak`, then a decay.

    Kinds: "cosine" and "linear" go from `peak` to `final * peak` at the last step; "wsd" stays at
    the peak and falls linearly over the last `decay_fraction` of the steps; "constant" stays;
    "inverse_sqrt" falls with sqrt(warmup_steps / step).
    """

    peak: float = 3e-4
    kind: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = "cosine"
    warmup_steps: int = 100
    final: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self):
        if not (0 <= self.peak < float("inf")):
            raise JaxherdError(f"schedule.peak must be finite and not negative, got {self.peak}.")
        if self.warmup_steps < 0:
            raise JaxherdError(f"schedule.warmup_steps must not be negative: {self.warmup_steps}.")
        for name in ("final", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise JaxherdError(f"schedule.{name} must be from 0 to 1: {getattr(self, name)}.")

    def build(self, total_steps: int) -> optax.Schedule:
        """Return the optax schedule for a run of `total_steps`.

        Raises:
          JaxherdError: the warm-up is longer than the run.
        """
        if self.warmup_steps >= total_steps and self.kind != "constant":
            raise JaxherdError(
                f"schedule: warmup_steps={self.warmup_steps} leaves nothing of a run of "
                f"{total_steps} steps; lower one or raise the other."
            )
        left = max(total_steps - self.warmup_steps, 1)
        after: Any
        if self.kind == "cosine":
            after = optax.cosine_decay_schedule(self.peak, left, alpha=self.final)
        elif self.kind == "linear":
            after = optax.linear_schedule(self.peak, self.peak * self.final, left)
        elif self.kind == "wsd":
            fall = max(int(left * self.decay_fraction), 1)
            after = optax.linear_schedule(self.peak, self.peak * self.final, fall, left - fall)
        elif self.kind == "inverse_sqrt":
            scale = max(self.warmup_steps, 1)
            after = lambda step: self.peak * jnp.sqrt(scale / (scale + step))  # noqa: E731
        else:
            after = optax.constant_schedule(self.peak)
        if self.warmup_steps == 0:
            return after
        rise = optax.linear_schedule(0.0, self.peak, self.warmup_steps)
        return optax.join_schedules([rise, after], [self.warmup_steps])


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax optimiser with clipping, decay of matrices only, and a schedule.

    Attributes:
      kind: which optimiser; "muon" takes matrices and leaves the rest to AdamW.
      weight_decay: decoupled, not applied to variables with fewer than two named dimensions
        (norm scales, biases).
      clip: largest global gradient norm; None leaves gradients as they are.
      moment_dtype: of Adam's first moment, such as "bfloat16"; None keeps the parameters'.
    """

    kind: Literal["adamw", "lion", "sgd", "adafactor", "muon"] = "adamw"
    schedule: Schedule = Schedule()
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0
    moment_dtype: str | None = None

    def __post_init__(self):
        if self.clip is not None and not self.clip > 0:
            raise JaxherdError(f"optimizer.clip must be positive or none, got {self.clip}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise JaxherdError(f"optimizer.{name} must be from 0 to below 1.")
        if not self.eps >= 0 or not self.weight_decay >= 0:
            raise JaxherdError("optimizer.eps and optimizer.weight_decay must not be negative.")

    def build(
        self, total_steps: int, axes: Tree, rates: Tree | None = None
    ) -> optax.GradientTransformation:
        """Return the optax transformation.

        Args:
          total_steps: of the run, for the schedule.
          axes: logical axes of the parameters, for the mask of the weight decay.
          rates: multiply the update of each parameter; one rate for all when None.
        """
        core = self._build(total_steps, axes)
        return core if rates is None else optax.chain(core, _scale_each(rates))

    def _build(self, total_steps: int, axes: Tree) -> optax.GradientTransformation:
        rate = self.schedule.build(total_steps)
        mask = decay_mask(axes)
        if self.kind == "adamw":
            core = optax.adamw(
                rate,
                self.beta1,
                self.beta2,
                self.eps,
                weight_decay=self.weight_decay,
                mask=mask,
                mu_dtype=self.moment_dtype,
            )
        elif self.kind == "lion":
            core = optax.lion(
                rate,
                self.beta1,
                self.beta2,
                weight_decay=self.weight_decay,
                mask=mask,
                mu_dtype=self.moment_dtype,
            )
        elif self.kind == "adafactor":
            core = optax.adafactor(
                rate, weight_decay_rate=self.weight_decay or None, weight_decay_mask=mask
            )
        elif self.kind == "muon":
            core = optax.contrib.muon(
                rate,
                weight_decay=self.weight_decay,
                weight_decay_mask=mask,
                adam_b1=self.beta1,
                adam_b2=self.beta2,
            )
        else:
            core = optax.chain(
                optax.add_decayed_weights(self.weight_decay, mask), optax.sgd(rate, self.beta1)
            )
        if self.clip is None:
            return core
        return optax.chain(optax.clip_by_global_norm(self.clip), core)


def _scale_each(rates: Tree) -> optax.GradientTransformation:
    def update(updates, params=None):
        return jax.tree.map(lambda u, rate: u * rate, updates, rates)

    return optax.stateless(update)


def decay_mask(axes: Tree) -> Tree:
    """Return True for variables with at least two named dimensions besides stacked layers."""
    return jax.tree.map(
        lambda names: sum(name != "layers" for name in names) >= 2,
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def state_shardings(
    optimizer: optax.GradientTransformation, params: Any, param_shardings: Any, other: Any
) -> Any:
    """Return shardings of the optimiser state: moments like their parameters, `other` elsewhere.

    Args:
      optimizer: the transformation.
      params: abstract parameters.
      param_shardings: a like tree.
      other: the sharding of counters and of leaves whose shape is no parameter's.
    """
    # A moment's path ends with its parameter's, whatever optax wraps around it.
    known = {
        _keys(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(param_shardings)
        )
    }

    def like(path, leaf):
        keys = _keys(path)
        for start in range(len(keys)):
            shape, sharding = known.get(keys[start:], (None, other))
            if shape == leaf.shape:
                return sharding
        return other

    return jax.tree_util.tree_map_with_path(like, jax.eval_shape(optimizer.init, params))


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
