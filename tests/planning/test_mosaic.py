"""The reader of kernel dumps, on a tiny kernel compiled in a child process."""

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.planning import mosaic

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")


def case(size):
    """A matmul kernel of one block, named."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    def product(x, y):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((size, size), jnp.float32),
            name="tiny_product",
            cost_estimate=pl.CostEstimate(
                flops=2 * size**3, bytes_accessed=8 * size**2, transcendentals=0
            ),
        )(x, y)

    return product, [((size, size), "bfloat16")] * 2


def test_kernel_is_found_and_read():
    kernels, costs = mosaic.look("v5e", f"{__file__}:case", {"size": 256})
    assert [kernel.name.split(".")[0] for kernel in kernels] == ["tiny_product"]
    kernel = kernels[0]
    assert kernel.bundles == sum(region.bundles for region in kernel.regions)
    assert kernel.capacity["MXU"] == 4
    assert kernel.inner.used["MXU"] > 0
    assert 0.1 < kernel.inner.occupancy <= 1
    assert costs["flops"] == 2 * 256**3
    assert kernel.to_json()["inner"]["bundles"] == kernel.inner.bundles


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(JaxherdError, match="no dump of a Pallas kernel"):
        mosaic.read_kernels(tmp_path)
    with pytest.raises(JaxherdError, match="No TPU compiler for 'v9'"):
        mosaic.look("v9", f"{__file__}:case")
    with pytest.raises(JaxherdError, match="did not compile for v5e"):
        mosaic.look("v5e", f"{__file__}:absent")
