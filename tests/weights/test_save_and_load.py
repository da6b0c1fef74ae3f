import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxherd
from jaxherd.core.errors import JaxherdError, StorageError
from jaxherd.core.modules import flatten, split
from jaxherd.models import presets
from jaxherd.weights.load import load
from jaxherd.weights.save import save


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def bits(x) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def assert_equal_modules(a, b):
    assert a.config == b.config
    for x, y in zip(split(a)[1:], split(b)[1:]):
        x, y = flatten(x), flatten(y)
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            assert bits(x[name]) == bits(y[name]), name


CASES = ["llama_biases_untied_head_dim", "llama_gqa_tied", "llama4_explicit_lists"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shard", [10**9, 4000])
def test_bf16_round_trip_through_hugging_face_is_bit_exact(golden_folder, tmp_path, name, shard):
    folder, _ = golden_folder(name, ml_dtypes.bfloat16)
    module = load(folder)
    assert module.embedding.table[...].dtype == jnp.bfloat16
    out = jaxherd.save(module, tmp_path / "out", format="hf", max_shard_bytes=shard)
    before, after = arrays(folder), arrays(out)
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype
        assert bits(before[key]) == bits(after[key]), key
    many = len(list(out.glob("*.safetensors"))) > 1
    assert many == (shard == 4000) == (out / "model.safetensors.index.json").exists()
    assert_equal_modules(load(out), module)


def test_dtype_is_applied(golden_folder):
    folder, _ = golden_folder("llama4_explicit_lists")
    for dtype in ("bfloat16", jnp.bfloat16):
        module = load(folder, dtype=dtype)
        assert {x.dtype for x in jax.tree.leaves(module)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(JaxherdError, match="did you mean 'float32'"):
        load(folder, dtype="flaot32")
    with pytest.raises(JaxherdError, match="int32"):
        load(folder, dtype="int32")


def test_our_format_keeps_everything(tmp_path):
    config = presets.llama4_text(
        vocab_size=11, embed_dim=8, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=4,
        num_experts=3, expert_dim=5, dense_dim=6, moe_step=2, chunk_size=4, selection_bias=True,
        rope=presets.SCOUT_ROPE, scan_layers=False,
    )  # fmt: skip
    module = config.build(jax.random.key(1))
    definition, params, buffers = split(module)
    buffers = jax.tree.map(lambda x: x + 0.25, buffers)
    assert flatten(buffers)
    module = definition.merge(params, buffers)
    folder = save(module, tmp_path / "ours", max_shard_bytes=700)
    assert_equal_modules(load(folder), module)
    with pytest.raises(JaxherdError, match="format='jaxherd'"):
        save(module, tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()


def test_prefix_and_split_experts_are_read(golden_folder, tmp_path):
    folder, golden = golden_folder("llama4_explicit_lists")
    fused = load(folder)
    renamed = {}
    for name, value in arrays(folder).items():
        name = "language_model." + name
        if name.endswith("experts.gate_up_proj"):
            for e, matrix in enumerate(value):
                gate, up = np.split(matrix, 2, axis=-1)
                stem = name.removesuffix("gate_up_proj") + f"{e}."
                renamed[stem + "gate_proj.weight"] = np.ascontiguousarray(gate.T)
                renamed[stem + "up_proj.weight"] = np.ascontiguousarray(up.T)
        elif name.endswith("experts.down_proj"):
            for e, matrix in enumerate(value):
                stem = name.removesuffix("down_proj") + f"{e}."
                renamed[stem + "down_proj.weight"] = np.ascontiguousarray(matrix.T)
        else:
            renamed[name] = value
    renamed["vision_model.class_embedding"] = np.zeros(3, np.float32)
    save_file(renamed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    assert_equal_modules(load(folder / "model.safetensors", text_only=True), fused)


def test_mobilellm_folder(golden_folder, tmp_path):
    """The published layout: Llama's names, its own two switches, one stored copy of a block."""
    folder, golden = golden_folder("llama_gqa_tied")
    config = json.loads((folder / "config.json").read_text())
    own = {
        **config,
        "architectures": ["MobileLLMForCausalLM"],
        "model_type": "mobilellm",
        "tie_word_embeddings": False,
        "share_embedding": True,
        "layer_sharing": False,
    }
    (folder / "config.json").write_text(json.dumps(own))
    tokens = jnp.asarray(golden["tokens"], jnp.int32)
    np.testing.assert_allclose(load(folder)(tokens), golden["logits"], atol=1e-4)
    (folder / "config.json").write_text(json.dumps({**own, "layer_sharing": True}))
    shared = load(folder)
    assert shared.config.repeats == 2
    out = save(shared, tmp_path / "out", format="hf")
    written = json.loads((out / "config.json").read_text())
    assert written["layer_sharing"] and written["share_embedding"]
    assert_equal_modules(load(out), shared)


def test_unknown_missing_and_wrong_tensors_are_listed_together(golden_folder):
    folder, _ = golden_folder("llama_gqa_tied")
    tensors = arrays(folder)
    tensors["model.layers.0.self_attn.surprise"] = np.zeros(2, np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(5, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(JaxherdError) as error:
        load(folder)
    text = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in text
    assert "unknown: model.layers.0.self_attn.surprise" in text
    assert "model.norm.weight is (5,) instead of (24,)" in text
    assert "inv_freq" not in text


def test_a_second_copy_of_tied_embeddings_must_be_one(golden_folder):
    folder, golden = golden_folder("llama_gqa_tied")
    tensors = arrays(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    load(folder)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(JaxherdError, match="lm_head.weight.*differs"):
        load(folder)


def test_damaged_files(golden_folder, tmp_path):
    folder, _ = golden_folder("llama_gqa_tied")
    whole = (folder / "model.safetensors").read_bytes()
    for data in (whole[:-5], whole[:20], b"", b"\xff" * 64, whole[:8] + b"x" + whole[9:]):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(JaxherdError, match="model.safetensors.*truncated or no safetensors"):
            load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for source in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(JaxherdError, match="pickle.*convert it to safetensors"):
            load(source)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(JaxherdError, match="no file beside it"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(JaxherdError, match="model-1.safetensors.*missing"):
        load(folder)
    index.write_text("{")
    with pytest.raises(JaxherdError, match="index.json.*damaged"):
        load(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(JaxherdError, match="config.json.*no JSON object"):
        load(folder)


def test_sources(tmp_path):
    with pytest.raises(JaxherdError, match="did you mean 'smollm2-135m-instruct'"):
        load("smollm2-135m-instuct")
    with pytest.raises(JaxherdError, match="neither config.json nor one GGUF"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(JaxherdError, match="no checkpoint"):
        load(tmp_path / "notes.txt")


def test_save_leaves_nothing_behind_on_failure(tmp_path, monkeypatch):
    config = presets.llama(
        vocab_size=7, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=8
    )
    module = config.build(jax.random.key(0))

    class Broken:
        def save(self, folder):
            raise OSError("disk full")

    with pytest.raises(StorageError, match="disk full"):
        save(module, tmp_path / "a", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []
    save(module, tmp_path / "a")
    with pytest.raises(JaxherdError, match="not empty"):
        save(module, tmp_path / "a")
    with pytest.raises(JaxherdError, match="did you mean 'jaxherd'"):
        save(module, tmp_path / "b", format="jaxherdd")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_generation_defaults_travel_with_the_model(tmp_path):
    from jaxherd.weights.load import GenerationDefaults, generation_defaults

    config = presets.llama(
        vocab_size=7, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=8
    )
    given = GenerationDefaults((2, 5), bos_id=1, temperature=0.5)
    folder = save(config.build(jax.random.key(0)), tmp_path / "a", format="hf", generation=given)
    assert generation_defaults(folder) == given
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [2, 5]
    plain = save(config.build(jax.random.key(0)), tmp_path / "b", format="hf")
    assert json.loads((plain / "config.json").read_text())["eos_token_id"] is None
    assert dataclasses.astuple(generation_defaults(plain)) == ((), None, None, None, None, None)
