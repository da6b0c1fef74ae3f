"""Splash attention and megablox, compiled by Mosaic for four generations of TPU, without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels import attention, grouped_matmul
from jaxherd.kernels.attention import AttentionMask

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")

SLICES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def compiled(slice_name: str, loss, *shapes) -> str:
    """Return the HLO of the gradient of `loss` on one device of the slice."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=slice_name).devices
    partitioner = Partitioner.create(Layout("one"), devices[:1])
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.replicated())
        for shape, dtype in shapes
    ]

    def run(*arrays):
        with partitioner.activate():
            return jax.grad(loss, (0, 1))(*arrays)

    return jax.jit(run).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("slice_name", SLICES)
@pytest.mark.filterwarnings("ignore")
def test_kernels_compile(slice_name):
    """One program with both kernels, forward and backward: chosen by platform, not by name."""

    def loss(x, w, sizes, segments):
        y = grouped_matmul(x, w, sizes)
        q = y.reshape(1, 256, 4, 128)
        positions = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32), (1, 256))
        mask = AttentionMask(
            positions, positions, segments, segments, kind="chunked", size=128, self_attention=True
        )
        return attention(q, q[:, :, :2], q[:, :, 2:], mask=mask).astype(jnp.float32).sum()

    text = compiled(
        slice_name,
        loss,
        ((256, 256), jnp.bfloat16),
        ((4, 256, 512), jnp.bfloat16),
        ((4,), np.int32),
        ((1, 256), np.int32),
    )
    # gmm, its two gradients; splash and its gradient.
    assert text.count('custom_call_target="tpu_custom_call"') >= 5
