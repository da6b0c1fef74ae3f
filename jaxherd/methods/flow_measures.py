"""How well a velocity field samples, inverts and edits, as numbers.

Axis letters: B batch, T frames, C latent channels, K times.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.methods.flow_sampling import SamplingPlan, guided, transport

# The solution that few-step ones are compared with.
REFERENCE = SamplingPlan(steps=512, solver="midpoint", sway=0.0, cfg_coef=0.0)


def relative_error(found: Float[Array, "B T C"], wanted: Float[Array, "B T C"]) -> float:
    """Return sum (found - wanted)^2 / sum wanted^2."""
    return float(jnp.square(found - wanted).sum() / jnp.square(wanted).sum())


def exact_samples(
    model: Any, condition: Any, noise_BTC: Float[Array, "B T C"]
) -> Float[Array, "B T C"]:
    """Return where `REFERENCE` brings the noise."""
    return transport(model, condition, noise_BTC, REFERENCE)


def sampling_error(
    model: Any,
    condition: Any,
    noise_BTC: Float[Array, "B T C"],
    plan: SamplingPlan,
    exact_BTC: Float[Array, "B T C"],
) -> float:
    """Return the mean squared distance of a plan's samples from `exact_samples` of the same noise."""
    return float(jnp.square(transport(model, condition, noise_BTC, plan) - exact_BTC).mean())


@functools.partial(jax.jit, static_argnames=("steps",))
def _straightness(model, condition, noise_BTC, steps: int):
    velocity = guided(model, condition)
    times = jnp.arange(steps) / steps

    def step(z, t):
        v = velocity(z, jnp.full((z.shape[0],), t))
        return z + v / steps, v

    end_BTC, v_KBTC = jax.lax.scan(step, noise_BTC, times)
    return jnp.square(v_KBTC - (end_BTC - noise_BTC)[None]).mean()


def path_curvature(
    model: Any, condition: Any, noise_BTC: Float[Array, "B T C"], *, steps: int = 128
) -> float:
    """Return the mean of (v(z_t, t) - (z_1 - z_0))^2 along the model's own paths.

    Zero where every path is a straight line run through at constant speed, which one Euler step
    follows exactly.
    """
    return float(_straightness(model, condition, noise_BTC, steps))
