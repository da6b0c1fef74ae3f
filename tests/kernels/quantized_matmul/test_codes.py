"""The leaf type and the conventions: error bounds, exact packing, and what JAX does with a tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels import QuantizedMatrix, quantize
from jaxherd.kernels.quantized_matmul.codes import CONVENTIONS, RANGE, quantize_rows
from jaxherd.kernels.quantized_matmul.tensor import pack_int4, unpack_int4

INTEGERS = [(code, c) for code in ("int4", "int8") for c in CONVENTIONS[code]]


def draw(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def steps(w: QuantizedMatrix) -> jax.Array:
    """The scale of every element, as a magnitude."""
    return jnp.abs(jnp.repeat(w.scales.astype(jnp.float32), w.group, axis=-2))


@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize("code, convention", INTEGERS)
def test_symmetric_codes_are_within_half_a_step(code, convention, group):
    w = draw(0, (128, 24)).at[:, 3].set(0.0)
    found = quantize(w, dtype=code, group=group, convention=convention)
    assert (found.code, found.group, found.zeros) == (code, group or 128, None)
    error, step = jnp.abs(found.dequantize() - w), steps(found)
    # Q4_0 and Q8_0 round their scale after the values were computed with the exact one.
    slack = 128 * 2.0**-11 if convention in ("q4_0", "q8_0") else 1e-3
    saturated = found.values.astype(jnp.int32) == RANGE[code][1]
    assert bool((error <= jnp.where(saturated, 1 + slack, 0.5 + slack) * step).all())
    np.testing.assert_array_equal(found.dequantize()[:, 3], 0)


def test_what_saturates():
    """At absmax/8 the positive maximum becomes 7, at absmax/7 nothing does."""
    w = jnp.asarray([[7.5, -7.5], [2.0, 2.0]])
    for convention, values in (
        ("absmax/8", [[7, -8], [2, 2]]),
        ("absmax/7.5", [[7, -8], [2, 2]]),  # 7.5 rounds to the even 8
        ("absmax/7", [[7, -7], [2, 2]]),
        ("q4_0", [[-8, -8], [-2, 2]]),
    ):
        found = quantize(w, bits=4, convention=convention)
        np.testing.assert_array_equal(found.values.astype(jnp.int8), values, convention)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32])
def test_asymmetric_codes(bits, group, scale_dtype):
    # All of one sign: the range is widened to hold zero, which stays exact.
    w = (draw(1, (64, 10)) + 3).at[5].set(0.0)
    found = quantize(w, bits=bits, group=group, symmetric=False, scale_dtype=jnp.dtype(scale_dtype))
    # A rounded zero point costs up to half a step at the ends of the range, a rounded scale more.
    slack = {"float32": 1e-3, "bfloat16": 2.0**bits / 256, "float16": 0.13}[scale_dtype]
    assert bool((jnp.abs(found.dequantize() - w) <= (1 + slack) * steps(found)).all())
    np.testing.assert_array_equal(found.dequantize()[5], 0)
    assert found.scales.dtype == found.zeros.dtype == jnp.dtype(scale_dtype)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_tiny_values_never_divide_by_zero(scale_dtype, symmetric):
    w = jnp.zeros((32, 2)).at[:, 1].set(1e-9)
    found = quantize(w, bits=4, symmetric=symmetric, scale_dtype=jnp.dtype(scale_dtype))
    assert bool(jnp.isfinite(found.dequantize()).all())
    np.testing.assert_allclose(found.dequantize(), w, atol=1e-4)


def test_fp8_rounds_to_the_nearest():
    w = draw(2, (96, 8))
    found = quantize(w, dtype=jnp.float8_e4m3fn)
    assert found.code == "float8_e4m3fn" and found.values.dtype == jnp.float8_e4m3fn
    # Three bits after the leading one; below 2^-6 the step is constant.
    bound = jnp.maximum(jnp.abs(w) * 2.0**-4, steps(found) * 2.0**-10) * 1.001
    assert bool((jnp.abs(found.dequantize() - w) <= bound).all())


@given(
    stack=st.sampled_from([(), (2,), (2, 3)]),
    pairs=st.sampled_from([1, 5]),
    columns=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_packing_is_exact(stack, pairs, columns, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-8, 8, (*stack, 2 * pairs, columns)).astype(np.int8)
    packed = pack_int4(jnp.asarray(values))
    assert packed.shape == (*stack, pairs, columns) and packed.dtype == jnp.int8
    np.testing.assert_array_equal(unpack_int4(packed), values)
    # The even row sits in the low nibble.
    np.testing.assert_array_equal(np.asarray(packed) & 0xF, values[..., 0::2, :] & 0xF)
    np.testing.assert_array_equal(np.asarray(packed) >> 4, values[..., 1::2, :])


def test_all_bytes_round_trip():
    every = jnp.arange(-128, 128, dtype=jnp.int8)[:, None]
    np.testing.assert_array_equal(pack_int4(unpack_int4(every)), every)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_stack_is_a_tree_like_any(symmetric):
    """jit, vmap, scan, shards and Orbax: same bits as one matrix at a time."""
    w = draw(3, (4, 64, 8))
    stack = quantize(w, bits=4, group=32, symmetric=symmetric, packed=True)
    assert stack.shape == (4, 64, 8) and stack.packed and stack.values.shape == (4, 32, 8)
    one = [quantize(w[i], bits=4, group=32, symmetric=symmetric, packed=True) for i in range(4)]
    separate = jax.tree.map(lambda *parts: jnp.stack(parts), *one)
    jax.tree.map(np.testing.assert_array_equal, stack, separate)

    wanted = stack.dequantize()
    np.testing.assert_allclose(jax.jit(lambda q: q.dequantize())(stack), wanted, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda q: q.dequantize())(stack), wanted, rtol=1e-6)
    _, scanned = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stack)
    np.testing.assert_allclose(scanned, wanted, rtol=1e-6)
    mapped = jax.tree.map(lambda leaf: leaf[2], stack)
    assert mapped.shape == (64, 8)
    np.testing.assert_allclose(mapped.dequantize(), wanted[2], rtol=1e-6)


def test_shards_along_columns_and_groups(devices):
    mesh = jax.sharding.Mesh(np.asarray(devices[:4]).reshape(2, 2), ("k", "n"))
    whole = quantize(draw(4, (128, 8)), bits=4, group=32, packed=True)
    place = jax.sharding.NamedSharding(mesh, jax.P("k", "n"))
    found = jax.jit(lambda q: q.dequantize())(jax.device_put(whole, place))
    np.testing.assert_array_equal(found, whole.dequantize())
    # Inside of shard_map each device sees a whole smaller matrix.
    mapped = jax.shard_map(
        lambda q: q.dequantize(), mesh=mesh, in_specs=jax.P("k", "n"), out_specs=jax.P("k", "n")
    )
    np.testing.assert_array_equal(mapped(whole), whole.dequantize())


@pytest.mark.parametrize("code", ["int8", "packed", "float8_e4m3fn"])
def test_checkpoint(tmp_path, code):
    options = {"bits": 4, "packed": True} if code == "packed" else {"dtype": code}
    tree = {"w": quantize(draw(5, (64, 8)), group=32, scale_dtype=jnp.bfloat16, **options)}
    ocp.save_pytree(tmp_path / "c", tree)
    back = ocp.load_pytree(tmp_path / "c", jax.tree.map(jnp.zeros_like, tree))
    assert isinstance(back["w"], QuantizedMatrix) and back["w"].packed == tree["w"].packed
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_sizes():
    """Llama 4 int4: half a byte a weight and a float32 for 128 of them."""
    w = jax.eval_shape(
        lambda w: quantize(w, bits=4, group=128, packed=True),
        jax.ShapeDtypeStruct((5120, 8192), jnp.float32),
    )
    assert w.nbytes == 5120 * 8192 // 2 + 5120 // 128 * 8192 * 4
    assert jax.eval_shape(QuantizedMatrix.unpack, w).nbytes == w.nbytes


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_rows_are_rounded_by_their_own_scale(dtype):
    x = draw(6, (5, 64)) * jnp.asarray([[1e-3], [1.0], [50.0], [0.0], [1e4]])
    values, scales = quantize_rows(x, dtype)
    assert values.dtype == jnp.dtype(dtype) and scales.shape == (5, 1)
    tolerance = {"int8": 0.501 / 127, "float8_e4m3fn": 2.0**-4}[dtype]
    error = jnp.abs(values.astype(jnp.float32) * scales - x)
    assert bool((error <= tolerance * jnp.abs(x).max(axis=1, keepdims=True)).all())
    bounded, scales = quantize_rows(x, dtype, upper_bound=1200.0)
    assert float(scales.max()) == pytest.approx(1200 / (127 if dtype == "int8" else 448))
    assert float(jnp.abs(bounded.astype(jnp.float32)).max()) <= -RANGE[dtype][0]


def test_what_is_wrong_is_told():
    w = draw(7, (64, 8))
    for message, options in (
        ("group of 48 does not divide K = 64", {"group": 48}),
        ("4 or 8", {"bits": 3}),
        ("not both", {"bits": 4, "dtype": "int4"}),
        ("did you mean 'int8'", {"dtype": "int9"}),
        ("did you mean 'absmax/7.5'", {"bits": 4, "convention": "absmax/7.6"}),
        ("no convention 'absmax/8'", {"bits": 8, "convention": "absmax/8"}),
        ("asymmetric code is int4 or int8", {"dtype": "float8_e4m3fn", "symmetric": False}),
        ("only int4 values can be packed", {"bits": 8, "packed": True}),
    ):
        with pytest.raises(JaxherdError, match=message):
            quantize(w, **options)
    with pytest.raises(JaxherdError, match="even K, not 63"):
        quantize(w[1:], bits=4, packed=True)
    with pytest.raises(JaxherdError, match="not int4"):
        quantize_rows(w, "int4")


@pytest.mark.parametrize(
    "message, parts",
    [
        ("none of int8", ((64, 8), "int16", (1, 8), None, False)),
        ("scales of shape", ((64, 8), "int8", (1, 7), None, False)),
        ("scales of shape", ((2, 64, 8), "int8", (1, 8), None, False)),
        ("do not divide", ((64, 8), "int8", (3, 8), None, False)),
        ("do not divide", ((64, 8), "int8", (2, 8), (4, 8), False)),
        ("cuts a byte", ((3, 8), "int8", (2, 8), None, True)),
    ],
)
def test_parts_that_do_not_fit(message, parts):
    values, dtype, scales, zeros, packed = parts
    w = QuantizedMatrix(
        jnp.zeros(values, dtype),
        jnp.ones(scales),
        None if zeros is None else jnp.ones(zeros),
        packed,
    )
    with pytest.raises(JaxherdError, match=message):
        w.check()


def test_an_index_picks_matrices_of_a_stack():
    stack = quantize(draw(8, (4, 64, 8)), bits=4, group=32, symmetric=False, packed=True)
    np.testing.assert_array_equal(stack[2].dequantize(), stack.dequantize()[2])
    assert stack[1:3].shape == (2, 64, 8) and stack[...].shape == stack.shape
    for index in ((0, slice(2)), (0, 1), (..., 0)):
        with pytest.raises(JaxherdError, match="not parts of one"):
            stack[index]
