"""Music models on disk: the folder of a run of ours, one that `save_music` wrote, or published files.

A saved model is `config.json` with the statistics and the names of labels, and the folders `codec`
and `flow` in the format of `jaxherd.weights.save`.
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from jaxherd.core.errors import JaxherdError, StorageError
from jaxherd.core.experiment import write_json
from jaxherd.data.audio.latent_tracks import INDEX, LatentFolder
from jaxherd.data.audio.latents import TEXT_LENGTH
from jaxherd.data.sources import resolve
from jaxherd.methods.codec_training import CodecTraining
from jaxherd.methods.music_model import MusicModel
from jaxherd.methods.published_music import is_published, load_published
from jaxherd.models.seanet import AudioAutoencoder
from jaxherd.models.velocity_transformer import TextStates, VelocityTransformer
from jaxherd.weights import registry
from jaxherd.weights.load import load
from jaxherd.weights.save import check_target, save
from jaxherd.weights.trained import load_trained

FORMAT, VERSION = "jaxherd-music", 1


def load_music(
    source: str | os.PathLike[str],
    *,
    codec: str = "codec",
    latents: str = "latents",
    flow: str = "flow",
    text_encoder: str | None = None,
    dtype: Any = None,
) -> MusicModel:
    """Return the music model at `source`.

    Args:
      source: the folder of a run, one that `save_music` wrote, or one of the two files that were
        published (`jaxherd.methods.published_music`), as `resolve` takes it.
      codec, latents, flow: names of a run's stages.
      text_encoder: source of the T5 encoder with its tokenizer, in place of the one that the model
        names (where the folder lies elsewhere now, say); its states must be of the same width.
      dtype: of all weights; None keeps the checkpoint's own.
    Raises:
      JaxherdError: none of the three, a stage that has not run yet, parts that do not fit, or a text
        encoder for a model whose conditions are no texts.
    """
    model = _load(source, codec, latents, flow, dtype)
    if text_encoder is None:
        return model
    if not isinstance(model.velocity.config.conditioner, TextStates):
        kind = "labels" if model.labels else "nothing"
        raise JaxherdError(
            f"text_encoder={text_encoder!r}: the model at {os.fspath(source)!r} is conditioned on "
            f"{kind}, not on texts: leave it away."
        )
    return dataclasses.replace(model, text_encoder=text_encoder)


def _load(
    source: str | os.PathLike[str], codec: str, latents: str, flow: str, dtype: Any
) -> MusicModel:
    folder = resolve(os.fspath(source))
    path = folder / "config.json"
    if path.is_file() and registry.read_json(path).get("format") == FORMAT:
        return _load_saved(folder, dtype)
    if is_published(folder):
        return load_published(folder, dtype=dtype)
    return _load_run(folder, codec, latents, flow, dtype)


def save_music(model: MusicModel, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Write a music model to a new folder, whole or not at all, and return its path.

    Raises:
      JaxherdError: the folder is not empty or cannot be made.
      StorageError: the disk could not be written; nothing is left of it.
    """
    target = check_target(folder)
    entries = {
        "format": FORMAT,
        "version": VERSION,
        "sample_rate": model.sample_rate,
        "labels": list(model.labels),
        "mean": np.asarray(model.mean, np.float64).tolist(),
        "std": np.asarray(model.std, np.float64).tolist(),
        "text_encoder": model.text_encoder,
        "clip_seconds": model.clip_seconds,
        "text_length": model.text_length,
    }
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        scratch.chmod(0o755)
        save(model.autoencoder, scratch / "codec")
        save(model.velocity, scratch / "flow")
        write_json(scratch / "config.json", entries)
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except OSError as error:
        raise StorageError(
            f"{str(target)!r} could not be written ({error.strerror or error}): make room or choose "
            "another folder."
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _load_saved(folder: pathlib.Path, dtype: Any) -> MusicModel:
    entries = registry.read_json(folder / "config.json")
    if entries.get("version") != VERSION:
        raise JaxherdError(
            f"{str(folder)!r} is in version {entries.get('version')!r} of our music format; this "
            f"jaxherd reads {VERSION}."
        )
    try:
        words = {
            "labels": tuple(str(label) for label in entries["labels"]),
            "text_encoder": entries["text_encoder"],
            "clip_seconds": float(entries["clip_seconds"]),
            # Models of before had no other limit than that of their training, which was this.
            "text_length": int(entries.get("text_length", TEXT_LENGTH)),
        }
        statistics = [np.asarray(entries[name], np.float32) for name in ("mean", "std")]
        rate = int(entries["sample_rate"])
    except (KeyError, TypeError, ValueError) as error:
        raise JaxherdError(
            f"{str(folder / 'config.json')!r} is damaged ({type(error).__name__}: {error}): save "
            "the model again."
        ) from error
    autoencoder, velocity = (load(folder / name, dtype=dtype) for name in ("codec", "flow"))
    return _model(autoencoder, velocity, *statistics, rate, **words)


def _load_run(folder: pathlib.Path, codec: str, latents: str, flow: str, dtype: Any) -> MusicModel:
    wanted = {
        codec: folder / codec / "checkpoints",
        latents: folder / latents / INDEX,
        flow: folder / flow / "checkpoints",
    }
    absent = [name for name, path in wanted.items() if not path.exists()]
    if absent:
        raise JaxherdError(
            f"{str(folder)!r} is no music model: the stage {absent[0]!r} has left nothing there; "
            "name the folder of a run such as `jaxherd run melodyflow/text_to_music` leaves, after "
            "its last stage has begun, one that save_music wrote, or one with a published "
            "state_dict.bin and compression_state_dict.bin."
        )
    index = LatentFolder.open(folder / latents)
    stage = registry.read_json(folder / flow / "config.json").get("stage") or {}
    data = stage.get("data") or {}
    frames = data.get("frames")
    trained = load_trained(folder / codec, dtype)
    if isinstance(trained, CodecTraining):
        trained = trained.autoencoder
    return _model(
        trained,
        load_trained(folder / flow, dtype),
        index.mean_L,
        index.std_L,
        index.sample_rate,
        labels=index.labels,
        text_encoder=_text_encoder(folder, latents),
        clip_seconds=frames / index.frame_rate if frames else 10.0,
        text_length=data.get("text_length") or TEXT_LENGTH,
    )


def _model(autoencoder: Any, velocity: Any, *arguments: Any, **words: Any) -> MusicModel:
    if not isinstance(autoencoder, AudioAutoencoder) or not isinstance(
        velocity, VelocityTransformer
    ):
        raise JaxherdError(
            f"a music model is an audio autoencoder and a velocity network, not a "
            f"{type(autoencoder).__name__} and a {type(velocity).__name__}."
        )
    return MusicModel(autoencoder, velocity, *arguments, **words)


def _text_encoder(folder: pathlib.Path, latents: str) -> str | None:
    """Return the source of the text encoder by which a run's recordings were described."""
    if not (folder / "run.json").is_file():
        return None
    experiment = registry.read_json(folder / "run.json").get("experiment") or {}
    for stage in experiment.get("stages") or []:
        if isinstance(stage, dict) and stage.get("name") == latents:
            return stage.get("text_encoder")
    return None
