"""The Triton paged attention compiled for an H100 that is not here (jax[cuda12])."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from programs import paged_program

from jaxherd.core.targets import abstract_devices, parse_target
from jaxherd.kernels.paged_attention.arg_specs import ARG_SPECS


@pytest.mark.gpu_compile
@pytest.mark.parametrize("name", ARG_SPECS)
def test_compiles_for_h100(name):
    device = abstract_devices(parse_target("h100:1"))[0]
    place = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    run, arguments = paged_program(ARG_SPECS[name], "pallas_gpu")
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments
    )
    text = jax.jit(run).lower(*placed).compile().as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1
