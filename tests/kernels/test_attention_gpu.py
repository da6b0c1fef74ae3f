"""The Triton attention compiled for an H100 that is not here, values and gradients (jax[cuda12])."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxherd.core.targets import abstract_devices, parse_target
from jaxherd.kernels import AttentionMask, attention


@pytest.mark.gpu_compile
@pytest.mark.parametrize(
    "kind, heads, head_dim", [("causal", (40, 8), 128), ("chunked", (20, 4), 64)]
)
def test_compiles_for_h100(kind, heads, head_dim):
    device = abstract_devices(parse_target("h100:1"))[0]
    place = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())

    def gradients(q, k, v, p, s):
        mask = AttentionMask(p, p, s, s, kind=kind, size=1024, self_attention=True)

        def loss(q, k, v):
            out = attention(q, k, v, mask=mask, implementation="pallas_gpu")
            return out.astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    keys = array(1, 2048, heads[1], head_dim)
    tokens = array(1, 2048, dtype="int32")
    text = (
        jax.jit(gradients)
        .lower(array(1, 2048, heads[0], head_dim), keys, keys, tokens, tokens)
        .compile()
        .as_text()
    )
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') >= 2
