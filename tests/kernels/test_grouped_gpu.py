"""The Triton kernels compiled for an H100 that is not here, values and gradients (jax[cuda12])."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxherd.core.targets import abstract_devices, parse_target
from jaxherd.kernels.grouped_matmul import pallas_gpu


@pytest.mark.gpu_compile
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(8192, 5120, 8192, 16), (300, 1000, 1320, 8)])
def test_compiles_for_h100(shape, dtype):
    rows, inner, columns, groups = shape
    device = abstract_devices(parse_target("h100:1"))[0]
    place = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())

    def gradients(x, w, sizes):
        def loss(x, w):
            return pallas_gpu.grouped_matmul(x, w, sizes, False).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1))(x, w)

    arguments = [
        jax.ShapeDtypeStruct(s, d, sharding=place)
        for s, d in (
            ((rows, inner), dtype),
            ((groups, inner, columns), dtype),
            ((groups,), "int32"),
        )
    ]
    text = jax.jit(gradients).lower(*arguments).compile().as_text()
    # Forward, dx and dw; none falls back to a loop of XLA.
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
