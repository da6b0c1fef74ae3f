"""Routed experts in few bits: kernels, rounded activations, the score on the input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from jaxherd.kernels.quantized_matmul import quantize, quantize_rows
from jaxherd.layers.moe import Moe, MoeConfig, route
from jaxherd.layers.weight_format import WeightFormat, use_formats

ROWS, INNER, COLUMNS, GROUPS = 24, 128, 128, 3
SIZES = jnp.asarray([9, 0, 11])  # the last four rows belong to nobody
FP8 = WeightFormat("float8_e4m3fn", activations="float8_e4m3fn")


def fp8(key: int):
    w = jax.random.normal(jax.random.key(key), (GROUPS, INNER, COLUMNS))
    return FP8.quantise(w)


def rows():
    x = jax.random.normal(jax.random.key(0), (ROWS, INNER))
    # A row beyond the bound of 1200 saturates, one of the tail is no number.
    return x.at[2, 5].set(3000.0).at[-1].set(jnp.nan)


def rounded(x):
    codes, scales = quantize_rows(x, "float8_e4m3fn", upper_bound=1200.0)
    return codes.astype(jnp.float32) * scales


def by_hand(x, w):
    group = np.repeat(np.arange(GROUPS), SIZES)
    numbers = w.dequantize()
    y = [rounded(x[i : i + 1])[0] @ numbers[g] for i, g in enumerate(group)]
    return jnp.concatenate([jnp.stack(y), jnp.zeros((ROWS - len(group), COLUMNS))])


@pytest.mark.parametrize("implementation", ["reference", "blocked", "pallas_tpu"])
def test_rows_are_rounded_as_the_code_asks(implementation):
    x, gate, up = rows(), fp8(1), fp8(2)
    options = dict(implementation=implementation, interpret=implementation == "pallas_tpu")
    found = grouped_matmul(x, gate, SIZES, **options)
    np.testing.assert_allclose(found, by_hand(x, gate), rtol=1e-4, atol=1e-3)
    score = jax.random.uniform(jax.random.key(3), (ROWS,))
    found = grouped_swiglu(x, gate, up, SIZES, row_scale_M=score, **options)
    u = x * score[:, None]
    wanted = jax.nn.silu(by_hand(u, gate)) * by_hand(u, up)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-2)
    assert not jnp.isnan(found).any()
    unrounded = grouped_swiglu(x, gate.dequantize(), up.dequantize(), SIZES, row_scale_M=score)
    assert float(jnp.abs(found - unrounded)[:20].max()) > 0.1


def test_rounded_rows_have_no_gradient():
    with pytest.raises(JaxherdError, match="rounded activations have no gradient"):
        jax.grad(lambda x: grouped_matmul(x, fp8(1), SIZES).sum())(rows())


def test_gate_and_up_are_rounded_alike():
    plain = quantize(jnp.ones((GROUPS, INNER, COLUMNS)), dtype="float8_e4m3fn")
    with pytest.raises(JaxherdError, match="differ in shape or kind"):
        grouped_swiglu(rows(), fp8(1), plain, SIZES)


def test_the_mixture_against_every_expert_by_hand():
    config = MoeConfig(4, 2, 64, 32)
    moe = Moe(config, 128, key=jax.random.key(0), std=0.3)
    use_formats(moe, tuple((name, FP8) for name in ("gate", "up", "down")))
    x = jax.random.normal(jax.random.key(1), (2, 3, 128))
    found, _ = jax.jit(lambda m, x: m(x))(moe, x)
    wanted = jax.jit(_by_hand)(moe, x)
    # A hidden value at the edge of two codes may fall to either side.
    np.testing.assert_allclose(found, wanted, atol=2e-2 * float(jnp.abs(wanted).max()))
    assert float(jnp.abs(found - wanted).mean()) < 1e-3 * float(jnp.abs(wanted).max())


def _by_hand(moe: Any, x):
    chosen, gates = route(jnp.einsum("BTD,DE->BTE", x, moe.router[...]), moe.config)
    gate, up, down = (w[...].dequantize() for w in (moe.gate, moe.up, moe.down))
    total = moe.shared(x)
    for k in range(moe.config.top_k):
        e = chosen[..., k]
        u = rounded(x * gates[..., k, None])  # the score comes first
        a, b = (jnp.einsum("BTD,BTDF->BTF", u, w[e]) for w in (gate, up))
        total += jnp.einsum("BTF,BTFD->BTD", rounded(jax.nn.silu(a) * b), down[e])
    return total
