"""`config.json` of Hugging Face folders to configs of ours and back.

Sources: llama4.md sections 2, 6 and 12; mobilellm.md sections 2 and 3; the meaning of
`no_rope_layers` (1 = the layer uses RoPE) from mobilellm-pro.md section 1.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.layers.attention import AttentionConfig, TemperatureTuning
from jaxherd.layers.feed_forward import FeedForwardConfig
from jaxherd.layers.moe import MoeConfig
from jaxherd.models.decoder import DecoderConfig, LayerConfig
from jaxherd.models.multimodal_decoder import MultimodalDecoderConfig
from jaxherd.models.t5_encoder import T5EncoderConfig
from jaxherd.weights.rope_parameters import plain_rope, read_rope, write_rope
from jaxherd.weights.vision_config import read_vision, write_vision

# Class name or model type in a config.json -> our name of the architecture.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "llama": "llama",
    "MobileLLMForCausalLM": "mobilellm",
    "mobilellm": "mobilellm",
    "Llama4ForCausalLM": "llama4_text",
    "llama4_text": "llama4_text",
    "Llama4ForConditionalGeneration": "llama4",
    "llama4": "llama4",
    "T5EncoderModel": "t5",
    "T5ForConditionalGeneration": "t5",
    "T5Model": "t5",
    "t5": "t5",
}


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return our name of the architecture that a `config.json` describes.

    Raises:
      JaxherdError: none or an unknown one, or quantised weights.
    """
    listed = config.get("architectures")
    named = [name for name in (listed if isinstance(listed, list) else [])]
    named.append(config.get("model_type"))
    for name in named:
        if name in ARCHITECTURES:
            break
    else:
        shown = next((str(name) for name in named if name), "")
        raise JaxherdError(
            f"config.json: the architecture {shown!r} is not known; "
            + nearest(
                shown, [n for n in ARCHITECTURES if n.endswith(("LM", "Generation", "Model"))]
            )
        )
    if config.get("quantization_config") and not stores_fp8(config):
        raise JaxherdError(
            "config.json: of quantised safetensors only fp8 with a scale an output is read "
            "(compressed-tensors, fbgemm_fp8); load the bf16 weights or a GGUF file."
        )
    if ARCHITECTURES[name] == "t5" and config.get("feed_forward_proj", "relu") == "relu":
        return "t5_relu"
    return ARCHITECTURES[name]


