"""A linear map whose weights are quantised."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.kernels import quantize
from jaxherd.layers.linear import Linear, matmul


def test_a_linear_map_holds_a_quantised_matrix():
    layer = Linear(64, 24, ("embed", "mlp"), key=jax.random.key(0), bias=True)
    x = jax.random.normal(jax.random.key(1), (2, 3, 64))
    code = quantize(layer.kernel[...], bits=4, group=32, packed=True)
    wanted = x @ code.dequantize() + layer.bias[...]
    np.testing.assert_allclose(matmul(x, code) + layer.bias[...], wanted, rtol=1e-5, atol=1e-5)
    layer.kernel.set_value(code)
    found, gradient = jax.jit(jax.value_and_grad(lambda x: layer(x).sum()))(x)
    np.testing.assert_allclose(found, wanted.sum(), rtol=1e-4)
    np.testing.assert_allclose(
        gradient, jnp.broadcast_to(code.dequantize().sum(axis=1), x.shape), rtol=1e-4, atol=1e-5
    )
