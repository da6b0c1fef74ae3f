"""A model whose blocks run twice equals an unshared one with the blocks copied in order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.modules import flatten, split, unflatten
from jaxherd.models import presets

BLOCKS, REPEATS = 3, 2
ORDERS = {
    "immediate": [0, 0, 1, 1, 2, 2],
    "all_over": [0, 1, 2, 0, 1, 2],
    "reverse": [0, 1, 2, 2, 1, 0],
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 19, (2, 9)), jnp.int32)


def pair(order):
    shared = presets.llama(
        vocab_size=19, embed_dim=12, num_layers=BLOCKS, num_heads=3, num_kv_heads=1,
        hidden_dim=16, repeats=REPEATS, repeat_order=order, init_std=0.3,
    )  # fmt: skip
    copied = dataclasses.replace(
        shared, repeats=1, repeat_order="immediate", layers=shared.layers * REPEATS
    )
    return shared.build(jax.random.key(3)), copied


def copy(params, order):
    return unflatten(
        {
            name: value[np.array(ORDERS[order])] if name.startswith("segments/") else value
            for name, value in flatten(params).items()
        }
    )


@pytest.mark.parametrize("order", ORDERS)
def test_logits_gradients_and_cache(order):
    shared, copied = pair(order)
    definition, params, _ = split(shared)
    other, _, _ = split(copied.build(jax.random.key(0)))

    def loss(definition, params):
        logits = definition.merge(params)(TOKENS)
        return (jax.nn.log_softmax(logits)[..., 3]).sum(), logits

    grad = functools.partial(jax.value_and_grad, has_aux=True)
    run = {"compiler_options": QUICK}
    (_, logits), grads = jax.jit(grad(lambda p: loss(definition, p)), **run)(params)
    (_, wanted), wide = jax.jit(grad(lambda p: loss(other, p)), **run)(copy(params, order))
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    uses = np.array(ORDERS[order])
    for name, value in flatten(grads).items():
        expected = flatten(wide)[name]
        if name.startswith("segments/"):
            expected = np.stack([np.asarray(expected)[uses == b].sum(0) for b in range(BLOCKS)])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4, err_msg=name)

    @functools.partial(jax.jit, **run)
    def step(module, cache, tokens, positions):
        out = module.forward(tokens, positions=positions, cache=cache)
        return out.cache, module.unembed(out.hidden_BTD)

    cache, found = shared.init_cache(2, 9), []
    for at in range(9):
        positions = jnp.full((2, 1), at, jnp.int32)
        cache, out = step(shared, cache, TOKENS[:, at : at + 1], positions)
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found, 1), logits, atol=1e-5)
    assert len(jax.tree.leaves(cache)) == 3 * REPEATS