def stores_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says that weights are e4m3 with a scale an output.

    That is fbgemm_fp8, or compressed-tensors of which every group has float weights of eight bits
    by channel (llama4.md section 9).
    """
    about = config.get("quantization_config")
    if not isinstance(about, Mapping):
        return False
    if about.get("quant_method") == "fbgemm_fp8":
        return True
    groups = about.get("config_groups")
    if about.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping):
        return False

    def fits(group: Any) -> bool:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        wanted = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        return isinstance(weights, Mapping) and all(weights.get(k) == v for k, v in wanted.items())

    return bool(groups) and all(fits(group) for group in groups.values())


def read_config(config: Mapping[str, Any], *, text_only: bool = False) -> Any:
    """Return the model that a `config.json` describes.

    Args:
      config: the entries.
      text_only: of a multimodal model the text part alone.
    Raises:
      JaxherdError: an unknown architecture, a missing or impossible setting.
    """
    name = architecture_of(config)
    if name == "llama4" and (text_only or not config.get("vision_config")):
        name, config = "llama4_text", config.get("text_config") or config
    try:
        return _READERS[name](config)
    except JaxherdError:
        raise
    except KeyError as error:
        raise JaxherdError(f"config.json lacks the entry {error.args[0]!r}.") from error
    except (TypeError, ValueError) as error:
        raise JaxherdError(f"config.json does not describe a {name} model: {error}.") from error


def _activation(config: Mapping[str, Any]) -> None:
    name = config.get("hidden_act", "silu")
    if name not in ("silu", "swish"):
        raise JaxherdError(f"config.json: hidden_act {name!r} is not supported; it must be 'silu'.")


def _common(config: Mapping[str, Any], default_eps: float, default_length: int) -> dict[str, Any]:
    _activation(config)
    return {
        "vocab_size": int(config["vocab_size"]),
        "embed_dim": int(config["hidden_size"]),
        "norm_eps": float(config.get("rms_norm_eps", default_eps)),
        "init_std": float(config.get("initializer_range", 0.02)),
        "max_length": int(config.get("max_position_embeddings", default_length)),
    }


def _read_llama(config: Mapping[str, Any]) -> DecoderConfig:
    common = _common(config, 1e-6, 2048)
    heads, bias = int(config["num_attention_heads"]), bool(config.get("attention_bias", False))
    attention = AttentionConfig(
        heads,
        int(config.get("num_key_value_heads") or heads),
        int(config.get("head_dim") or common["embed_dim"] // heads),
        rope=read_rope(config, max_length=common["max_length"], default_theta=10000.0),
        qkv_bias=bias,
        out_bias=bias,
        norm_eps=common["norm_eps"],
    )
    feed_forward = FeedForwardConfig(
        int(config["intermediate_size"]), bool(config.get("mlp_bias", False))
    )
    layers = (LayerConfig(attention, feed_forward),) * int(config["num_hidden_layers"])
    return DecoderConfig(
        layers=layers, tie_embeddings=bool(config.get("tie_word_embeddings", False)), **common
    )


def _read_mobilellm(config: Mapping[str, Any]) -> DecoderConfig:
    """Llama with two switches of its own: `share_embedding` and `layer_sharing`.

    The stock `tie_word_embeddings` is false in the published configs and says nothing.
    """
    model = _read_llama(config)
    return dataclasses.replace(
        model,
        tie_embeddings=bool(config.get("share_embedding", True)),
        repeats=2 if config.get("layer_sharing", False) else 1,
    )


def _read_llama4_text(config: Mapping[str, Any]) -> DecoderConfig:
    common = _common(config, 1e-5, 131072)
    count, chunk = int(config["num_hidden_layers"]), config.get("attention_chunk_size", 8192)
    size = None if chunk is None else int(chunk)
    heads, bias = int(config["num_attention_heads"]), bool(config.get("attention_bias", False))
    rope = read_rope(config, max_length=common["max_length"], default_theta=500000.0)
    interval = int(config.get("no_rope_layer_interval") or 4)
    uses_rope = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    if len(uses_rope) < count:
        raise JaxherdError(
            f"config.json: no_rope_layers has {len(uses_rope)} entries for {count} layers."
        )
    kinds = config.get("layer_types") or [
        "chunked_attention" if uses_rope[i] else "full_attention" for i in range(count)
    ]
    if len(kinds) != count or set(kinds) - {"chunked_attention", "full_attention"}:
        raise JaxherdError(
            f"config.json: layer_types must name chunked_attention or full_attention for each of "
            f"the {count} layers."
        )
    routed = config.get("moe_layers")
    if routed is None:
        step = int(config.get("interleave_moe_layer_step", 1))
        if step < 1:
            raise JaxherdError("config.json: interleave_moe_layer_step must be at least 1.")
        routed = range(step - 1, count, step)
    # It was an integer (4) in the first published configs and is a bool since.
    tuned = bool(config.get("attn_temperature_tuning", True))
    temperature = TemperatureTuning(
        int(config.get("floor_scale", 8192)), float(config.get("attn_scale", 0.1))
    )
    expert_dim = int(config["intermediate_size"])

    def layer(i: int) -> LayerConfig:
        rotates, local = bool(uses_rope[i]), kinds[i] == "chunked_attention" and size is not None
        attention = AttentionConfig(
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or 128),
            kind="chunked" if local else "causal",
            size=size if local else None,
            rope=rope if rotates else None,
            # Beyond a million positions float32 phases drift; the scores are the same
            # (llama4.md 2.6).
            rope_positions=(
                "chunk_relative" if local and common["max_length"] > 1_048_576 else "absolute"
            ),
            qk_norm="unit_after_rope" if rotates and config.get("use_qk_norm", True) else "none",
            temperature=temperature if tuned and not rotates else None,
            qkv_bias=bias,
            out_bias=bias,
            norm_eps=common["norm_eps"],
        )
        if i not in routed:
            return LayerConfig(attention, FeedForwardConfig(int(config["intermediate_size_mlp"])))
        moe = MoeConfig(
            int(config.get("num_local_experts", 16)),
            int(config.get("num_experts_per_tok", 1)),
            expert_dim,
            shared_dim=expert_dim,
        )
        return LayerConfig(attention, moe)

    return DecoderConfig(
        layers=tuple(layer(i) for i in range(count)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        **common,
    )


def _read_llama4(config: Mapping[str, Any]) -> MultimodalDecoderConfig:
    return read_vision(config, _read_llama4_text(config["text_config"]))


def _read_t5(config: Mapping[str, Any]) -> T5EncoderConfig:
    kind = config.get("feed_forward_proj", "relu")
    if kind not in ("relu", "gated-gelu"):
        raise JaxherdError(
            f"config.json: feed_forward_proj {kind!r} is not supported; it must be 'relu' or "
            "'gated-gelu'."
        )
    return T5EncoderConfig(
        int(config["vocab_size"]),
        int(config["d_model"]),
        int(config["num_layers"]),
        int(config["num_heads"]),
        int(config["d_kv"]),
        int(config["d_ff"]),
        kind,
        int(config.get("relative_attention_num_buckets", 32)),
        int(config.get("relative_attention_max_distance", 128)),
        float(config.get("layer_norm_epsilon", 1e-6)),
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "t5": _read_t5,
    "t5_relu": _read_t5,
    "llama": _read_llama,
    "mobilellm": _read_mobilellm,
    "llama4": _read_llama4,
    "llama4_text": _read_llama4_text,
}


def write_config(config: Any) -> tuple[str, dict[str, Any]]:
    """Return (architecture, `config.json` entries) for a model that Hugging Face can express.

    Whether it can is decided by reading the entries back and comparing.

    Raises:
      JaxherdError: no known architecture has such layers.
    """
    if isinstance(config, T5EncoderConfig):
        entries = _write_t5(config)
        return architecture_of(entries), entries
    multimodal = isinstance(config, MultimodalDecoderConfig)
    writers: _Writers = {"llama4": _write_llama4} if multimodal else _TEXT_WRITERS
    if not isinstance(config, DecoderConfig):
        raise JaxherdError(
            f"Hugging Face has no form for {type(config).__name__}: save it with format='jaxherd'."
        )
    plain = _plain(config)
    for name, write in writers.items():
        entries = write(plain)
        if entries is None:
            continue
        try:
            same = _plain(read_config(entries)) == plain
        except JaxherdError:
            same = False
        if same:
            return name, entries
    raise JaxherdError(
        f"None of the Hugging Face architectures {', '.join(writers)} has the layers of this "
        "model: save it with format='jaxherd'."
    )


D = TypeVar("D", bound=DecoderConfig)


def _plain(config: D) -> D:
    """Return the config without what changes how a model runs or starts, but not what it is."""
    layers = tuple(
        dataclasses.replace(
            layer,
            attention=dataclasses.replace(
                layer.attention, rope=plain_rope(layer.attention.rope), rope_positions="absolute"
            ),
        )
        for layer in config.layers
    )
    if isinstance(config, MultimodalDecoderConfig):
        tower = dataclasses.replace(config.vision, attention_implementation=None)
        config = dataclasses.replace(config, vision=tower)
    return dataclasses.replace(
        config,
        layers=layers,
        scale_residual_init=False,
        scan_layers=True,
        attention_implementation=None,
        moe_implementation=None,
    )


def _base(config: DecoderConfig, model_type: str, class_name: str) -> dict[str, Any]:
    attention = config.layers[0].attention
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": attention.qkv_bias,
        "attention_dropout": 0.0,
    }


def _write_t5(config: T5EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.embed_dim,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.hidden_dim,
        "feed_forward_proj": config.feed_forward,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
    }


def _write_llama(config: DecoderConfig) -> dict[str, Any] | None:
    layer = config.layers[0]
    if not isinstance(layer.feed_forward, FeedForwardConfig) or layer.attention.rope is None:
        return None
    return {
        **_base(config, "llama", "LlamaForCausalLM"),
        "intermediate_size": layer.feed_forward.hidden_dim,
        "mlp_bias": layer.feed_forward.bias,
        **write_rope(layer.attention.rope),
    }


def _write_mobilellm(config: DecoderConfig) -> dict[str, Any] | None:
    entries = _write_llama(config)
    if entries is None:
        return None
    return {
        **entries,
        "architectures": ["MobileLLMForCausalLM"],
        "model_type": "mobilellm",
        "tie_word_embeddings": False,
        "share_embedding": config.tie_embeddings,
        "layer_sharing": config.repeats == 2,
        # The published modelling code mixes the two uses of a block in its cache.
        "use_cache": config.repeats == 1,
    }


def _write_llama4_text(config: DecoderConfig) -> dict[str, Any] | None:
    layers = config.layers
    moes = [x.feed_forward for x in layers if isinstance(x.feed_forward, MoeConfig)]
    dense = [x.feed_forward for x in layers if isinstance(x.feed_forward, FeedForwardConfig)]
    ropes = [x.attention for x in layers if x.attention.rope is not None]
    tuned = [x.attention.temperature for x in layers if x.attention.temperature is not None]
    sizes = [x.attention.size for x in layers if x.attention.kind == "chunked"]
    rope = ropes[0].rope if ropes else None
    entries = {
        **_base(config, "llama4_text", "Llama4ForCausalLM"),
        "intermediate_size": moes[0].hidden_dim if moes else dense[0].hidden_dim,
        "intermediate_size_mlp": dense[0].hidden_dim if dense else moes[0].hidden_dim,
        "num_local_experts": moes[0].num_experts if moes else 1,
        "num_experts_per_tok": moes[0].top_k if moes else 1,
        "moe_layers": [i for i, x in enumerate(layers) if isinstance(x.feed_forward, MoeConfig)],
        "no_rope_layers": [int(x.attention.rope is not None) for x in layers],
        "layer_types": [
            "chunked_attention" if x.attention.kind == "chunked" else "full_attention"
            for x in layers
        ],
        "attention_chunk_size": sizes[0] if sizes else config.max_length,
        "use_qk_norm": bool(ropes) and ropes[0].qk_norm == "unit_after_rope",
        "attn_temperature_tuning": bool(tuned),
    }
    if tuned:
        entries |= {"floor_scale": tuned[0].floor_scale, "attn_scale": tuned[0].attn_scale}
    return entries | (write_rope(rope) if rope else {})


def _write_llama4(config: MultimodalDecoderConfig) -> dict[str, Any] | None:
    text = _write_llama4_text(config.text())
    return None if text is None else write_vision(config, text)


_Writers = dict[str, Callable[[Any], dict[str, Any] | None]]
_TEXT_WRITERS: _Writers = {
    "llama": _write_llama,
    "mobilellm": _write_mobilellm,
    "llama4_text": _write_llama4_text,
}
