"""Metrics are (sum, weight) pairs, so that they add up over microbatches, devices and hosts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def pair(total: Any, weight: Any) -> tuple[jax.Array, jax.Array]:
    """Return a metric; both parts in float32."""
    return jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)


def add(a: Metrics, b: Metrics) -> Metrics:
    """Return the metrics of two disjoint batches taken together."""
    return jax.tree.map(jnp.add, a, b)


def means(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, np.ndarray]:
    """Return sum / weight of every metric on the host; NaN where nothing was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            # Dividing arrays without dimensions gives NumPy scalars.
            name: np.asarray(np.asarray(total, np.float64) / np.asarray(weight, np.float64))
            for name, (total, weight) in metrics.items()
        }
