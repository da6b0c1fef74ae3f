"""The grouped kernels compiled by Mosaic for four generations of TPU, at the models' shapes."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels import QuantizedMatrix, grouped_matmul, grouped_swiglu
from jaxherd.kernels.grouped_matmul.arg_specs import ARG_SPECS, ArgSpec
from jaxherd.planning.mosaic import TOPOLOGIES

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")

# One of each kind of kernel in the default suite, spread over the generations.
QUICK = [
    ("v5p", "scout_expert_parallel"),
    ("v5e", "scout_decode_int4"),
    ("v5e", "odd_bfloat16"),
    ("v6e", "maverick_decode_fp8"),
    ("tpu7x", "scout_train_down"),
]


def abstract(spec: ArgSpec):
    """Return the arguments of a spec: x, weights, sizes, and the score of a swiglu."""
    shape = (spec.groups, spec.inner, spec.columns)
    if spec.code is None:
        w = jax.ShapeDtypeStruct(shape, spec.dtype)
    else:
        packed = spec.code == "packed_int4"
        stored = (shape[0], shape[1] // 2, shape[2]) if packed else shape
        scales = (shape[0], shape[1] // (spec.group or shape[1]), shape[2])
        w = QuantizedMatrix(
            jax.ShapeDtypeStruct(stored, "int8" if packed else spec.code),
            jax.ShapeDtypeStruct(scales, jnp.float32),
            packed=packed,
        )
    x = jax.ShapeDtypeStruct((spec.rows, spec.inner), spec.dtype)
    sizes = jax.ShapeDtypeStruct((spec.groups,), jnp.int32)
    if spec.form == "matmul":
        return x, w, sizes
    return x, w, w, sizes, jax.ShapeDtypeStruct((spec.rows,), spec.dtype)


def compiled(chip: str, spec: ArgSpec) -> str:
    """Return the HLO of the call, with its gradients where the spec is trained."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[
        :1
    ]
    partitioner = Partitioner.create(Layout("one"), devices)

    def call(*arguments):
        if spec.form == "matmul":
            return grouped_matmul(*arguments, implementation="pallas_tpu")
        *rest, score = arguments
        return grouped_swiglu(*rest, row_scale_M=score, implementation="pallas_tpu")

    def run(*arguments):
        with partitioner.activate():
            if not spec.trained:
                return call(*arguments)
            chosen = (0, 1) if spec.form == "matmul" else (0, 1, 2, 4)
            return jax.grad(lambda *a: call(*a).astype(jnp.float32).sum(), chosen)(*arguments)

    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=partitioner.replicated()),
        abstract(spec),
    )
    return jax.jit(run).lower(*arguments).compile().as_text()


def check(chip, name):
    spec = ARG_SPECS[name]
    text = compiled(chip, spec)
    calls = re.findall(r"%(\w+)[.\d]* = .*custom_call_target=\"tpu_custom_call\"", text)
    # XLA adds what made them, as in `transpose_jvp_grouped_matmul__`.
    kernels = [re.search(r"grouped_[a-z]+(_dw)?", call)[0] for call in calls]
    if spec.trained and spec.form == "swiglu":
        # The gradient computes gate and up again, then dx and dw of each.
        wanted = ["grouped_matmul"] * 4 + ["grouped_matmul_dw"] * 2
    elif spec.trained:
        wanted = ["grouped_matmul", "grouped_matmul_dw"]
    else:
        wanted = ["grouped_swiglu" if spec.form == "swiglu" else "grouped_matmul"]
    assert sorted(kernels) == wanted


@pytest.mark.parametrize("chip, name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_compiles(chip, name):
    check(chip, name)


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("name", ARG_SPECS)
@pytest.mark.filterwarnings("ignore")
def test_every_spec_compiles(chip, name):
    check(chip, name)


@pytest.mark.filterwarnings("ignore")
def test_forward_swiglu_of_training_compiles():
    """The gradient's program drops the fused forward: here it is alone."""
    import dataclasses

    spec = dataclasses.replace(ARG_SPECS["scout_train_swiglu"], trained=False)
    assert compiled("v5p", spec).count('custom_call_target="tpu_custom_call"') == 1
