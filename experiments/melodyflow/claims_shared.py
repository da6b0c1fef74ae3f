"""What the claims about MelodyFlow share: one small codec, its latents, and networks by seed."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.experiment import Experiment
from jaxherd.core.modules import abstract, split
from jaxherd.core.runner import run_experiment
from jaxherd.data.audio.latent_tracks import LatentFolder
from jaxherd.methods.codec_latents import EncodeRecordings
from jaxherd.training.stage import RunConfig, TrainStage, load_model

from . import text_to_music as recipe

Say = Callable[[str], None]
SHARED = "melodyflow-shared"
GROUP = 64


def devices() -> tuple[Any, ...]:
    """Return the one CPU device that every arm runs on."""
    return tuple(jax.devices("cpu")[:1])


def run_stages(name: str, stages: tuple, folder: Path, seed: int, say: Say) -> None:
    """Run the stages that have not finished yet."""
    experiment = Experiment(f"melodyflow/{name}", "cpu", "cpu", stages)
    run_experiment(
        experiment, folder, target="cpu", devices=devices(), seed=seed, say=say, quiet=False
    )


def latents_stages() -> tuple[TrainStage, EncodeRecordings]:
    """Return the codec that all claims about flows share, and the encoding of the recordings."""
    codec = recipe.cpu_codec()
    return codec, EncodeRecordings("latents", codec.model, codec.data)


def flow_stage(coupling_group: int = GROUP) -> TrainStage:
    """Return the small velocity network of the claims: the recipe's, shorter."""
    stage = recipe.cpu_flow(coupling_group)
    return dataclasses.replace(
        stage,
        evaluations=(),
        run_config=RunConfig(steps=600, checkpoint_every=200, loggers=("jsonl",), unit="frames"),
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained flow with the data that it was made from."""

    model: Any
    latents: LatentFolder
    codec_folder: Path


def trained_flow(root: Path, seed: int, coupling_group: int, say: Say) -> Trained:
    """Return the network of a seed, training it and all before it if need be.

    Codec and latents are those of seed 0 for all; the flow's parameters, clips, noise and times
    follow from `seed`.
    """
    base = root / SHARED
    run_stages("codec-and-latents", latents_stages(), base / "codec", 0, say)
    stage = flow_stage(coupling_group)
    folder = base / f"flow-{coupling_group}-{seed}"
    link = folder / "latents"
    if not link.exists():
        folder.mkdir(parents=True, exist_ok=True)
        link.symlink_to(base / "codec" / "latents")
    run_stages("flow", (_Given("latents"), stage), folder, seed, say)
    here = jax.sharding.SingleDeviceSharding(devices()[0])
    definition, *parts = split(abstract(stage.model.build, jax.random.key(0)))
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), parts
    )
    model = definition.merge(*load_model(folder / "flow", *wanted))
    return Trained(model, LatentFolder.open(base / "codec" / "latents"), base / "codec" / "codec")


@dataclasses.dataclass(frozen=True)
class _Given:
    """A stage whose artifacts are there already."""

    name: str
    reads: tuple[str, ...] = ()

    def run(self, context: Any) -> Mapping[str, Any]:
        return {}


def clips(latents: LatentFolder, split_name: str, per_label: int, seed: int) -> dict[str, Any]:
    """Return standardised posterior means: {"latents" [B, T, C], "labels" [B]}, labels in turn."""
    chance = np.random.default_rng(seed)
    found, labels = [], []
    tracks = latents.load(split_name)
    for label in range(len(latents.labels)):
        own = [t for t in tracks if t.label == label and len(t) >= recipe.FRAMES]
        for _ in range(per_label):
            track = own[int(chance.integers(len(own)))]
            start = int(chance.integers(len(track) - recipe.FRAMES + 1))
            found.append(latents.standardise(track.read(start, recipe.FRAMES)[0]))
            labels.append(label)
    return {"latents": jnp.asarray(np.stack(found)), "labels": jnp.asarray(labels, jnp.int32)}


def noise_like(latents: jax.Array, seed: int) -> jax.Array:
    """Return noise of the latents' shape."""
    return jax.random.normal(jax.random.key(seed), latents.shape)


def span(values: list[float], form: str) -> str:
    """Return "least to greatest"."""
    return f"{min(values):{form}} to {max(values):{form}}"


SHARED_TEXT = """\
One codec for all (the recipe's cpu scale, seed 0: 48 kHz stereo, 32 latents at 100 Hz, held-out SNR
3.6 dB), one encoding of 65 recordings under three labels (calm electronic, orchestral, heavy metal),
whole recordings held out.  A velocity network of 1.1 M parameters (width 128, four layers) is
trained for 600 steps of 64 clips of 96 frames (0.96 s) for each seed, coupled within the batch of
64.  All arms of a seed measure the same network on the same held-out clips.
"""

SETTINGS = {"codec": latents_stages(), "flow": flow_stage()}
