import dataclasses

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.layers.attention import TemperatureTuning
from jaxherd.layers.feed_forward import FeedForwardConfig
from jaxherd.layers.moe import MoeConfig
from jaxherd.layers.rope import RopeConfig, RopeScaling
from jaxherd.models import presets
from jaxherd.weights.hf_config import read_config, write_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA4 = {
    **LLAMA,
    "architectures": ["Llama4ForCausalLM"],
    "num_hidden_layers": 4,
    "head_dim": 8,
    "intermediate_size_mlp": 48,
}


@pytest.mark.parametrize("name", [n for n in presets.PRESETS if n not in ("mobilellm-pro",)])
def test_presets_survive_the_way_through_config_json(name):
    config = presets.preset(name)
    architecture, entries = write_config(config)
    again = read_config(entries)
    same = dataclasses.replace(again, scale_residual_init=config.scale_residual_init)
    assert same == config
    expected = "llama4_text" if "llama4" in name or "behemoth" in name else "llama"
    expected = "llama4" if name.endswith("-multimodal") else expected
    assert architecture == ("mobilellm" if name.endswith("-ls") else expected)


def test_what_hugging_face_cannot_express_says_so():
    for config in (
        presets.mobilellm_pro(),
        dataclasses.replace(presets.smollm2_135m(), repeats=3),
        dataclasses.replace(presets.smollm2_135m(), repeats=2, repeat_order="reverse"),
        presets.llama4_text(selection_bias=True),
    ):
        with pytest.raises(JaxherdError, match="format='jaxherd'"):
            write_config(config)


def test_old_and_new_rope_entries_mean_the_same():
    numbers = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **numbers}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **numbers}}
    expected = RopeConfig(5e5, RopeScaling("llama3", 32.0, 8192, 1.0, 4.0))
    for entries in (old, new):
        assert read_config({**LLAMA, **entries}).layers[0].attention.rope == expected
    legacy = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = read_config({**LLAMA, **legacy}).layers[0].attention.rope
    assert rope == RopeConfig(10000.0, RopeScaling("linear", 2.0))


def test_llama_defaults():
    config = read_config(LLAMA)
    attention = config.layers[0].attention
    assert (attention.num_kv_heads, attention.head_dim, config.norm_eps) == (4, 6, 1e-6)
    assert not config.tie_embeddings


def test_mobilellm_reads_its_own_switches():
    entries = {**LLAMA, "architectures": ["MobileLLMForCausalLM"], "tie_word_embeddings": False}
    assert read_config({**entries, "share_embedding": True}).tie_embeddings
    assert not read_config({**entries, "share_embedding": False}).tie_embeddings
    assert read_config({**entries, "layer_sharing": True}).repeats == 2
    assert read_config({**entries, "layer_sharing": False}).repeats == 1


def test_llama4_defaults_and_lists():
    config = read_config(LLAMA4)
    assert [x.attention.rope is None for x in config.layers] == [False, False, False, True]
    assert [x.attention.kind for x in config.layers] == ["chunked"] * 3 + ["causal"]
    assert all(isinstance(x.feed_forward, MoeConfig) for x in config.layers)
    lists = {"no_rope_layers": [0, 1, 1, 0], "moe_layers": [2], "attn_temperature_tuning": 4}
    config = read_config({**LLAMA4, **lists})
    assert [x.attention.rope is None for x in config.layers] == [True, False, False, True]
    assert [isinstance(x.feed_forward, FeedForwardConfig) for x in config.layers] == [
        True, True, False, True
    ]  # fmt: skip
    assert config.layers[0].attention.temperature == TemperatureTuning(8192, 0.1)
    assert config.layers[1].attention.temperature is None
    assert config.layers[0].feed_forward == FeedForwardConfig(48)
    step = read_config({**LLAMA4, "interleave_moe_layer_step": 2})
    assert [isinstance(x.feed_forward, MoeConfig) for x in step.layers] == [False, True] * 2


def test_the_text_part_of_a_multimodal_config():
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": LLAMA4}
    assert read_config(whole) == read_config(LLAMA4)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({**LLAMA, "architectures": ["LamaForCausalLM"]}, "did you mean 'LlamaForCausalLM'"),
        ({"model_type": "gpt2"}, "'gpt2' is not known.*Choices"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yaarn"}}, "did you mean 'yarn'"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 2}}, "lacks low_freq_factor"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantised"),
        ({**LLAMA, "num_key_value_heads": 3}, "no multiple"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "'hidden_size'"),
        ({**LLAMA4, "no_rope_layers": [1, 0]}, "2 entries for 4 layers"),
        ({**LLAMA4, "layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_errors_name_the_entry(entries, message):
    with pytest.raises(JaxherdError, match=message):
        read_config(entries)
