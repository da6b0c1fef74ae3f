"""Multimodal Llama 4 folders in and out: bits, names, the text part alone, what does not fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxherd
from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import flatten, split
from jaxherd.models import presets
from jaxherd.models.decoder import Decoder
from jaxherd.models.multimodal_decoder import MultimodalDecoder, MultimodalDecoderConfig
from jaxherd.models.vision_tower import VisionTowerConfig
from jaxherd.weights.generation import GenerationDefaults, generation_defaults
from jaxherd.weights.hf_config import read_config, write_config
from jaxherd.weights.load import load
from jaxherd.weights.save import save

NAME = "blocks_of_three"


def bits(x) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def variables(module) -> dict:
    return {name: leaf for tree in split(module)[1:] for name, leaf in flatten(tree).items()}


def assert_equal_modules(a, b):
    assert a.config == b.config and type(a) is type(b)
    a, b = variables(a), variables(b)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and bits(a[name]) == bits(b[name]) for name in a)


@pytest.mark.parametrize("shard", [10**9, 4000])
def test_bf16_round_trip_is_bit_exact(vision_golden, tmp_path, shard):
    folder, _ = vision_golden(NAME, ml_dtypes.bfloat16)
    module = load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(module)} == {jnp.dtype(jnp.bfloat16)}
    generation = GenerationDefaults((2, 5), bos_id=1)
    out = save(module, tmp_path / "out", format="hf", max_shard_bytes=shard, generation=generation)
    before, after = load_file(folder / "model.safetensors"), {}
    for file in out.glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and bits(value) == bits(after[name]), name
    assert_equal_modules(load(out), module)
    written = json.loads((out / "config.json").read_text())
    # Readers that build the text part from its own entries find the ids there, too.
    assert written["eos_token_id"] == written["text_config"]["eos_token_id"] == [2, 5]
    assert generation_defaults(out) == generation


def test_queries_are_reordered_and_values_are_not(vision_golden):
    """Half-split rotation: pairs (2m, 2m + 1) of a head become (m, m + H/2), biases too."""
    folder, _ = vision_golden(NAME)
    theirs, tower = load_file(folder / "model.safetensors"), load(folder).vision
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # one head of 8
    prefix = "vision_model.model.layers.2.self_attn."
    attention = tower.layers.attention
    for name, rows in (("q_proj", order), ("k_proj", order), ("v_proj", range(8))):
        linear, rows = getattr(attention, name), list(rows)
        assert bits(linear.kernel[...][2].T) == bits(theirs[f"{prefix}{name}.weight"][rows])
        assert bits(linear.bias[...][2]) == bits(theirs[f"{prefix}{name}.bias"][rows])


def test_the_text_part_alone(vision_golden, tmp_path):
    folder, golden = vision_golden(NAME)
    whole, text = load(folder), load(folder, text_only=True)
    assert type(whole) is MultimodalDecoder and type(text) is Decoder
    assert text.config == whole.config.text()
    parts = variables(whole)
    assert all(bits(leaf) == bits(parts[name]) for name, leaf in variables(text).items())
    assert {n.split("/")[0] for n in parts.keys() - variables(text).keys()} == {
        "vision", "projection"
    }  # fmt: skip
    # The same from our own format, which is read whole.
    ours = jaxherd.save(whole, tmp_path / "ours")
    assert_equal_modules(load(ours), whole)
    assert_equal_modules(load(ours, text_only=True), text)
    # And from a folder that never had a tower.
    assert_equal_modules(load(save(text, tmp_path / "text", format="hf"), text_only=True), text)


def test_both_prefixes_are_read(vision_golden):
    """Some writers put `model.` before everything but the head."""
    folder, _ = vision_golden(NAME)
    module, tensors = load(folder), load_file(folder / "model.safetensors")
    renamed = {}
    for name, value in tensors.items():
        if name.startswith("language_model.model."):
            name = "model.language_model." + name.removeprefix("language_model.model.")
        elif name == "language_model.lm_head.weight":
            name = "lm_head.weight"
        else:
            name = "model." + name
        renamed[name] = value
    save_file(renamed, folder / "model.safetensors")
    assert_equal_modules(load(folder), module)


def test_all_that_does_not_fit_is_listed_together(vision_golden):
    folder, _ = vision_golden(NAME)
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.surprise"] = np.zeros(2, np.float32)
    tensors["language_model.model.layers.9.input_layernorm.weight"] = np.zeros(2, np.float32)
    del tensors["vision_model.class_embedding"]
    del tensors["language_model.model.norm.weight"]
    tensors["multi_modal_projector.linear_1.weight"] = np.ones((3, 2), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(JaxherdError) as error:
        load(folder)
    text = str(error.value)
    missing, unknown, wrong = text.split("; ")[1:]
    assert "vision_model.class_embedding" in missing
    assert "language_model.model.norm.weight" in missing
    assert "vision_model.surprise" in unknown
    assert "language_model.model.layers.9.input_layernorm.weight" in unknown
    assert "multi_modal_projector.linear_1.weight is (3, 2) instead of (20, 12)" in wrong


def test_a_tower_that_the_config_does_not_name_is_unknown(vision_golden):
    folder, _ = vision_golden(NAME)
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(JaxherdError, match="unknown: .*vision_model.*multi_modal_projector|more"):
        load(folder)
    assert type(load(folder, text_only=True)) is Decoder


TINY_TEXT = presets.llama4_text(
    vocab_size=40, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    num_experts=2, expert_dim=8, dense_dim=12, chunk_size=8, nope_interval=2,
)  # fmt: skip
TINY = MultimodalDecoderConfig.create(
    TINY_TEXT,
    VisionTowerConfig(
        image_size=8, patch_size=2, embed_dim=8, num_layers=1, num_heads=1, hidden_dim=32,
        output_dim=6, rope_theta=50.0, init_std=0.5,
    ),
    patch_token=39, image_start_token=3, image_end_token=4,
)  # fmt: skip


def test_configs_survive_the_way_through_config_json():
    architecture, entries = write_config(TINY)
    assert architecture == "llama4" and read_config(entries) == TINY
    assert read_config(entries, text_only=True) == TINY_TEXT


def test_old_and_new_ways_to_write_theta():
    _, entries = write_config(TINY)
    vision = dict(entries["vision_config"])
    vision["rope_parameters"] = {"rope_theta": vision.pop("rope_theta"), "rope_type": "default"}
    assert read_config({**entries, "vision_config": vision}) == TINY


@pytest.mark.parametrize(
    "changes",
    [{"hidden_dim": 20}, {"embed_dim": 16}],
)
def test_an_adapter_that_hugging_face_cannot_express_says_so(changes):
    config = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, **changes))
    with pytest.raises(JaxherdError, match="format='jaxherd'"):
        write_config(config)
    with pytest.raises(JaxherdError, match="llama4 has the layers"):
        write_config(dataclasses.replace(TINY, repeats=2))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio 0.4 is not one over a whole"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ({"intermediate_size": 24}, "intermediate_size 24 must be .* = 32"),
        ({"vision_output_dim": 7}, "vision_output_dim 7 must be projector_output_dim 6"),
        ({"image_size": 9}, "tile of 9 pixels"),
        ({"image_size": [8, 8]}, "no whole number"),
        ({"num_attention_heads": 4}, "multiple of 4"),
    ],
)
def test_errors_name_the_entry(entries, message):
    _, whole = write_config(TINY)
    with pytest.raises(JaxherdError, match=message):
        read_config({**whole, "vision_config": {**whole["vision_config"], **entries}})
