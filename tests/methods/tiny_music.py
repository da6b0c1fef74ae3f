"""Music models of a few thousand random parameters, and a run's folder of one."""

import json
import pathlib

import jax
import numpy as np

from jaxherd.core.experiment import describe, write_json
from jaxherd.core.modules import split
from jaxherd.data.audio.latent_tracks import INDEX
from jaxherd.data.audio.latents import LatentClips
from jaxherd.methods.codec_training import CodecTrainingConfig
from jaxherd.methods.music_model import MusicModel
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.velocity_transformer import LabelEmbedding, VelocityTransformerConfig
from jaxherd.training.checkpoints import Checkpoints

RATE = 8000
LABELS = ("calm electronic music", "orchestral music", "heavy metal")
CODEC = CodecTrainingConfig(
    AudioAutoencoderConfig(SeanetConfig(2, 4, 4, ratios=(4, 2), lstm=1), RATE), None
)
# Two frames a second: hours of sound are soon encoded.
SLOW = CodecTrainingConfig(
    AudioAutoencoderConfig(SeanetConfig(2, 4, 2, ratios=(40, 100), lstm=0), RATE), None
)
FLOW = VelocityTransformerConfig(16, 3, 2, latent_dim=4, conditioner=LabelEmbedding(len(LABELS)))
MEAN, STD = np.linspace(-1, 1, 4, dtype="f4"), np.linspace(0.5, 2, 4, dtype="f4")


def modules(seed: int = 0, codec: CodecTrainingConfig = CODEC):
    """Return (codec training, velocity network)."""
    build = jax.jit(lambda key: (codec.build(key), FLOW.build(jax.random.fold_in(key, 1))))
    return build(jax.random.key(seed))


def music_model(seed: int = 0, codec: CodecTrainingConfig = CODEC) -> MusicModel:
    """Return a model with labels."""
    training, velocity = modules(seed, codec)
    return MusicModel(training.autoencoder, velocity, MEAN, STD, RATE, LABELS, clip_seconds=0.05)


def tone(seconds: float = 0.05, rows: int = 1, channels: int = 2) -> np.ndarray:
    """Return waves [rows, T, channels] of different pitch."""
    t = np.arange(round(seconds * RATE)) / RATE
    hertz = 300.0 * (1 + np.arange(rows))[:, None, None]
    wave = 0.4 * np.sin(2 * np.pi * hertz * t[None, :, None])
    return np.repeat(wave, channels, axis=2).astype(np.float32)


def write_run(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Write what a run of the recipe leaves: two checkpoints and the index of the latents."""
    codec, velocity = modules(seed)
    stages = {"codec": (CODEC, codec, {}), "flow": (FLOW, velocity, LatentClips(frames=50))}
    for name, (config, module, data) in stages.items():
        _, params, buffers = split(module)
        checkpoints = Checkpoints(folder / name / "checkpoints")
        checkpoints.save(1, {"params": params, "buffers": buffers}, None)
        checkpoints.close()
        stage = {"name": name, "model": describe(config), "data": describe(data)}
        write_json(folder / name / "config.json", {"stage": stage})
    index = {
        "frame_rate": RATE / 8,
        "sample_rate": RATE,
        "latent_dim": 4,
        "labels": list(LABELS),
        "mean": MEAN.tolist(),
        "std": STD.tolist(),
        "tracks": [],
    }
    (folder / "latents").mkdir()
    (folder / "latents" / INDEX).write_text(json.dumps(index))
    return folder
