"""Every implementation against the definition: values, gradients of x, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import Parity

from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels import QuantizedMatrix, quantize, quantized_matmul
from jaxherd.kernels.quantized_matmul import pallas_tpu
from jaxherd.kernels.quantized_matmul.arg_specs import ARG_SPECS, ArgSpec
from jaxherd.kernels.quantized_matmul.tiles import LIMITS, Tiles, choose, vmem_bytes

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")


def small(spec: ArgSpec) -> ArgSpec:
    """The same form at a size that interpretation on a CPU takes in its stride."""
    inner = 2 * (spec.group or 48)
    return spec.resized(min(spec.rows, 70), inner, 136 if spec.columns % 128 else 128)


def operands(spec: ArgSpec, dtype=jnp.float32, seed: int = 0):
    rng = np.random.default_rng(seed)
    w = spec.quantize(jnp.asarray(rng.normal(size=(spec.inner, spec.columns)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(spec.rows, spec.inner)), dtype)
    return x, w, jnp.asarray(rng.normal(size=(spec.rows, spec.columns)), dtype)


def product(spec: ArgSpec, implementation: str):
    return functools.partial(
        quantized_matmul, activations=spec.activations, implementation=implementation,
        interpret=implementation.startswith("pallas"),
    )  # fmt: skip


def compare(spec: ArgSpec, implementation: str, dtype, tolerance=None) -> None:
    if implementation == "pallas_gpu" and spec.code == "int4":
        spec = dataclasses.replace(spec, packed=True, inner=spec.inner + spec.inner % 2)
    x, w, _ = operands(spec, dtype)
    parity = Parity(functools.partial(quantized_matmul, activations=spec.activations), (0,))
    parity.check(
        implementation, (x, w), interpret=implementation.startswith("pallas"),
        gradients=spec.activations is None, tolerance=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
class TestParity:
    @pytest.mark.parametrize("name", ARG_SPECS)
    def test_arg_specs(self, implementation, dtype, name):
        compare(small(ARG_SPECS[name]), implementation, dtype)

    @settings(max_examples=8)  # each is a compilation of its own
    @given(
        rows=st.sampled_from([1, 3, 17]),
        columns=st.sampled_from([1, 130]),
        form=st.sampled_from(
            [("int4", None, False), ("int8", None, False), ("float8_e4m3fn", None, False),
             ("int4", 32, True), ("int4", 64, True), ("int8", 32, False), ("int4", 128, False)]
        ),
        symmetric=st.booleans(),
        odd=st.booleans(),
    )  # fmt: skip
    def test_shapes_that_divide_nothing(
        self, implementation, dtype, rows, columns, form, symmetric, odd
    ):
        code, group, packed = form
        inner = (group or 1) * (3 if group else 37 if odd else 130)
        symmetric = symmetric or code == "float8_e4m3fn"
        spec = ArgSpec(rows, inner, columns, code, group, packed, symmetric)
        # The largest of very few entries may itself have cancelled: weights rounded to bfloat16
        # then weigh more.  float32 keeps the strict bound.
        compare(spec, implementation, dtype, 0.1 if dtype == jnp.bfloat16 else None)


# Several steps on every axis, the last ones ragged, in both directions.
TILED = {
    "channel": (Tiles(8, 128, 128, 20, 320, 300), ArgSpec(20, 320, 300, "int4", packed=True)),
    "channel_zeros": (Tiles(8, 128, 128, 20, 320, 300), ArgSpec(20, 320, 300, "int8", None, False, False)),
    "groups": (Tiles(16, 256, 128, 20, 320, 300), ArgSpec(20, 320, 300, "int4", 32, True)),
    "groups_zeros": (Tiles(8, 128, 256, 20, 320, 300), ArgSpec(20, 320, 300, "int4", 64, True, False)),
    "float8": (Tiles(8, 128, 128, 20, 300, 300), ArgSpec(20, 300, 300, "float8_e4m3fn")),
    "int8_int8": (Tiles(8, 128, 128, 20, 300, 300), ArgSpec(20, 300, 300, "int8", activations="int8")),
    "int8_int8_zeros": (
        Tiles(8, 128, 128, 20, 300, 300),
        ArgSpec(20, 300, 300, "int8", symmetric=False, activations="int8"),
    ),
    "int4_groups_int8": (
        Tiles(8, 128, 128, 20, 320, 300),
        ArgSpec(20, 320, 300, "int4", 32, True, activations="int8"),
    ),
    "float8_float8": (
        Tiles(8, 128, 128, 20, 300, 300),
        ArgSpec(20, 300, 300, "float8_e4m3fn", activations="float8_e4m3fn"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TILED)
def test_many_ragged_steps(name):
    """What lies past the edges of the arrays (NaN in interpret mode) reaches no result."""
    tiles, spec = TILED[name]
    x, w, dy = operands(spec)
    wanted = product(spec, "reference")(x, w)
    scales = None
    if spec.activations is not None:
        from jaxherd.kernels.quantized_matmul.reference import activation_codes

        codes, scales = activation_codes(x, spec.activations)
    found = pallas_tpu.matmul(
        x if scales is None else codes, w, scales, chip="v5e", interpret=True, tiles=tiles,
        out_dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    if spec.activations is None:
        found = pallas_tpu.matmul(dy, w, chip="v5e", interpret=True, tiles=tiles, transposed=True)
        np.testing.assert_allclose(found, dy @ w.dequantize().T, rtol=1e-5, atol=1e-4)


def test_the_scale_of_a_float16_is_read_from_its_bits():
    """Subnormal and negative scales too."""
    from jaxherd.kernels.quantized_matmul.block import block_scales, scale_bits

    values = np.array([0.0, 1.0, -2.5, 6e-8, -5.96e-8, 6.1e-5, 65504.0, 3e-6], np.float16)
    found = block_scales(scale_bits(jnp.asarray(values)))
    np.testing.assert_array_equal(found, values.astype(np.float32))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_the_matrix_is_a_constant(implementation):
    x, w, _ = operands(ArgSpec(4, 64, 16, "int8"))
    gradient = jax.grad(
        lambda scales: product(ArgSpec(4, 64, 16, "int8"), implementation)(
            x, dataclasses.replace(w, scales=scales)
        ).sum()
    )(w.scales)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_quantised_activations_have_no_gradient(implementation):
    spec = ArgSpec(4, 64, 16, "int8", activations="int8")
    x, w, _ = operands(spec)
    with pytest.raises(JaxherdError, match="straight-through"):
        jax.grad(lambda x: product(spec, implementation)(x, w).sum())(x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jit_vmap_and_scan(implementation):
    """Stacked matrices: one call a matrix, whichever way they are walked."""
    spec = ArgSpec(4, 64, 128, "int4", 32, packed=True)
    stack = spec.quantize(
        jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 128)), jnp.float32)
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 64)), jnp.float32)
    wanted = jnp.einsum("emk,ekn->emn", x, stack.dequantize())
    call = product(spec, implementation)
    np.testing.assert_allclose(jax.jit(jax.vmap(call))(x, stack), wanted, rtol=1e-5, atol=1e-4)
    _, found = jax.jit(lambda x, q: jax.lax.scan(lambda c, a: (c, call(*a)), 0, (x, q)))(x, stack)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_what_is_wrong_is_told(devices):
    w = quantize(jnp.ones((64, 8)))
    x = jnp.ones((2, 64))
    for message, arguments, options in (
        ("K = 5", (x[:, :5], w), {}),
        ("did you mean 'xla'", (x, w), {"implementation": "xlaa"}),
        ("did you mean 'int8'", (x, w), {"activations": "int9"}),
        ("this is a cpu, not a tpu", (x, w), {"implementation": "pallas_tpu"}),
        ("this is a cpu, not a gpu", (x, w), {"implementation": "pallas_gpu"}),
        ("are a stack", (x, quantize(jnp.ones((2, 64, 8)))), {}),
        ("scales of shape", (x, QuantizedMatrix(w.values, w.scales[:, :3])), {}),
        (
            "groups of 8 rows",
            (x, quantize(jnp.ones((64, 8)), group=8)),
            {"implementation": "pallas_tpu", "interpret": True},
        ),
        (
            r"call pack\(\)",
            (x, quantize(jnp.ones((64, 8)), bits=4)),
            {"implementation": "pallas_gpu", "interpret": True},
        ),
        (
            "x is float16",
            (x.astype(jnp.float16), w),
            {"implementation": "pallas_tpu", "interpret": True},
        ),
    ):
        with pytest.raises(JaxherdError, match=message):
            quantized_matmul(*arguments, **options)


@pytest.mark.parametrize("chip", LIMITS)
@pytest.mark.parametrize("name", ARG_SPECS)
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_fit_and_cover(chip, name, transposed):
    """The stated VMEM is within the limit; up to 64 rows the codes are read once."""
    spec = ARG_SPECS[name]
    x, w = spec.abstract()
    form = pallas_tpu.form_of(x, w, chip=chip, activations=spec.activations, transposed=transposed)
    tiles = form.tiles
    operands = pallas_tpu.operands_of(x, w)
    assert vmem_bytes(tiles, operands, transposed=transposed) <= LIMITS[chip].vmem_bytes
    assert tiles.rows * tiles.m >= spec.rows and tiles.columns * tiles.n >= spec.columns
    if spec.rows <= 64:
        out = jax.ShapeDtypeStruct((spec.rows, spec.inner if transposed else spec.columns), x.dtype)
        read = pallas_tpu.hbm_bytes(x, w, form, out)
        others = x.size * 2 * (tiles.inner if transposed else tiles.columns) + out.size * 2
        assert tiles.rows == 1 and w.nbytes <= read <= w.nbytes + others
    tiny = choose(LIMITS[chip], (1, 100, 7), operands, transposed=transposed)
    assert (tiny.rows, tiny.inner, tiny.columns) == (1, 1, 1)


def test_on_several_tpus_xla_is_taken():
    """XLA cannot split a kernel: without shard_map the default is the form it can split."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")
    from jax.experimental import topologies

    tpus = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    x, w = ArgSpec(8, 128, 128, "int8").abstract()
    for count, kernels in ((1, 1), (4, 0)):
        with Partitioner.create(Layout("one"), tpus[:count]).activate() as partitioner:
            program = jax.jit(lambda x, w: quantized_matmul(x, w)).trace(x, w).jaxpr
        assert str(program).count("pallas_call") == kernels, partitioner.mesh
    named = functools.partial(quantized_matmul, implementation="pallas_tpu")
    four = Partitioner.create(Layout("one"), tpus)
    with four.activate(), pytest.raises(JaxherdError, match=r"inside jax.shard_map"):
        jax.eval_shape(named, x, w)
