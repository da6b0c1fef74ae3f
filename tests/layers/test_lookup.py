"""Reading a table split over devices: values and gradients as on one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.layers.lookup import lookup

LAYOUTS = {
    "fsdp": Layout("fsdp", fsdp=8),
    "all_three": Layout("mixed", fsdp=2, expert=2, sequence=2),
    "with_data": Layout("mixed", data=2, fsdp=4),
    "split_vocabulary": Layout("mixed", fsdp=4, tensor=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 6), (3, 5)], ids=["divides", "does not divide"])
def test_as_on_one_device(name, shape, devices):
    partitioner = Partitioner.create(LAYOUTS[name], devices)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(10, 16)), jnp.float32)
    tokens = jnp.asarray(rng.integers(10, size=shape), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(*shape, 16)), jnp.float32)

    def loss(table):
        x = lookup(table, tokens)
        return (x * weights).sum(), x

    @jax.jit
    def run(table):
        with partitioner.activate():
            return jax.value_and_grad(loss, has_aux=True)(table)

    placed = jax.device_put(table, partitioner.sharding(("vocab", "embed")))
    (_, x), gradient = run(placed)
    (_, wanted), wanted_gradient = jax.value_and_grad(loss, has_aux=True)(table)
    np.testing.assert_array_equal(x, wanted)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-6, atol=1e-6)


def test_only_activations_travel(devices):
    """The gradient of the table is not summed whole: no collective is as large as the table."""
    partitioner = Partitioner.create(LAYOUTS["fsdp"], devices)
    table = jax.ShapeDtypeStruct((4096, 64), jnp.float32,
                                 sharding=partitioner.sharding(("vocab", "embed")))  # fmt: skip
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32,
                                  sharding=partitioner.sharding(("batch", "length")))  # fmt: skip

    def run(table, tokens):
        with partitioner.activate():
            return jax.grad(lambda t: jnp.square(lookup(t, tokens)).sum())(table)

    text = jax.jit(run, out_shardings=table.sharding).lower(table, tokens).compile().as_text()
    assert "all-to-all" in text
    # Sums over groups of one device move nothing.
    assert not re.search(r"all-reduce\(.*replica_groups=\{\{\d+,", text)


def test_a_frequent_token_does_not_stop_growing(devices):
    """A thousand equal rows of ones add up, in bfloat16 too, where 256 + 1 is 256."""
    partitioner = Partitioner.create(LAYOUTS["fsdp"], devices)
    table = jnp.zeros((4, 16), jnp.bfloat16)
    tokens = jnp.zeros((8, 128), jnp.int32)

    @jax.jit
    def gradient(table):
        with partitioner.activate():
            return jax.grad(lambda t: lookup(t, tokens).astype(jnp.float32).sum())(table)

    placed = jax.device_put(table, partitioner.sharding(("vocab", "embed")))
    np.testing.assert_array_equal(np.asarray(gradient(placed), np.float32)[0], 1024.0)
