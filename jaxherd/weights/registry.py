"""Which config classes a checkpoint of ours may name, and how it is laid out.

Our format is a folder with `config.json` (`{"format": "jaxherd", "version": 1, "model": ...}`)
and safetensors whose names are `params/<path>` and `buffers/<path>`.
"""

import json
import pathlib
from typing import Any

from jaxherd.core.config_io import from_dict, to_dict
from jaxherd.core.errors import JaxherdError
from jaxherd.data.ngrams import NgramConfig
from jaxherd.layers.attention import AttentionConfig, TemperatureTuning
from jaxherd.layers.averaged_quantiser import AveragedQuantiserConfig
from jaxherd.layers.feed_forward import FeedForwardConfig
from jaxherd.layers.moe import MoeConfig
from jaxherd.layers.rope import RopeConfig, RopeScaling
from jaxherd.layers.vector_quantiser import QuantiserConfig
from jaxherd.layers.weight_format import WeightFormat
from jaxherd.models.decoder import DecoderConfig, LayerConfig
from jaxherd.models.multimodal_decoder import MultimodalDecoderConfig
from jaxherd.models.ngram_classifier import NgramClassifierConfig
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.stft_discriminator import StftDiscriminatorConfig
from jaxherd.models.t5_encoder import T5EncoderConfig
from jaxherd.models.velocity_transformer import (
    LabelEmbedding,
    TextStates,
    VelocityTransformerConfig,
)
from jaxherd.models.vision_tower import VisionTowerConfig

FORMAT, VERSION = "jaxherd", 1

# A model's config class joins this list to be saved and loaded; it needs `build(key)`.  Classes of
# higher floors join it where they are defined.
CONFIG_CLASSES: list[type] = [
    AttentionConfig,
    AudioAutoencoderConfig,
    DecoderConfig,
    FeedForwardConfig,
    LabelEmbedding,
    LayerConfig,
    MoeConfig,
    MultimodalDecoderConfig,
    NgramClassifierConfig,
    NgramConfig,
    QuantiserConfig,
    AveragedQuantiserConfig,
    RopeConfig,
    RopeScaling,
    SeanetConfig,
    StftDiscriminatorConfig,
    T5EncoderConfig,
    TemperatureTuning,
    TextStates,
    VelocityTransformerConfig,
    VisionTowerConfig,
    WeightFormat,
]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      JaxherdError: it is absent, damaged or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JaxherdError(f"There is no {path.name} in {str(path.parent)!r}.") from None
    except (OSError, ValueError) as error:
        raise JaxherdError(f"{str(path)!r} is no valid JSON ({error}).") from error
    if not isinstance(data, dict):
        raise JaxherdError(f"{str(path)!r} holds no JSON object.")
    return data


def own_config(data: dict[str, Any], where: str) -> Any:
    """Return the config of a folder in our format.

    Raises:
      JaxherdError: a later version, or an entry that does not fit.
    """
    if data.get("version") != VERSION:
        raise JaxherdError(
            f"{where} is in version {data.get('version')!r} of our format; this jaxherd reads "
            f"{VERSION}."
        )
    config = from_dict(data.get("model"), CONFIG_CLASSES, where="model")
    if not hasattr(config, "build"):
        raise JaxherdError(f"{where}: {type(config).__name__} is a part of a model, not a model.")
    return config


def own_entries(config: Any) -> dict[str, Any]:
    """Return the `config.json` of our format.

    Raises:
      JaxherdError: the config's class is not registered.
    """
    data = to_dict(config)
    from_dict(data, CONFIG_CLASSES, where="model")  # what we write, we can read
    return {"format": FORMAT, "version": VERSION, "model": data}
