"""The kernels at the models' own sizes, compiled by Mosaic for four TPUs and by Triton for H100."""

import jax
import jax.numpy as jnp
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.core.targets import abstract_devices, parse_target
from jaxherd.kernels import quantized_matmul
from jaxherd.kernels.quantized_matmul.arg_specs import ARG_SPECS, ArgSpec
from jaxherd.planning.hlo import parse_hlo

SLICES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
# Groups, fp8, float16 scales, int8; all entries on all chips under `tpu_compile_full`.
CHEAP = (
    "scout_int4_up_decode_16",
    "maverick_fp8_up_decode_64",
    "gguf_q4_0_decode_1",
    "int8_asymmetric_int8_decode_8",
)


def compiled(partitioner: Partitioner, names, dtype=jnp.bfloat16, implementation=None):
    """Compile the products of these entries, and the gradients of x where there is one."""
    specs = [ARG_SPECS[name] for name in names]
    operands = [spec.abstract(dtype) for spec in specs]
    operands = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=partitioner.replicated()),
        operands,
    )

    def one(spec: ArgSpec, x, w):
        def call(x):
            return quantized_matmul(
                x, w, activations=spec.activations, implementation=implementation
            )

        if spec.activations is not None:
            return call(x)
        y, back = jax.vjp(call, x)
        return y, *back(y)

    def run(operands):
        with partitioner.activate():
            return [one(spec, *pair) for spec, pair in zip(specs, operands)]

    program = jax.jit(run).lower(operands).compile()
    kernels = sum(1 if spec.activations else 2 for spec in specs)
    return program, kernels


def tpu(slice_name: str) -> Partitioner:
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")
    return Partitioner.create(Layout("one"), abstract_devices(parse_target(slice_name))[:1])


@pytest.mark.parametrize("slice_name", SLICES)
@pytest.mark.filterwarnings("ignore")
def test_mosaic(slice_name):
    """Chosen by platform, not by name; one kernel a product and one a gradient."""
    program, kernels = compiled(tpu(slice_name), CHEAP)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == kernels


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", ARG_SPECS)
@pytest.mark.parametrize("slice_name", SLICES)
@pytest.mark.filterwarnings("ignore")
def test_mosaic_compiles_everything(slice_name, name, dtype):
    program, kernels = compiled(tpu(slice_name), [name], dtype)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == kernels


@pytest.mark.filterwarnings("ignore")
def test_the_compiler_is_told_true_bytes():
    """A decode step's bytes: the packed weights once, scales, x and y; far below bfloat16's."""
    spec = ARG_SPECS["pro_channel_up_decode_8"]
    partitioner = tpu("v5e:2x2")
    x, w = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=partitioner.replicated()),
        spec.abstract(),
    )

    def run(x, w):
        with partitioner.activate():
            return quantized_matmul(x, w)

    cost = jax.jit(run).lower(x, w).compile().cost_analysis()
    assert cost["flops"] == 2 * spec.rows * spec.inner * spec.columns
    wanted = w.nbytes + 2 * spec.rows * (spec.inner + spec.columns)
    assert cost["bytes accessed"] == pytest.approx(wanted, rel=1e-3)
    assert cost["bytes accessed"] <= 0.35 * 2 * spec.inner * spec.columns


@pytest.mark.gpu_compile
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", [n for n, s in ARG_SPECS.items() if s.code != "int4" or s.packed])
def test_triton(name, dtype):
    partitioner = Partitioner.create(Layout("one"), abstract_devices(parse_target("h100:1")))
    program, kernels = compiled(partitioner, [name], dtype, "pallas_gpu")
    text = program.as_text()
    assert text.count("__gpu$xla.gpu.triton") + text.count("triton_kernel_call") >= kernels, text
    # The codes are decoded inside of the kernels: nothing else in the program reads them.
    module = parse_hlo(text)
    entry = module.computations[module.entry]
    codes = ARG_SPECS[name].abstract(dtype)[1].values
    stored = {
        i.name for i in entry.instructions
        if i.opcode == "parameter" and i.shapes[0].dims == codes.shape and i.bytes == codes.size
    }  # fmt: skip
    readers = [i for i in entry.instructions if stored & set(i.operands)]
    assert len(stored) == 1 and len(readers) == kernels
    assert {i.opcode for i in readers} == {"custom-call"}
