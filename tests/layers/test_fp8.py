"""Products rounded to eight bits: how far off they may be, their gradients, and where they apply."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.matmul_format import matmul_format
from jaxherd.core.modules import split
from jaxherd.layers import fp8
from jaxherd.layers.linear import matmul
from jaxherd.layers.moe import _swiglu_experts
from jaxherd.models import presets


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dtype, most", [(fp8.FORWARD, 1 / 16), (fp8.GRADIENT, 1 / 8)])
def test_values_are_off_by_half_a_step_of_the_format(dtype, most):
    x = draw(64, 32) * jnp.logspace(-20, 20, 64)[:, None]
    found = fp8.rounded(x, -1, dtype)
    large = jnp.abs(x) > jnp.abs(x).max(axis=-1, keepdims=True) / 64
    assert float(jnp.where(large, jnp.abs(found / x - 1), 0.0).max()) <= most * 1.001
    np.testing.assert_allclose(jnp.abs(found).max(axis=-1), jnp.abs(x).max(axis=-1), rtol=1e-6)


def test_zeros_stay_and_what_is_not_finite_is_seen():
    assert not fp8.rounded(jnp.zeros((2, 4)), -1).any()
    assert jnp.isnan(fp8.rounded(jnp.asarray([[1.0, jnp.nan]]), -1)).any()


def test_a_product_and_its_gradients():
    x, w, dy = draw(5, 24), draw(24, 7, seed=1), draw(5, 7, seed=2)
    with matmul_format("fp8"):
        y, pull = jax.vjp(matmul, x, w)
        dx, dw = pull(dy)
    q, r = fp8.rounded(x, -1), fp8.rounded(w, 0)
    g = fp8.rounded(dy, -1, fp8.GRADIENT)
    np.testing.assert_allclose(y, q @ r, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ r.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, q.T @ g, rtol=1e-5, atol=1e-5)
    assert not np.allclose(y, x @ w, rtol=1e-4)


def test_a_whole_model_is_near_and_its_head_is_not_rounded():
    # Without routers: a rounded input may choose another expert, which is no small difference.
    config = presets.llama4_text(
        vocab_size=61, embed_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
        dense_dim=48, moe_layers=(), chunk_size=8, max_length=64, init_std=0.1,
    )  # fmt: skip
    definition, params, buffers = split(config.build(jax.random.key(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 16)), jnp.int32)

    def loss(params):
        logits = definition.merge(params, buffers)(tokens)
        return -jax.nn.log_softmax(logits)[..., 0].mean(), logits

    plain, logits = jax.grad(loss, has_aux=True)(params)
    with matmul_format("fp8"):
        eight, near = jax.grad(loss, has_aux=True)(params)
        hidden = draw(3, 32)
        head = definition.merge(params, buffers).unembed(hidden)
    assert 1e-3 < float(jnp.abs(near - logits).max() / jnp.abs(logits).max()) < 0.2
    chex.assert_trees_all_close(head, definition.merge(params, buffers).unembed(hidden))
    alike = [
        float((a * b).sum() / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(eight))
    ]
    assert min(alike) > 0.9, alike


def test_experts_are_rounded_too():
    rows, sizes = draw(6, 16), jnp.asarray([2, 4], jnp.int32)
    weights = (draw(2, 16, 8, seed=1), draw(2, 16, 8, seed=2), draw(2, 8, 16, seed=3))
    with matmul_format("fp8"):
        found = _swiglu_experts("reference", rows, sizes, weights)
    gate, up, down = (fp8.rounded(w, 1) for w in weights)
    parts = []
    for expert, part in enumerate(jnp.split(fp8.rounded(rows, -1), [2])):
        hidden = jax.nn.silu(part @ gate[expert]) * (part @ up[expert])
        parts.append(fp8.rounded(hidden, -1) @ down[expert])
    np.testing.assert_allclose(found, jnp.concatenate(parts), rtol=1e-4, atol=1e-4)


def test_an_unknown_format_is_refused():
    with pytest.raises(JaxherdError, match="fp8"), matmul_format("fp7"):
        pass
