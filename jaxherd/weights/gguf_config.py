"""The `llama.*` metadata of a GGUF file to `DecoderConfig`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.layers.attention import AttentionConfig
from jaxherd.layers.feed_forward import FeedForwardConfig
from jaxherd.layers.rope import RopeConfig, RopeScaling
from jaxherd.models.decoder import DecoderConfig, LayerConfig
from jaxherd.weights.stores import TensorStore

ROPE_FACTORS = "rope_freqs.weight"


def read_gguf_config(metadata: Mapping[str, Any], store: TensorStore) -> DecoderConfig:
    """Return the model that a GGUF file holds; its embeddings are tied when it has no output.

    Raises:
      JaxherdError: another architecture than `llama`, routed experts, or a missing entry.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise JaxherdError(
            f"{store.where!r}: the GGUF architecture {architecture!r} is not known; known: llama."
        )
    if metadata.get("llama.expert_count"):
        raise JaxherdError(f"{store.where!r}: GGUF models with routed experts are not read.")

    def entry(name: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{name}", default)
        if not isinstance(value, int | float | str):
            raise JaxherdError(
                f"{store.where!r}: the GGUF entry 'llama.{name}' is absent or a list."
            )
        return value

    if "token_embd.weight" not in store.shapes:
        raise JaxherdError(f"{store.where!r} holds no token_embd.weight, so it is no whole model.")
    width, heads = int(entry("embedding_length")), int(entry("attention.head_count"))
    head_dim = int(entry("attention.key_length", width // heads))
    if int(entry("attention.value_length", head_dim)) != head_dim:
        raise JaxherdError(f"{store.where!r}: key and value heads of different size are not read.")
    if int(entry("rope.dimension_count", head_dim)) != head_dim:
        raise JaxherdError(f"{store.where!r}: RoPE on a part of the head is not read for llama.")
    length, eps = int(entry("context_length")), float(entry("attention.layer_norm_rms_epsilon"))
    eps = float(np.format_float_positional(np.float32(eps)))  # 1e-5, not 9.99999974e-06
    qkv_bias, out_bias, ffn_bias = (
        f"blk.0.{name}.bias" in store.shapes for name in ("attn_q", "attn_output", "ffn_up")
    )
    attention = AttentionConfig(
        heads,
        int(entry("attention.head_count_kv", heads)),
        head_dim,
        rope=RopeConfig(float(entry("rope.freq_base", 10000.0)), _scaling(metadata, store, length)),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        norm_eps=eps,
    )
    layer = LayerConfig(attention, FeedForwardConfig(int(entry("feed_forward_length")), ffn_bias))
    return DecoderConfig(
        vocab_size=int(store.shapes["token_embd.weight"][0]),
        embed_dim=width,
        layers=(layer,) * int(entry("block_count")),
        norm_eps=eps,
        tie_embeddings="output.weight" not in store.shapes,
        max_length=length,
    )


def _scaling(metadata: Mapping[str, Any], store: TensorStore, length: int) -> RopeScaling | None:
    if ROPE_FACTORS in store.shapes:
        # Llama 3's scaling arrives as one divisor a frequency.
        divisors = tuple(float(x) for x in store.read(ROPE_FACTORS).reshape(-1))
        return RopeScaling(
            "longrope",
            original_length=length,
            short_factor=divisors,
            long_factor=divisors,
            attention_factor=1.0,
        )
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = float(metadata.get("llama.rope.scaling.factor", 1.0))
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=factor)
    if kind == "yarn":
        original = int(metadata.get("llama.rope.scaling.original_context_length", length))
        return RopeScaling("yarn", factor=factor, original_length=original)
    raise JaxherdError(f"{store.where!r}: the GGUF RoPE scaling {kind!r} is not read.")
