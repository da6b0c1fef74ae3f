"""Inversion of a flow: from data back to (partial) noise, and editing by way of it.

An explicit Euler step from t' to t is undone exactly by the implicit one, z' = z + dt v(z', t'),
so the velocity is evaluated at the *destination* and iterated:

    y <- z;  repeat K times: v <- v(y, t');  y <- z + dt v;     z' = z + dt * weighted mean of v

of which the last k velocities count, and are first pulled towards the statistics of a reference
velocity at a freshly noised source (`jaxherd.methods.inversion_regularizer`).

Axis letters: B batch, T frames, C latent channels.  Source: melodyflow.md 6.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.methods.flow_sampling import (
    SamplingPlan,
    Velocity,
    evaluations,
    guided,
    solve,
)
from jaxherd.methods.inversion_regularizer import regularize

Scheme = Literal["implicit", "backward_euler", "noise"]


def _sampling(
    plan: "Inversion", source: float, target: float, cfg_coef: float = 0.0
) -> SamplingPlan:
    return SamplingPlan(plan.steps, plan.solver, plan.sway, cfg_coef, source, target)


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How to go from data at 1 to `target_flowstep`.

    Attributes:
      scheme: "implicit" as above; "backward_euler" takes the velocity where the step starts;
        "noise" is no inversion: the source is noised to the target time.  The methods of the
        paper's comparison are `inversion("regularized")` and so on, see `METHODS`.
      steps, sway: of the grid; the same ones as in the generation that follows, else the
        inversion is not the inverse.
      solver: of both directions; "midpoint" (even steps, each an evaluation) is for
        "backward_euler" and "noise" alone, the public demo's plain mode with 64 and 64 steps.
      target_flowstep: where it ends; smaller is a stronger edit.
      iterations, keep: K and k.
      weights: "linear" weighs kept velocity j (from 0) by j / sum of the kept j, "uniform" by 1/k.
      lambda_kl, lambda_pair, pair_rolls, pair_positions, gradient_steps, clip, patch: see
        `regularize`; without `lambda_kl` no reference is evaluated.
      sigma_min: of the jitter on the reference.
    """

    scheme: Scheme = "implicit"
    steps: int = 25
    sway: float = -0.8
    solver: Literal["euler", "midpoint"] = "euler"
    target_flowstep: float = 0.0
    iterations: int = 4
    keep: int = 2
    weights: Literal["linear", "uniform"] = "linear"
    lambda_kl: float = 0.2
    lambda_pair: float = 0.0
    pair_rolls: int = 5
    pair_positions: int = 4096
    gradient_steps: int = 4
    clip: float = 100.0
    patch: int = 4
    sigma_min: float = 1e-5

    def __post_init__(self):
        if self.scheme not in get_args(Scheme):
            raise JaxherdError(f"scheme={self.scheme!r}: " + nearest(self.scheme, get_args(Scheme)))
        if self.solver == "midpoint" and self.scheme == "implicit":
            raise JaxherdError(
                "the fixed point is that of an Euler step: solver='midpoint' is for scheme="
                "'backward_euler' or 'noise'."
            )
        if not 1 <= self.keep <= self.iterations:
            raise JaxherdError(
                f"keep must lie between 1 and iterations={self.iterations}, got {self.keep}."
            )
        if self.weights == "linear" and self.iterations == 1:
            raise JaxherdError("linear weights give the first iteration none: iterate at least 2.")
        if not 0.0 <= self.target_flowstep < 1.0:
            raise JaxherdError(
                f"target_flowstep must lie in [0, 1), got {self.target_flowstep}: 1 is the source."
            )
        _sampling(self, 1.0, self.target_flowstep)

    @property
    def referenced(self) -> bool:
        """Whether kept iterations evaluate a reference."""
        return self.scheme == "implicit" and bool(self.lambda_kl)

    def kept_weights(self) -> np.ndarray:
        """Return the weights of the kept velocities; they sum to 1."""
        j = np.arange(self.iterations - self.keep, self.iterations, dtype=np.float64)
        return j / j.sum() if self.weights == "linear" else np.full(self.keep, 1.0 / self.keep)

    def evaluations_per_step(self) -> int:
        """Return the network evaluations for one example in one step, references included.

        References share a call with the iterate; counted by calls, as in the paper's demo, a step
        of the implicit methods is `iterations`.
        """
        if self.scheme != "implicit":
            return 1 if self.scheme == "backward_euler" else 0
        return self.iterations + self.keep * self.referenced

    def evaluations(self) -> int:
        """Return the network evaluations for one example."""
        return self.steps * self.evaluations_per_step()

    def edit_calls(self) -> int:
        """Return how often an edit calls the network; references and guidance share a call."""
        each = {"implicit": self.iterations, "backward_euler": 1, "noise": 0}[self.scheme]
        return self.steps * (each + 1)


