"""HBM of a compiled program, by the compiler's buffer assignment."""

import jax
import jax.numpy as jnp
import pytest

from jaxherd.core.targets import abstract_devices, parse_target
from jaxherd.planning.memory import compile_measured, hbm_bytes

REPORT = """Memory Space: default (color=0)
Total bytes: 1879048224 (1.75GiB)
  cumulative_size;       size

Memory Space: vmem (color=1)
Total bytes: 66998272 (63.89MiB)
"""


def test_the_report_is_read():
    assert hbm_bytes(REPORT) == 1879048224
    assert hbm_bytes("nothing of the kind") is None


@pytest.mark.parametrize("donated", [False, True])
def test_a_program_of_known_size(donated):
    """1 MiB in, 1 MiB out, and one temporary of 4 MiB between two products."""
    pytest.importorskip("libtpu")
    device = abstract_devices(parse_target("v5e:2x2"))[0]
    here = jax.sharding.SingleDeviceSharding(device)

    def run(x):
        wide = jnp.tanh(x @ jnp.ones((256, 4096), x.dtype))
        return jnp.sort(wide, axis=0) @ jnp.ones((4096, 256), x.dtype)

    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=here)
    lowered = jax.jit(run, donate_argnums=(0,) if donated else ()).lower(x)
    compiled, held = compile_measured(lowered, {})
    assert held is not None
    least = compiled.memory_analysis().argument_size_in_bytes * (1 if donated else 2)
    assert least == (1 if donated else 2) * 2**20
    assert least <= held <= least + 3 * 16 * 2**20
