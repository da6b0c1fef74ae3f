"""Quantised weights: error bounds of the code, and both implementations against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels import quantize, quantized_matmul

CASES = [
    (bits, group, symmetric) for bits in (4, 8) for group in (None, 32) for symmetric in (1, 0)
]


def draw(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("bits, group, symmetric", CASES)
def test_code_is_within_half_a_step(bits, group, symmetric):
    w = draw(0, (64, 24)).at[:, 3].set(0.0)
    code = quantize(w, bits=bits, group=group, symmetric=bool(symmetric))
    steps = jnp.repeat(code.scales, 64 // code.scales.shape[0], axis=0)
    # A rounded zero point may cost another half step at the ends of the range.
    bound = (0.501 if symmetric else 1.001) * steps
    assert bool((jnp.abs(code.dequantize() - w) <= bound).all())
    assert code.values.dtype == (jnp.int4 if bits == 4 else jnp.int8)
    np.testing.assert_array_equal(code.dequantize()[:, 3], 0)


@pytest.mark.parametrize("bits, group, symmetric", CASES)
def test_xla_is_the_reference(bits, group, symmetric):
    code = quantize(draw(1, (96, 40)), bits=bits, group=group, symmetric=bool(symmetric))
    x = draw(2, (7, 96))
    wanted = quantized_matmul(x, code, implementation="reference")
    np.testing.assert_allclose(quantized_matmul(x, code), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(wanted, x @ code.dequantize(), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: (quantized_matmul(x, code) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, 2 * wanted @ code.dequantize().T, rtol=1e-4, atol=1e-4)
    half = quantized_matmul(x.astype(jnp.bfloat16), code)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), wanted, rtol=0.1, atol=0.3)


def test_what_is_wrong_is_told():
    code = quantize(draw(3, (64, 8)))
    with pytest.raises(JaxherdError, match="K = 5"):
        quantized_matmul(draw(4, (2, 5)), code)
    with pytest.raises(JaxherdError, match="did you mean 'xla'"):
        quantized_matmul(draw(4, (2, 64)), code, implementation="xlaa")
    with pytest.raises(JaxherdError, match="does not divide"):
        quantize(draw(5, (64, 8)), group=48)
    with pytest.raises(JaxherdError, match="4 or 8"):
        quantize(draw(5, (64, 8)), bits=3)