def inversion(method: str, **changes: Any) -> Inversion:
    """Return a method of `METHODS`, with the paper's or the original's parameters.

    Raises:
      JaxherdError: no such method.
    """
    if method not in METHODS:
        raise JaxherdError(f"no inversion {method!r}; " + nearest(method, METHODS))
    return dataclasses.replace(METHODS[method], **changes)


METHODS: Mapping[str, Inversion] = {
    # The paper's.
    "regularized": Inversion(),
    "fixed_point": Inversion(lambda_kl=0.0),
    # From memory of the original's defaults (melodyflow.md 6.2, [recall]); its noise prediction
    # is a velocity here, as in the paper's comparison, and the flat mean is over two iterates.
    "renoise": Inversion(
        iterations=9, keep=2, weights="uniform", lambda_kl=0.065, lambda_pair=20.0
    ),
    "ddim": Inversion("backward_euler"),
    "ddim_midpoint": Inversion("backward_euler", steps=64, solver="midpoint"),
    "sdedit": Inversion("noise"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inverted:
    """Latents at the target time.

    Attributes:
      latents_BTC: the result.
      std: of all their values: 1 for noise.  On exact fields backward Euler ends below and the
        implicit step above.
      evaluations: network evaluations for one example.
    """

    latents_BTC: jax.Array
    std: jax.Array
    evaluations: int = dataclasses.field(metadata={"static": True})


def invert(
    velocity: Velocity, source_BTC: Float[Array, "B T C"], plan: Inversion, key: jax.Array
) -> Inverted:
    """Return the latents that the plan reaches from data.

    Args:
      velocity: under the source's condition (the null condition by default in the paper), without
        guidance; rows may be doubled (`guided` repeats its condition).
      source_BTC: standardised latents of the source, at time 1.
      plan: the method and its parameters.
      key: of the references and of SDEdit's noise.
    """
    end = plan.target_flowstep
    if plan.scheme == "noise":
        noise = jax.random.normal(key, source_BTC.shape)
        z_BTC = (1 - end) * noise + end * source_BTC
    elif plan.scheme == "backward_euler":
        z_BTC = solve(velocity, source_BTC, _sampling(plan, 1.0, end))
    else:
        z_BTC = _implicit(velocity, source_BTC, plan, key)
    return Inverted(z_BTC, z_BTC.std(), plan.evaluations())


def _implicit(velocity, source_BTC, plan: Inversion, key):
    grid = _sampling(plan, 1.0, plan.target_flowstep).grid()
    there = jnp.asarray(grid[1:], jnp.float32)
    ahead = jnp.asarray(np.diff(grid), jnp.float32)
    free, rows = plan.iterations - plan.keep, source_BTC.shape[0]
    numbers = jnp.arange(plan.steps)

    def times(t, count):
        return jnp.full((count,), t)

    def regular(y, t, step_key):
        """Return the velocity at y, pulled towards that at a fresh point of the true path."""
        if not plan.referenced:
            v, reference = velocity(y, times(t, rows)), jnp.zeros_like(y)
        else:
            noise_key, jitter_key = jax.random.split(jax.random.fold_in(step_key, 0))
            noise = jax.random.normal(noise_key, y.shape)
            jitter = plan.sigma_min * jax.random.normal(jitter_key, y.shape)
            point = (1 - t) * noise + t * source_BTC + jitter
            both = velocity(jnp.concatenate([y, point]), times(t, 2 * rows))
            v, reference = both[:rows], both[rows:]
        if not (plan.lambda_kl or plan.lambda_pair):
            return v
        return regularize(
            v,
            reference,
            jax.random.fold_in(step_key, 1),
            lambda_kl=plan.lambda_kl,
            lambda_pair=plan.lambda_pair,
            pair_rolls=plan.pair_rolls,
            pair_positions=plan.pair_positions,
            gradient_steps=plan.gradient_steps,
            clip=plan.clip,
            patch=plan.patch,
        )

    def step(z, scanned):
        t, dt, number = scanned

        def approach(y, _):
            return z + dt * velocity(y, times(t, rows)), None

        def keep(carry, kept):
            y, mean = carry
            weight, j = kept
            # One key for each step and iteration.
            v = regular(y, t, jax.random.fold_in(key, number * plan.iterations + j))
            return (z + dt * v, mean + weight * v), None

        y, _ = jax.lax.scan(approach, z, None, length=free)
        weights = jnp.asarray(plan.kept_weights(), jnp.float32)
        kept = (weights, jnp.arange(free, plan.iterations))
        (_, mean), _ = jax.lax.scan(keep, (y, jnp.zeros_like(z)), kept)
        return z + dt * mean, None

    return jax.lax.scan(step, source_BTC, (there, ahead, numbers))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edited:
    """An edit.

    Attributes:
      latents_BTC: at time 1, standardised.
      inverted: where the generation started.
      evaluations: of inversion and generation together, for one example.
    """

    latents_BTC: jax.Array
    inverted: Inverted
    evaluations: int = dataclasses.field(metadata={"static": True})


def edit_with(
    source_velocity: Velocity,
    target_velocity: Velocity,
    source_BTC: Float[Array, "B T C"],
    plan: Inversion,
    key: jax.Array,
    *,
    cfg_coef: float = 0.0,
    generation_steps: int | None = None,
) -> Edited:
    """Invert under one velocity and generate under another, from the time that was reached.

    Args:
      source_velocity: for the inversion, without guidance.
      target_velocity: for the generation, guidance included.
      source_BTC: standardised latents of the source.
      plan: of the inversion; the generation takes its solver on the same grid, without
        regularisation.
      key: of the inversion.
      cfg_coef: of the target velocity, to count its evaluations.
      generation_steps: other than the plan's own.
    """
    inverted = invert(source_velocity, source_BTC, plan, key)
    generation = _sampling(plan, plan.target_flowstep, 1.0, cfg_coef)
    if generation_steps is not None:
        generation = dataclasses.replace(generation, steps=generation_steps)
    latents = solve(target_velocity, inverted.latents_BTC, generation)
    return Edited(latents, inverted, inverted.evaluations + evaluations(generation))


def edit(
    model: Any,
    source_BTC: Float[Array, "B T C"],
    source_condition: Any,
    target_condition: Any,
    plan: Inversion,
    key: jax.Array,
    *,
    cfg_coef: float = 4.0,
    generation_steps: int | None = None,
) -> Edited:
    """Edit latents with a model; compiled once per shape and plan, whatever the guidance.

    Args:
      model: see `jaxherd.methods.flow_sampling.guided`.
      source_BTC: standardised latents of the source.
      source_condition: of the source; None is the null condition, the paper's default.
      target_condition: what the result should be.
      plan: of the inversion.
      key: of the inversion.
      cfg_coef: w of the generation.
      generation_steps: other than the plan's own.
    """
    # Without a condition both halves of a guided call would be the same.
    strength = 0.0 if target_condition is None else cfg_coef
    return _edit(
        model, source_BTC, source_condition, target_condition, key, np.float32(strength),
        plan=plan, is_guided=bool(strength), generation_steps=generation_steps,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("plan", "is_guided", "generation_steps"))
def _edit(
    model, source_BTC, source_condition, target_condition, key, cfg_coef, *, plan, is_guided,
    generation_steps,
):  # fmt: skip
    return edit_with(
        guided(model, source_condition),
        guided(model, target_condition, cfg_coef, enabled=is_guided),
        source_BTC,
        plan,
        key,
        # To count evaluations it matters only whether there is guidance.
        cfg_coef=float(is_guided),
        generation_steps=generation_steps,
    )


@dataclasses.dataclass(frozen=True)
class Share:
    """The steps that a method can afford, and the evaluations it then uses."""

    inversion_steps: int
    generation_steps: int
    evaluations: int


def equal_evaluations(
    budget: int,
    plans: Mapping[str, Inversion],
    *,
    guided: bool = True,
    generation_steps: int | None = None,
) -> dict[str, Share]:
    """Return what each method can do with the same number of network evaluations.

    Args:
      budget: evaluations for one example, inversion and generation together.
      plans: the methods; their own `steps` do not matter.
      guided: whether a generation step costs two evaluations.
      generation_steps: fixed for all; what is left goes to the inversion.  Without it each method
        takes as many steps in both directions as it can, on the same grid.
    Raises:
      JaxherdError: a budget too small for one step.
    """
    shares, each = {}, 2 if guided else 1
    for name, plan in plans.items():
        cost = plan.evaluations_per_step()
        if generation_steps is None:
            inward = outward = budget // (cost + each)
            if plan.solver == "midpoint":
                inward = outward = inward - inward % 2
        else:
            outward = generation_steps
            inward = (budget - outward * each) // cost if cost else outward
            if plan.solver == "midpoint":
                inward -= inward % 2
        if inward < 1 or outward < 1:
            raise JaxherdError(
                f"{name}: {budget} evaluations do not suffice for a step of {cost} for the "
                f"inversion and {each} for the generation."
            )
        shares[name] = Share(inward, outward, inward * cost + outward * each)
    return shares
