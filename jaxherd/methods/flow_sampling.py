"""Solving dz/dt = v(z, t) between two times: grids, solvers, guidance.

Time 0 is noise and 1 is data.  A velocity is any function v(z_BTC, t_B) -> v_BTC: a closed form,
or `guided(model, condition, w)`.

Axis letters: B batch, T frames, C latent channels.  Source: melodyflow.md 5.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from jaxherd.core.errors import JaxherdError

Velocity = Callable[[jax.Array, jax.Array], jax.Array]

# A bound of ours, far above any use (the default is 4): beyond it latents leave all that the
# decoder knows, and at last the range of float32.
MAX_GUIDANCE = 100.0


def sway_grid(steps: int, sway: float = -0.8, *, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Return `steps` + 1 times from low to high in float64.

    t(u) = u + s (cos(pi u / 2) - 1 + u) at u = k / N, then low + (high - low) t: s < 0 packs the
    steps near noise, s = 0 is uniform (F5-TTS, arXiv 2410.06885).

    Raises:
      JaxherdError: no step, or a sway for which times would run backwards.
    """
    if steps < 1:
        raise JaxherdError(f"a grid needs at least 1 step, got {steps}.")
    if not -1.0 <= sway <= 2.0 / (np.pi - 2.0):
        raise JaxherdError(
            f"sway={sway} would let times run backwards: choose one from -1 to "
            f"{2.0 / (np.pi - 2.0):.2f}."
        )
    u = np.arange(steps + 1) / steps
    t = u + sway * (np.cos(np.pi * u / 2) - 1 + u)
    t[0], t[-1] = 0.0, 1.0
    return low + (high - low) * t


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """How to go from one time to another.

    Attributes:
      steps: points of the grid that are evaluated.  Euler makes an update at each; midpoint at
        every second, so that 64 steps are 64 network evaluations with either.
      solver: "euler" or "midpoint".
      sway: of the grid; 0 is uniform.
      cfg_coef: w in v = (1 + w) v_c - w v_null, which elsewhere is called guidance g = 1 + w, from
        -MAX_GUIDANCE to MAX_GUIDANCE.  It counts as 0 towards noise, where guidance makes the
        solution diverge.
      source, target: times at the start and the end.  Towards noise the grid is the one towards
        data between the same times, reversed.

    Raises:
      JaxherdError: an odd number of midpoint steps, times outside [0, 1], a sway that is no finite
        number, or a guidance beyond its bounds.
    """

    steps: int = 64
    solver: Literal["euler", "midpoint"] = "midpoint"
    sway: float = -0.8
    cfg_coef: float = 4.0
    source: float = 0.0
    target: float = 1.0

    def __post_init__(self):
        if self.solver not in ("euler", "midpoint"):
            raise JaxherdError(f"solver={self.solver!r} must be 'euler' or 'midpoint'.")
        if self.solver == "midpoint" and self.steps % 2:
            raise JaxherdError(f"midpoint takes its steps in pairs; {self.steps} is odd.")
        if not (0.0 <= self.source <= 1.0 and 0.0 <= self.target <= 1.0):
            raise JaxherdError(
                f"source and target must lie between 0 (noise) and 1 (data), got {self.source} "
                f"and {self.target}."
            )
        check_guidance(self.cfg_coef)
        sway_grid(self.steps, self.sway)

    @property
    def guidance(self) -> float:
        """The w that holds: 0 towards noise."""
        return 0.0 if self.target < self.source else self.cfg_coef

    def grid(self) -> np.ndarray:
        """Return the times, `steps` + 1 of them from source to target."""
        low, high = sorted((self.source, self.target))
        times = sway_grid(self.steps, self.sway, low=low, high=high)
        return times if self.target >= self.source else times[::-1]


def check_guidance(cfg_coef: float) -> None:
    """Raise a JaxherdError if a guidance is no finite number, or beyond what gives music."""
    if not math.isfinite(cfg_coef):
        raise JaxherdError(f"cfg_coef={cfg_coef} is no finite number: 4 is the usual guidance.")
    if abs(cfg_coef) > MAX_GUIDANCE:
        raise JaxherdError(
            f"cfg_coef={cfg_coef:g} is beyond {MAX_GUIDANCE:g}, where nothing but noise comes out: 4 "
            "is the usual guidance."
        )


def evaluations(plan: SamplingPlan) -> int:
    """Return the network evaluations for one example; a guided one counts twice."""
    return plan.steps * (2 if plan.guidance else 1)


