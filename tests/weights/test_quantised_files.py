"""Weights in few bits from files and to them: on the fly, as stored, in our own format."""

import functools
import json

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxherd
from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import flatten, split
from jaxherd.kernels import QuantizedMatrix, quantize
from jaxherd.kernels.quantized_matmul import formats
from jaxherd.models import presets
from jaxherd.models.quantise import bytes_by_dtype, dequantised, quantise
from jaxherd.weights import assemble as assemble_module
from jaxherd.weights.stores import write_shards
from tests.weights.gguf_files import Q, write

TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 40, (2, 9)), jnp.int32)


@functools.cache
def scout():
    config = presets.llama4_text(
        vocab_size=40, embed_dim=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
        num_experts=2, expert_dim=128, chunk_size=4,
        init_std=0.1, max_length=64,
    )  # fmt: skip
    return jax.jit(config.build)(jax.random.key(0))


@functools.cache
def dense():
    config = presets.llama(
        vocab_size=40, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        hidden_dim=96, init_std=0.2, max_length=64,
    )  # fmt: skip
    return jax.jit(config.build)(jax.random.key(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hugging Face folders of both, that of the routed model in bfloat16."""
    root = tmp_path_factory.mktemp("models")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), scout())
    return {
        "scout": jaxherd.save(half, root / "scout", format="hf"),
        "dense": jaxherd.save(dense(), root / "dense", format="hf"),
    }


def assert_same(a, b) -> None:
    assert a.config == b.config
    for x, y in zip(split(a)[1:], split(b)[1:]):
        assert jax.tree.structure(x) == jax.tree.structure(y)
        for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def coded(module) -> dict[str, QuantizedMatrix]:
    found = flatten(split(module)[1])
    return {path: leaf for path, leaf in found.items() if isinstance(leaf, QuantizedMatrix)}


@pytest.mark.parametrize(
    "source, recipe, dtype",
    [
        ("scout", "int4_mixed", None),
        ("scout", "fp8_mixed", None),
        ("dense", "int8", "bfloat16"),
    ],
)
def test_on_the_fly_is_bit_for_bit_what_comes_after_loading(
    folders, monkeypatch, source, recipe, dtype
):
    wanted = quantise(jaxherd.load(folders[source], dtype=dtype), recipe)
    allocated = []
    aligned = assemble_module._aligned

    def counted(shape, kind):
        allocated.append(int(np.prod(shape)) * kind.itemsize)
        return aligned(shape, kind)

    monkeypatch.setattr(assemble_module, "_aligned", counted)
    found = jaxherd.load(folders[source], dtype=dtype, quantise=recipe)
    assert_same(found, wanted)
    # The host allocates what is kept in the end, never the model in floating point.
    assert sum(allocated) == sum(bytes_by_dtype(found).values())


def test_our_format_keeps_codes(folders, tmp_path):
    recipe = "int4_group32"
    module = jaxherd.load(folders["dense"], quantise=recipe)
    folder = jaxherd.save(module, tmp_path / "own", max_shard_bytes=50_000)
    assert_same(jaxherd.load(folder), module)
    # The dtype is that of plain weights: scales and codes stay.
    half = jaxherd.load(folder, dtype="bfloat16")
    assert half.dtype == jnp.bfloat16
    for path, leaf in coded(half).items():
        np.testing.assert_array_equal(leaf.scales, coded(module)[path].scales)
    with pytest.raises(JaxherdError, match="in few bits already"):
        jaxherd.load(folder, quantise=recipe)
    with pytest.raises(JaxherdError, match="read as it is stored anyway"):
        jaxherd.load(folder, quantise="as_stored")
    with pytest.raises(JaxherdError, match="format='jaxherd' alone"):
        jaxherd.save(module, tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()


def test_our_format_of_plain_weights_is_quantised_on_the_fly(folders, tmp_path):
    folder = jaxherd.save(dense(), tmp_path / "own")
    assert_same(jaxherd.load(folder, quantise="int8"), quantise(dense(), "int8"))


def test_fp8_codes_survive_our_format(folders, tmp_path):
    module = jaxherd.load(folders["scout"], quantise="fp8_mixed")
    assert_same(jaxherd.load(jaxherd.save(module, tmp_path / "own")), module)


def gguf_of(folder, path, kind, **options):
    tensors = load_file(folder / "model.safetensors")
    sizes = dict(heads=4, kv_heads=2, head_dim=8, width=64, hidden=96)
    return write(path, tensors, kind, **sizes, **options)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_keeps_its_codes(folders, tmp_path, kind):
    """Tied scores in Q8_0, as llama.cpp leaves them, and one matrix that stays in floats."""
    kinds = {
        "model.embed_tokens.weight": Q.Q8_0,
        "model.layers.1.self_attn.v_proj.weight": Q.F16,
    }
    path = gguf_of(folders["dense"], tmp_path / "m.gguf", Q[kind], kinds=kinds)
    stored, plain = jaxherd.load(path, quantise="as_stored"), jaxherd.load(path)
    assert len(coded(stored)) == 1 + 7 + 6
    for path_of, leaf in coded(stored).items():
        assert leaf.group == 32 and leaf.scales.dtype == jnp.float16
        if kind != "Q4_1":
            assert formats.to_gguf(leaf)[0] == ("Q8_0" if "table" in path_of else kind)
    # Q4_0 and Q8_0 are the same numbers; of Q4_1 the zero points are rounded to float32.
    numbers, wanted = flatten(split(dequantised(stored))[1]), flatten(split(plain)[1])
    for name, value in wanted.items():
        atol = 1e-6 * float(jnp.abs(value).max()) if kind == "Q4_1" else 0
        np.testing.assert_allclose(numbers[name], value, rtol=0, atol=atol)
    if kind == "Q4_1":
        run = jax.jit(lambda m: m(TOKENS))
        np.testing.assert_allclose(run(stored), run(plain), atol=1e-4, rtol=1e-4)
    if kind == "Q4_0":  # another recipe quantises what the codes stand for
        assert_same(jaxherd.load(path, quantise="int8"), quantise(plain, "int8"))


def test_q4_1_blocks_of_one_value_are_exact():
    w_NK = np.repeat(np.array([[0.25, -3.0, 0.0]], np.float32), 32, axis=1).reshape(1, 96)
    blocks = gguf.quants.quantize(w_NK, Q.Q4_1)
    assert (blocks.reshape(3, 20)[:, :2] == 0).all()  # their scale is zero
    np.testing.assert_array_equal(formats.from_gguf(blocks, "Q4_1").dequantize().T, w_NK)


def test_what_holds_no_codes_is_told(folders, tmp_path):
    path = gguf_of(folders["dense"], tmp_path / "m.gguf", Q.F16)
    with pytest.raises(JaxherdError, match="no weights are stored in codes"):
        jaxherd.load(path, quantise="as_stored")
    with pytest.raises(JaxherdError, match="says nothing of fp8"):
        jaxherd.load(folders["dense"], quantise="as_stored")
    with pytest.raises(JaxherdError, match="no way to quantise.*as_stored, fp8_mixed"):
        jaxherd.load(folders["dense"], quantise="as_strd")


FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def fp8_folder(source, target, style: str):
    """A routed model as Meta (fused, fbgemm) or llm-compressor (experts apart) store it."""
    tensors, kept = load_file(source / "model.safetensors"), {}

    def code(value):  # [..., in, out]
        return quantize(jnp.asarray(value.astype(np.float32)), dtype="float8_e4m3fn")

    for name, value in tensors.items():
        if ".experts." not in name:
            kept[name] = value
        elif style == "fbgemm":
            w = code(value)
            kept[name], scale = formats.to_fbgemm_fp8(w, down="down_proj" in name)
            kept[f"{name}_scale"] = scale
        else:
            halves = np.split(value, 2, axis=-1) if "gate_up" in name else [value]
            names = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            for part, half in zip(names, halves):
                weight, scale = formats.to_compressed_tensors_fp8(code(half))
                for e in range(len(half)):
                    own = f"{name.rpartition('.')[0]}.{e}.{part}.weight"
                    kept[own], kept[f"{own}_scale"] = weight[e], scale[e].astype(jnp.bfloat16)
    target.mkdir()
    kept = {name: np.asarray(value) for name, value in kept.items()}
    entries = {n: (v.shape, v.dtype, lambda v=v: v) for n, v in kept.items()}
    write_shards(target, entries, max_shard_bytes=10**9)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = FBGEMM if style == "fbgemm" else COMPRESSED
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("style", ["fbgemm", "compressed"])
def test_fp8_folders_keep_their_codes(folders, tmp_path, style):
    folder = fp8_folder(folders["scout"], tmp_path / style, style)
    stored, plain = jaxherd.load(folder, quantise="as_stored"), jaxherd.load(folder)
    found = coded(stored)
    assert found and all(path.rpartition("/")[2] in ("gate", "up", "down") for path in found)
    original = flatten(split(jaxherd.load(folders["scout"]))[1])
    for path, leaf in found.items():
        wanted = quantize(original[path].astype(jnp.float32), dtype="float8_e4m3fn")
        assert leaf.activations == "float8_e4m3fn" and leaf.blocks == 1
        np.testing.assert_array_equal(leaf.values.view(jnp.int8), wanted.values.view(jnp.int8))
        scales = wanted.scales if style == "fbgemm" else wanted.scales.astype(jnp.bfloat16)
        np.testing.assert_array_equal(leaf.scales, scales)
        # Without the codes: the numbers that they stand for, in bfloat16.
        numbers = flatten(split(plain)[1])[path]
        assert numbers.dtype == jnp.bfloat16
        np.testing.assert_array_equal(numbers, leaf.dequantize(jnp.bfloat16))


def test_other_quantised_folders_are_refused(folders, tmp_path):
    folder = fp8_folder(folders["scout"], tmp_path / "x", "fbgemm")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(JaxherdError, match="only fp8 with a scale an output"):
        jaxherd.load(folder)
    config["quantization_config"] = FBGEMM
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: (v.shape, v.dtype, lambda v=v: v) for n, v in _without_scales(folder).items()}
    write_shards(folder, tensors, max_shard_bytes=10**9)
    with pytest.raises(JaxherdError, match="is fp8 and has no .*_scale beside it"):
        jaxherd.load(folder)


def _without_scales(folder) -> dict[str, np.ndarray]:
    from jaxherd.weights.stores import open_folder

    store = open_folder(folder)
    assert np.dtype(ml_dtypes.float8_e4m3fn) in store.dtypes.values()
    return {name: store.read(name) for name in store.shapes if not name.endswith("_scale")}
