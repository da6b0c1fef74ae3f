import struct

import gguf
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxherd.core.errors import JaxherdError
from jaxherd.data.gguf_file import GgufStore
from jaxherd.kernels import quantized_matmul
from jaxherd.kernels.quantized_matmul.formats import from_gguf
from jaxherd.layers.rope import RopeConfig, RopeScaling
from jaxherd.weights.load import generation_defaults, load
from tests.weights.gguf_files import Q, write


def test_logits_equal_those_of_the_safetensors(golden_folder, tmp_path):
    folder, golden = golden_folder("llama_gqa_tied")
    tensors = load_file(folder / "model.safetensors")
    path = write(tmp_path / "model.gguf", tensors)
    module = load(path)
    assert module.config.tie_embeddings
    tokens = jnp.asarray(golden["tokens"], jnp.int32)
    np.testing.assert_allclose(module(tokens), golden["logits"], atol=1e-4)
    assert generation_defaults(path).eos_ids == (3,)
    assert load(path, dtype="bfloat16").embedding.table[...].dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0])
def test_block_formats(tmp_path, kind):
    value = np.random.RandomState(0).normal(0, 1, (3, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("w", gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    store = GgufStore(tmp_path / "x.gguf")
    assert store.shapes == {"w": (3, 64)}
    read = store.read("w")
    assert read.dtype == np.float32
    spread = value.max() - value.min()
    tolerance = {Q.F16: 1e-3, Q.BF16: 1e-2, Q.Q8_0: 1e-2}.get(kind, spread / 12)
    np.testing.assert_allclose(read, value, atol=float(tolerance), rtol=5e-3)


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0])
def test_blocks_stay_packed(tmp_path, kind):
    """From the file to a product without a float weight in between."""
    value = np.random.RandomState(0).normal(0, 1, (3, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("w", gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    store = GgufStore(tmp_path / "x.gguf")
    name, blocks = store.blocks("w")
    matrix = from_gguf(blocks, name)
    np.testing.assert_array_equal(matrix.dequantize().T, store.read("w"))
    x = jnp.ones((1, 64))
    np.testing.assert_allclose(quantized_matmul(x, matrix), x @ store.read("w").T, rtol=1e-5)


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_k_quants_are_dequantised_by_the_package(tmp_path, kind):
    _, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.RandomState(1).randint(0, 50, (2, 2 * size)).astype(np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    store = GgufStore(tmp_path / "x.gguf")
    assert store.shapes == {"w": (2, 512)}
    np.testing.assert_array_equal(store.read("w"), gguf.quants.dequantize(raw, kind))


def test_metadata_agrees_with_the_packages_reader(golden_folder, tmp_path):
    folder, _ = golden_folder("llama_gqa_tied")
    extra = (
        lambda w: w.add_tokenizer_model("gpt2"),
        lambda w: w.add_token_list(["a", "b c", "é"]),
        lambda w: w.add_token_types([1, 1, 3]),
        lambda w: w.add_array("floats", [0.5, 1.5]),
        lambda w: w.add_bool("yes", True),
    )
    path = write(tmp_path / "m.gguf", load_file(folder / "model.safetensors"), extra=extra)
    ours, reader = GgufStore(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    for tensor in reader.tensors:
        assert ours.shapes[tensor.name] == tuple(int(n) for n in reversed(tensor.shape))
        np.testing.assert_array_equal(ours.read(tensor.name).ravel(), tensor.data.ravel())


def test_rope_divisors_and_untied_output(golden_folder, tmp_path):
    folder, _ = golden_folder("llama_gqa_tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    divisors = np.array([1.0, 2.5, 8.0], np.float32)
    path = write(
        tmp_path / "m.gguf", tensors, extra=[lambda w: w.add_tensor("rope_freqs.weight", divisors)]
    )
    module = load(path)
    assert not module.config.tie_embeddings
    scaling = RopeScaling(
        "longrope", original_length=64, short_factor=(1.0, 2.5, 8.0),
        long_factor=(1.0, 2.5, 8.0), attention_factor=1.0,
    )  # fmt: skip
    assert module.config.layers[0].attention.rope == RopeConfig(10000.0, scaling)


def small(tmp_path) -> bytes:
    writer = gguf.GGUFWriter(str(tmp_path / "s.gguf"), "llama")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("w", np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (tmp_path / "s.gguf").read_bytes()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return folder, small(folder)


def test_every_truncation_is_one_sentence(small_file):
    folder, data = small_file
    for length in range(len(data)):
        (folder / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(JaxherdError, match="cut.gguf.*truncated or no GGUF"):
            GgufStore(folder / "cut.gguf")


@hypothesis.settings(max_examples=200, deadline=1000)
@hypothesis.given(at=st.integers(0, 10**6), value=st.integers(0, 2**64 - 1))
def test_damaged_headers_never_hang_or_crash(small_file, at, value):
    folder, data = small_file
    at %= len(data) - 8
    (folder / "bad.gguf").write_bytes(data[:at] + struct.pack("<Q", value) + data[at + 8 :])
    try:
        store = GgufStore(folder / "bad.gguf")
        for name in store.shapes:
            store.read(name)
    except JaxherdError:
        pass


def test_other_architectures_are_refused(tmp_path):
    for architecture, message in (("qwen2", "'qwen2' is not known"), ("llama", "token_embd")):
        writer = gguf.GGUFWriter(str(tmp_path / f"{architecture}.gguf"), architecture)
        writer.add_tensor("w", np.ones((2, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(JaxherdError, match=message):
            load(tmp_path / f"{architecture}.gguf")
