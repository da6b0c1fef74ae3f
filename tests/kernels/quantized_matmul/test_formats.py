"""Bit-exact layouts: GGUF against the gguf package, Llama 4 against Meta's quantiser, fp8."""

import pathlib

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels import QuantizedMatrix, quantize
from jaxherd.kernels.quantized_matmul import formats

KINDS = ("Q4_0", "Q8_0")
GOLDEN = np.load(pathlib.Path(__file__).parents[2] / "golden" / "llama4_int4.npz")


def block_format(kind: str):
    return gguf.GGMLQuantizationType[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_dequantises_alike_and_returns_the_same_bytes(kind):
    w_NK = np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    blocks = gguf.quants.quantize(w_NK, block_format(kind))
    w = formats.from_gguf(blocks, kind)
    assert w.shape == (96, 5) and w.group == 32 and w.scales.dtype == jnp.float16
    assert w.packed == (kind == "Q4_0")
    wanted = gguf.quants.dequantize(blocks, block_format(kind))
    np.testing.assert_array_equal(np.asarray(w.dequantize()).T, wanted)
    found_kind, found = formats.to_gguf(w)
    assert found_kind == kind
    np.testing.assert_array_equal(found, blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_round_trip(kind):
    """Also nibbles and scales that no quantiser writes: negative, subnormal."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (2, 7, 3, formats.GGUF_BYTES[kind]), dtype=np.uint8)
    blocks[..., 1] &= 0xBF  # keeps the float16 finite
    blocks = blocks.reshape(2, 7, -1)
    w = formats.from_gguf(blocks, kind)
    assert w.shape == (2, 96, 7)
    np.testing.assert_array_equal(formats.to_gguf(w)[1], blocks)


@given(
    w_NK=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from([32, 64])),
        elements=st.floats(-8, 8, width=16),
    )
)
@pytest.mark.parametrize("kind", KINDS)
def test_our_quantiser_writes_the_bytes_of_gguf(kind, w_NK):
    w = quantize(
        jnp.asarray(w_NK.T), dtype="int4" if kind == "Q4_0" else "int8", group=32,
        convention=kind.lower(),
    )  # fmt: skip
    np.testing.assert_array_equal(
        formats.to_gguf(w)[1], gguf.quants.quantize(w_NK, block_format(kind))
    )


def test_gguf_refuses_what_it_cannot_hold():
    w = jnp.ones((64, 4))
    with pytest.raises(JaxherdError, match="no GGUF block"):
        formats.to_gguf(quantize(w, bits=4, group=64, scale_dtype=jnp.float16))
    with pytest.raises(JaxherdError, match="no GGUF block"):
        formats.to_gguf(quantize(w, bits=4, group=32))
    with pytest.raises(JaxherdError, match="no GGUF block"):
        formats.to_gguf(quantize(w, bits=8, group=32, symmetric=False, scale_dtype=jnp.float16))
    with pytest.raises(JaxherdError, match="Choices: Q4_0, Q4_1, Q8_0"):
        formats.from_gguf(np.zeros((1, 18), np.uint8), "Q4_x")
    with pytest.raises(JaxherdError, match="rows of 17 bytes"):
        formats.from_gguf(np.zeros((1, 17), np.uint8), "Q4_0")


def test_llama4_int4_is_metas():
    """Values, bytes and scales of the golden, to and from; zero rows, ties and outliers in it."""
    w = quantize(jnp.asarray(GOLDEN["w"].T), bits=4, group=128, convention="absmax/8", packed=True)
    np.testing.assert_array_equal(w.unpack().values.astype(jnp.int8).T, GOLDEN["values"])
    packed, scales = formats.to_llama4_int4(w)
    np.testing.assert_array_equal(packed, GOLDEN["packed"])
    np.testing.assert_array_equal(scales, GOLDEN["scales"])
    back = formats.from_llama4_int4(GOLDEN["packed"], GOLDEN["scales"])
    np.testing.assert_array_equal(back.values, w.values)
    np.testing.assert_array_equal(back.dequantize(), w.dequantize())
    error = np.abs(np.asarray(w.dequantize()) - GOLDEN["w"].T)
    step = np.repeat(GOLDEN["scales"], 128, axis=0)
    saturated = GOLDEN["values"].T == 7
    assert (error <= np.where(saturated, 1.0, 0.5) * step * 1.0001).all()
    assert saturated.any() and (error[saturated] > 0.5 * step[saturated]).any()


def test_llama4_stack_of_experts():
    packed = np.stack([GOLDEN["packed"], GOLDEN["packed"][::-1]])
    scales = np.stack([GOLDEN["scales"], GOLDEN["scales"][:, ::-1]])
    w = formats.from_llama4_int4(packed, scales)
    assert w.shape == (2, 384, 12)
    np.testing.assert_array_equal(formats.to_llama4_int4(w)[0], packed)
    with pytest.raises(JaxherdError, match="not Llama 4's int4"):
        formats.to_llama4_int4(quantize(jnp.ones((8, 2)), bits=8))
    with pytest.raises(JaxherdError, match="do not divide"):
        formats.from_llama4_int4(GOLDEN["packed"][:, :-1], GOLDEN["scales"])


def test_fp8_rounds_as_torch_does():
    w = quantize(jnp.asarray(GOLDEN["w"].T), dtype="float8_e4m3fn")
    np.testing.assert_array_equal(np.asarray(w.scales).T, GOLDEN["fp8_scales"])
    bits = np.asarray(w.values).view(np.uint8).T
    np.testing.assert_array_equal(bits, GOLDEN["fp8_bits"])


def test_fp8_layouts():
    rng = np.random.default_rng(2)
    gate_up = quantize(jnp.asarray(rng.normal(size=(3, 8, 12)), jnp.float32), dtype="float8_e4m3fn")
    down = quantize(jnp.asarray(rng.normal(size=(3, 6, 8)), jnp.float32), dtype="float8_e4m3fn")
    weight, scale = formats.to_fbgemm_fp8(gate_up, down=False)
    assert scale.shape == (3, 1, 12)
    _same(formats.from_fbgemm_fp8(weight, scale), gate_up)
    weight, scale = formats.to_fbgemm_fp8(down, down=True)
    assert weight.shape == (3, 6, 8) and scale.shape == (3, 8, 1)
    _same(formats.from_fbgemm_fp8(weight, scale), down)
    weight, scale = formats.to_compressed_tensors_fp8(down)
    assert weight.shape == (3, 8, 6) and scale.shape == (3, 8, 1)
    _same(formats.from_compressed_tensors_fp8(weight, scale), down)
    with pytest.raises(JaxherdError, match="not fp8 per channel"):
        formats.to_fbgemm_fp8(quantize(jnp.ones((8, 2))), down=False)


def _same(found: QuantizedMatrix, wanted: QuantizedMatrix) -> None:
    np.testing.assert_array_equal(np.asarray(found.values), np.asarray(wanted.values))
    np.testing.assert_array_equal(found.scales, wanted.scales)


def test_qwix():
    """The three arrays of a QArray are ours: same values, same meaning."""
    qwix = pytest.importorskip("qwix")
    w = jnp.asarray(np.random.default_rng(3).normal(size=(64, 8)), jnp.float32)
    array = qwix.quantize(w, jnp.int4, channelwise_axes=[1], tiled_axes={0: 32})
    ours = quantize(w, bits=4, group=32)
    _same(formats.from_qwix(array), ours)
    np.testing.assert_array_equal(qwix.dequantize(formats.to_qwix(ours)), ours.dequantize())
