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


def compile_for(chip: str, function, arguments) -> str:
    """Return the HLO of the function for one device of a chip."""
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


def kernels_of(text: str) -> list[str]:
    calls = re.findall(r"%(\w+)[.\d]* = .*custom_call_target=\"tpu_custom_call\"", text)
    # XLA adds what made them, as in `transpose_jvp_grouped_matmul__`.
    return [re.search(r"grouped_[a-z]+(_dw|_products)?", call)[0] for call in calls]


def compiled(chip: str, spec: ArgSpec) -> str:
    """Return the HLO of the call, with its gradients where the spec is trained."""

    def call(*arguments):
        if spec.form == "matmul":
            return grouped_matmul(*arguments, implementation="pallas_tpu")
        *rest, score = arguments
        return grouped_swiglu(*rest, row_scale_M=score, implementation="pallas_tpu")

    def run(*arguments):
        if not spec.trained:
            return call(*arguments)
        chosen = (0, 1) if spec.form == "matmul" else (0, 1, 2, 4)
        return jax.grad(lambda *a: call(*a).astype(jnp.float32).sum(), chosen)(*arguments)

    return compile_for(chip, run, abstract(spec))


def check(chip, name):
    spec = ARG_SPECS[name]
    kernels = kernels_of(compiled(chip, spec))
    if spec.trained and spec.form == "swiglu":
        # Gate and up in one pass that keeps both products, then dx and dw of each.
        wanted = ["grouped_swiglu_products"] + ["grouped_matmul", "grouped_matmul_dw"] * 2
    elif spec.trained:
        wanted = ["grouped_matmul", "grouped_matmul_dw"]
    else:
        wanted = ["grouped_swiglu" if spec.form == "swiglu" else "grouped_matmul"]
    assert sorted(kernels) == sorted(wanted)


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
    """The gradient's program keeps the two products: here is the kernel that writes h alone."""
    import dataclasses

    spec = dataclasses.replace(ARG_SPECS["scout_train_swiglu"], trained=False)
    assert compiled("v5p", spec).count('custom_call_target="tpu_custom_call"') == 1


def check_remat(chip, spec):
    """Experts computed again for their gradient."""
    x, gate, up, sizes, score = abstract(spec)
    down = jax.ShapeDtypeStruct((spec.groups, spec.columns, spec.inner), spec.dtype)

    @jax.checkpoint
    def experts(x, gate, up, down, score, sizes):
        hidden = grouped_swiglu(
            x, gate, up, sizes, row_scale_M=score, implementation="pallas_tpu"
        )  # fmt: skip
        return grouped_matmul(hidden, down, sizes, implementation="pallas_tpu")

    def loss(*arguments):
        return (experts(*arguments).astype(jnp.float32) ** 2).sum()

    step = jax.value_and_grad(loss, (0, 1, 2, 3, 4))
    kernels = kernels_of(compile_for(chip, step, (x, gate, up, down, score, sizes)))
    assert sorted(kernels) == [
        *["grouped_matmul"] * 4,  # down, its dx, those of gate and up
        *["grouped_matmul_dw"] * 3,
        "grouped_swiglu",  # the first run keeps no product
        "grouped_swiglu_products",
    ]
    # Six of them are the gradient's, five forward: three, and gate and up once more.
    assert sum(2 if "swiglu" in kernel else 1 for kernel in kernels) == 11


@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_experts_under_remat_makes_eleven_products():
    check_remat("v5e", ARG_SPECS["small_float32"])


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_experts_under_remat_compiles(chip):
    """At the shape of Scout's training step."""
    check_remat(chip, ARG_SPECS["scout_train_swiglu"])
