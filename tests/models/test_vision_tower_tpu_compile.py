"""The released vision tower, compiled for one TPU chip: an image of 16 tiles and its whole."""

import jax
import jax.numpy as jnp
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.modules import abstract, cast_floating
from jaxherd.core.sharding import Partitioner
from jaxherd.models.vision_tower import VisionTowerConfig
from jaxherd.planning.mosaic import TOPOLOGIES

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")


@pytest.mark.tpu_compile_full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_the_released_tower_compiles_and_fits(chip):
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    partitioner = Partitioner.create(Layout("one"), devices[:1])
    config = VisionTowerConfig()

    def build():
        tower = cast_floating(config.build(jax.random.key(0)), jnp.bfloat16)
        return tower, jnp.zeros((17, 336, 336, 3), jnp.float32)

    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=partitioner.replicated()),
        abstract(build),
    )
    with partitioner.activate():
        executable = jax.jit(lambda tower, tiles: tower(tiles)).lower(*given).compile()
    memory = executable.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    # 851M parameters of 2 bytes, and what the compiler lays beside them (most on tpu7x, 2.4 GiB).
    assert 2 * config.num_params() < held < 2 * config.num_params() + 3 * 2**30
