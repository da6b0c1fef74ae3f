"""A music model as it was published: two files, each of tensors and of the text of a configuration.

    state_dict.bin              the velocity network, with the statistics of the latents
    compression_state_dict.bin  the codec

They are zip files of torch; no pickle in them is run.  Files of the same names ending in
.safetensors hold the tensors of `best_state`, and the text as the entry `xp.cfg` of their metadata.

Source: melodyflow.md 3.5.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, cast_floating, flatten, split, unflatten
from jaxherd.data.sources import resolve
from jaxherd.methods.music_model import MusicModel
from jaxherd.models.seanet import AudioAutoencoder, AudioAutoencoderConfig
from jaxherd.weights.melodyflow_codec import melodyflow_codec_params
from jaxherd.weights.melodyflow_config import XpConfig, codec_config, flow_settings
from jaxherd.weights.melodyflow_flow import FlowCheckpoint, flow_config, read_flow_state
from jaxherd.weights.stores import safetensors_and_metadata
from jaxherd.weights.torch_zip import read_torch_zip

FLOW, CODEC = "state_dict", "compression_state_dict"
# Audiocraft cuts no text; T5 was trained on texts of as many tokens.
TEXT_LENGTH = 512
_SUFFIXES = (".bin", ".safetensors")


def is_published(folder: pathlib.Path) -> bool:
    """Return whether a folder holds one of the two files."""
    return any(_file(folder, name) is not None for name in (FLOW, CODEC))


def published_folder(source: str | os.PathLike[str]) -> pathlib.Path | None:
    """Return the local folder of published files that `source` is, or is one of the files of.

    A file beside a config.json is some other model's; None is what is nothing of the kind.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return path if is_published(path) else None
    named = path.stem in (FLOW, CODEC) and path.suffix in _SUFFIXES and path.is_file()
    return path.parent if named and not (path.parent / "config.json").exists() else None


def load_published(
    source: str | os.PathLike[str], *, text_encoder: str | None = None, dtype: Any = None
) -> MusicModel:
    """Return the music model in a folder of the two published files.

    Args:
      source: the folder, as `resolve` takes it.
      text_encoder: source of the T5 encoder with its tokenizer, which the files do not hold; the
        one that the configuration names when None.
      dtype: of all weights; None keeps those of the flow, and float32 for the codec.
    Raises:
      JaxherdError: a file that is absent, damaged or holds anything but tensors and plain values,
        without a configuration, with one that contradicts the tensors, and missing and unknown
        keys in either, all of one kind in one message.
    """
    folder = resolve(os.fspath(source))
    flow, settings = _flow(*_read(folder, FLOW))
    autoencoder = _codec(*_read(folder, CODEC))
    return MusicModel(
        cast_floating(autoencoder, dtype),
        cast_floating(flow.module, dtype),
        np.asarray(flow.latent_mean_C, np.float32),
        np.asarray(flow.latent_std_C, np.float32),
        autoencoder.config.sample_rate,
        text_encoder=text_encoder or settings.text_encoder,
        clip_seconds=settings.clip_seconds,
        text_length=TEXT_LENGTH,
    )


def _flow(state: Mapping[str, np.ndarray], config: XpConfig) -> tuple[FlowCheckpoint, Any]:
    settings = flow_settings(config)
    try:
        # The sizes first: with a wrong width nothing else would fit either.
        told = flow_config(state, **settings.hidden)
        settings.check(told, config.where)
        return read_flow_state(state, **settings.hidden), settings
    except JaxherdError as error:
        raise _at(config, error) from error


def _codec(state: Mapping[str, np.ndarray], config: XpConfig) -> AudioAutoencoder:
    wanted: AudioAutoencoderConfig = codec_config(config)
    try:
        params = melodyflow_codec_params(state, wanted)
    except JaxherdError as error:
        raise _at(config, error) from error
    definition, _, buffers = split(abstract(wanted.build, jax.random.key(0)))
    # The flow's file has the statistics; these are for a codec in training.
    shapes = flatten(buffers).items()
    ones = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes}
    ones = {path: x + 1 if path.endswith("latent_std") else x for path, x in ones.items()}
    return definition.merge(jax.tree.map(jnp.asarray, params), unflatten(ones))


def _at(config: XpConfig, error: JaxherdError) -> JaxherdError:
    text = str(error)
    return error if text.startswith(config.where) else JaxherdError(f"{config.where}: {text}")


def _file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    return next((p for s in _SUFFIXES if (p := folder / f"{name}{s}").is_file()), None)


def _read(folder: pathlib.Path, name: str) -> tuple[dict[str, np.ndarray], XpConfig]:
    """Return (tensors by name, the configuration) of one of the two files."""
    path = _file(folder, name)
    if path is None:
        raise JaxherdError(
            f"{str(folder)!r} has no {name}.bin (or .safetensors): a published music model is "
            f"{FLOW}.bin and {CODEC}.bin together."
        )
    where = repr(str(path))
    if path.suffix == ".safetensors":
        state, entries = safetensors_and_metadata(path)
        text: Any = entries.get("xp.cfg")
    else:
        package = read_torch_zip(path)
        if not isinstance(package, dict):
            raise JaxherdError(f"{where} holds a {type(package).__name__} and no dictionary.")
        if isinstance(package.get("pretrained"), str):
            raise JaxherdError(
                f"{where} only names another model, {package['pretrained']!r}: fetch that one's "
                "own file."
            )
        text, state = package.get("xp.cfg"), package.get("best_state")
        # A checkpoint that was never exported has its states by the part of the run.
        if isinstance(state, dict) and set(state) == {"model"}:
            state = state["model"]
    if not isinstance(text, str):
        raise JaxherdError(
            f"{where} has no text of a configuration under 'xp.cfg', without which its tensors "
            "cannot be read: fetch the published file, or export it by audiocraft again."
        )
    if not isinstance(state, dict) or not state:
        raise JaxherdError(f"{where} has no tensors under 'best_state'.")
    others = sorted(str(key) for key, x in state.items() if not isinstance(x, np.ndarray))
    if others:
        raise JaxherdError(f"{where}: under 'best_state' these are no tensors: {others}.")
    return {str(key): value for key, value in state.items()}, XpConfig(text, where)