def guided(
    model: Any, condition: Any, cfg_coef: Any = 0.0, *, enabled: bool | None = None
) -> Velocity:
    """Return v = (1 + w) v_c - w v_null of a model, both in one call of twice the rows.

    Args:
      model: v = model(z_BTC, t_B, condition).
      condition: of the rows (`jaxherd.models.velocity_transformer.Condition`); None is the null
        condition.  Rows of z may be a whole multiple of its rows: it is repeated.
      cfg_coef: w; 0 evaluates the condition alone.
      enabled: whether v_null is evaluated at all; must be said where w is traced.
    """
    both_halves = bool(cfg_coef) if enabled is None else enabled

    def velocity(z_BTC, t_B):
        rows = z_BTC.shape[0]
        here = condition
        if here is not None:
            here = here.tile(rows // here.mask_BL.shape[0])
        if here is None or not both_halves:
            return model(z_BTC, t_B, here)
        both = jax.tree.map(_interleaved, here, here.null())
        v_BTC = model(_interleaved(z_BTC, z_BTC), _interleaved(t_B, t_B), both)
        v_B2TC = rearrange(v_BTC, "(B pair) T C -> B pair T C", pair=2)
        w = jnp.asarray(cfg_coef, v_BTC.dtype)
        return (1 + w) * v_B2TC[:, 0] - w * v_B2TC[:, 1]

    return velocity


def _interleaved(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return rows a0, b0, a1, b1, ...: each pair stays on the device of its row.

    One array after the other would move half of the rows to other devices and back at every call.
    """
    return rearrange(jnp.stack([a, b], axis=1), "B pair ... -> (B pair) ...")


def solve(
    velocity: Velocity, z_BTC: Float[Array, "B T C"], plan: SamplingPlan
) -> Float[Array, "B T C"]:
    """Return the solution at `plan.target` that starts with `z_BTC` at `plan.source`.

    Guidance is the velocity's business (`guided`); here every step is one call.
    """
    return _solve(velocity, z_BTC, *_steps(plan), plan.solver)


def _steps(plan: SamplingPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return where each step begins and how far it goes, each rounded once from float64."""
    grid = plan.grid()
    return grid[:-1].astype(np.float32), np.diff(grid).astype(np.float32)


def _solve(velocity, z_BTC, now, ahead, solver: str):
    """Solve along steps that may be traced: sway, source and target are no part of a program."""

    def at(z, t):
        return velocity(z, jnp.full((z.shape[0],), t))

    if solver == "euler":

        def euler(z, step):
            t, dt = step
            return (z + dt * at(z, t)).astype(z.dtype), None

        return jax.lax.scan(euler, z_BTC, (jnp.asarray(now), jnp.asarray(ahead)))[0]

    def midpoint(z, step):
        (t, middle), (half, rest) = step
        between = z + half * at(z, t)
        return (z + (half + rest) * at(between, middle)).astype(z.dtype), None

    pairs = tuple(jnp.asarray(x).reshape(-1, 2) for x in (now, ahead))
    return jax.lax.scan(midpoint, z_BTC, pairs)[0]


@functools.partial(jax.jit, static_argnames=("solver", "is_guided"))
def _run(model, condition, z_BTC, now, ahead, cfg_coef, *, solver: str, is_guided: bool):
    velocity = guided(model, condition, cfg_coef, enabled=is_guided)
    return _solve(velocity, z_BTC, now, ahead, solver)


def transport(
    model: Any, condition: Any, z_BTC: Float[Array, "B T C"], plan: SamplingPlan
) -> Float[Array, "B T C"]:
    """Return latents brought from `plan.source` to `plan.target`.

    Compiled once for each shape, number of steps, solver and whether there is guidance; its strength,
    the sway and the times are given to the program.

    Args:
      model: see `guided`.
      condition: what `model.condition(batch)` gave for the same rows, or None.
      z_BTC: latents at the source time.
      plan: the grid, the solver and the guidance.
    """
    return _run(
        model, condition, z_BTC, *_steps(plan), np.float32(plan.guidance),
        solver=plan.solver, is_guided=bool(plan.guidance),
    )  # fmt: skip


def generate(
    model: Any,
    condition: Any,
    *,
    key: jax.Array,
    batch: int,
    frames: int,
    plan: SamplingPlan = SamplingPlan(),
) -> Float[Array, "B T C"]:
    """Return standardised latents drawn from noise under a batch of conditions.

    Args:
      model: a velocity network with `config.latent_dim`.
      condition: of `batch` rows, or None for none.
      key: of the noise.
      batch, frames: size of what is drawn.
      plan: starts at noise.
    Raises:
      JaxherdError: the plan does not start at 0.
    """
    if plan.source != 0.0:
        raise JaxherdError(f"generation starts from noise, at 0; the plan starts at {plan.source}.")
    noise = jax.random.normal(key, (batch, frames, model.config.latent_dim))
    return transport(model, condition, noise, plan)
