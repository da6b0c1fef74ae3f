"""The multimodal part of a Llama 4 `config.json`: `vision_config` and the ids of image tokens.

An absent entry means what it does to transformers, whose defaults are not those of any released
model.  The published names hide two demands of the published code: the adapter reads vectors of
`intermediate_size` numbers, which must be what `pixel_shuffle_ratio` makes of `hidden_size`; and all
three widths after it are one.

Source: llama4.md 4 and 6.
"""

from collections.abc import Mapping
from typing import Any

from jaxherd.core.errors import JaxherdError
from jaxherd.models.decoder import DecoderConfig
from jaxherd.models.multimodal_decoder import MultimodalDecoderConfig
from jaxherd.models.vision_tower import VisionTowerConfig
from jaxherd.weights.rope_parameters import read_rope

# Entry of config.json -> (our field, default).
_SIZES = {
    "image_size": ("image_size", 448),
    "patch_size": ("patch_size", 14),
    "num_channels": ("channels", 3),
    "hidden_size": ("embed_dim", 768),
    "num_hidden_layers": ("num_layers", 34),
    "num_attention_heads": ("num_heads", 16),
    "intermediate_size": ("hidden_dim", 5632),
    "projector_output_dim": ("output_dim", 4096),
}
_TOKENS = {
    "image_token_index": ("patch_token", 200092),
    "boi_token_index": ("image_start_token", 200080),
    "eoi_token_index": ("image_end_token", 200081),
}


def read_vision(config: Mapping[str, Any], text: DecoderConfig) -> MultimodalDecoderConfig:
    """Return the multimodal model that a `config.json` with this text part describes.

    Raises:
      JaxherdError: a setting that the published code ignores or cannot run.
    """
    given = config["vision_config"]
    sizes: dict[str, Any] = {
        ours: _whole(given, name, default) for name, (ours, default) in _SIZES.items()
    }
    ratio = float(given.get("pixel_shuffle_ratio", 0.5))
    block = round(1 / ratio) if ratio > 0 else 0
    if block < 1 or abs(block * ratio - 1) > 1e-6:
        raise JaxherdError(
            f"config.json: pixel_shuffle_ratio {ratio} is not one over a whole number."
        )
    activation = given.get("hidden_act", "gelu")
    if activation != "gelu":
        raise JaxherdError(
            f"config.json: the vision tower's hidden_act {activation!r} is not supported; it must "
            "be 'gelu'."
        )
    if sizes["hidden_dim"] != sizes["embed_dim"] * block**2:
        raise JaxherdError(
            f"config.json: the vision tower's intermediate_size {sizes['hidden_dim']} must be "
            f"hidden_size / pixel_shuffle_ratio^2 = {sizes['embed_dim'] * block**2}, which its adapter "
            "reads."
        )
    for name, default in (("projector_input_dim", 4096), ("vision_output_dim", 7680)):
        if _whole(given, name, default) != sizes["output_dim"]:
            raise JaxherdError(
                f"config.json: {name} {_whole(given, name, default)} must be projector_output_dim "
                f"{sizes['output_dim']}."
            )
    tower = VisionTowerConfig(
        **sizes,
        shuffle=block,
        rope_theta=read_rope(given, max_length=1, default_theta=10000.0).theta,
        # The published code has 1e-5 in its norms whatever `norm_eps` says.
        norm_eps=1e-5,
        init_std=float(given.get("initializer_range", 0.02)),
    )
    tokens = {ours: _whole(config, name, default) for name, (ours, default) in _TOKENS.items()}
    return MultimodalDecoderConfig.create(text, tower, **tokens)


def _whole(entries: Mapping[str, Any], name: str, default: int) -> int:
    value = entries.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise JaxherdError(f"config.json: {name} {value!r} is no whole number.")
    return value


def write_vision(config: MultimodalDecoderConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` entries of a multimodal model whose text part has the entries `text`."""
    tower = config.vision
    sizes = {name: getattr(tower, ours) for name, (ours, _) in _SIZES.items()}
    tokens = {name: getattr(config, ours) for name, (ours, _) in _TOKENS.items()}
    vision = {
        "model_type": "llama4_vision_model",
        **sizes,
        "pixel_shuffle_ratio": 1 / tower.shuffle,
        "projector_input_dim": tower.output_dim,
        "vision_output_dim": tower.output_dim,
        "hidden_act": "gelu",
        "norm_eps": tower.norm_eps,
        "initializer_range": tower.init_std,
        "rope_theta": tower.rope_theta,
        "attention_dropout": 0.0,
        "projector_dropout": 0.0,
        "multi_modal_projector_bias": False,
        "vision_feature_select_strategy": "default",
    }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        **tokens,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": {k: v for k, v in text.items() if k != "architectures"},
        "vision_config": vision,
    }
