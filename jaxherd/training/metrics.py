"""Metrics are (sum, weight) pairs, so that they add up over microbatches, devices and hosts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.modules import Tree, flatten, unflatten

Metrics = dict[str, tuple[jax.Array, jax.Array]]
_BUFFERS = "buffers/"


def pair(total: Any, weight: Any) -> tuple[jax.Array, jax.Array]:
    """Return a metric; both parts in float32."""
    return jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)


def add(a: Metrics, b: Metrics) -> Metrics:
    """Return the metrics of two disjoint batches taken together."""
    return jax.tree.map(jnp.add, a, b)


def taken(buffers: Tree, metrics: Metrics) -> tuple[Tree, Metrics]:
    """Return the buffers with the values of the metrics called `buffers/<path>`, and the others.

    Values are sum / weight, so that microbatches are averaged.
    """
    new = {k.removeprefix(_BUFFERS): v for k, v in metrics.items() if k.startswith(_BUFFERS)}
    if not new:
        return buffers, metrics
    flat = flatten(buffers)
    for path, (total, weight) in new.items():
        flat[path] = (total / weight).astype(flat[path].dtype)
    return unflatten(flat), {k: v for k, v in metrics.items() if not k.startswith(_BUFFERS)}


def means(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, np.ndarray]:
    """Return sum / weight of every metric on the host; one of which nothing was counted is left out.

    Nothing was counted where sum and weight are zero.  Such entries of an array that has others are
    NaN, and so is whatever is no number: a sum that is none is told even if its weight is zero.
    """
    found = {}
    for name, (total, weight) in metrics.items():
        total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
        if not total.any() and not weight.any():
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            # Dividing arrays without dimensions gives NumPy scalars.
            found[name] = np.asarray(total / weight)
    return found
