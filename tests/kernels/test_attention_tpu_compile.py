"""Attention compiled by Mosaic for four generations of TPU, at the models' shapes."""

import re

import jax
import pytest
from programs import attention_program

from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels.attention.arg_specs import ARG_SPECS
from jaxherd.planning.mosaic import TOPOLOGIES

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")

# One of each kind of program in the default suite, spread over the generations.
QUICK = [
    ("v5p", "llama4_train_chunked"),
    ("v5e", "mobilellm_pro_packed"),
    ("v6e", "llama4_prefill"),
    ("v5p", "llama4_prefill_chunked"),
    ("tpu7x", "llama4_vision"),
    ("v5e", "head_72"),
    ("v6e", "velocity_slot"),
]


def compiled(chip: str, function, arguments) -> str:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    partitioner = Partitioner.create(Layout("one"), devices[:1])

    def run(*given):
        with partitioner.activate():
            return function(*given)

    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=partitioner.replicated()),
        arguments,
    )
    return jax.jit(run).lower(*placed).compile().as_text()


def check(chip, name):
    spec = ARG_SPECS[name]
    text = compiled(chip, *attention_program(spec, "splash"))
    calls = re.findall(r"%([\w.]+) = .*custom_call_target=\"tpu_custom_call\"", text)
    passes = {re.search(r"_(fwd|dq|dkv)_", call)[1] for call in calls}
    wanted = {"fwd"}
    if spec.trained:
        # Whole rows of chunks become short rows of their own.
        blocks = (spec.size if spec.kind == "chunked" and not spec.packed else spec.length) / 1024
        wanted |= {"dkv"} if blocks <= 8 else {"dkv", "dq"}
    assert passes == wanted


@pytest.mark.parametrize("chip, name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_compiles(chip, name):
    check(chip, name)


@pytest.mark.parametrize(
    "name, kernels",
    [("velocity_slot", 2), ("velocity_cross", 0), ("velocity_padded", 2), ("odd_float32", 2)],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_taken_by_default(name, kernels):
    """Forward and gradient, where blocks of 128 hold little padding; traced, not compiled."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    run, arguments = attention_program(ARG_SPECS[name], None)
    with Partitioner.create(Layout("one"), devices[:1]).activate():
        program = str(jax.jit(run).trace(*arguments).jaxpr)
    assert program.count("pallas_call[") == kernels


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("name", ARG_SPECS)
@pytest.mark.filterwarnings("ignore")
def test_every_spec_compiles(chip, name):
    check(chip, name)
