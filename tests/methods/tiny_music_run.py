"""Codec, latents, flow and samples as one experiment, tiny; the recordings' folder is $JAXHERD_TEST_MUSIC."""

import os

from jaxherd.core.experiment import Experiment
from jaxherd.core.layouts import Layout
from jaxherd.data.audio.clips import AudioClips
from jaxherd.data.audio.latents import LatentClips
from jaxherd.data.audio.tracks import AudioGroup
from jaxherd.methods.codec_latents import EncodeRecordings
from jaxherd.methods.codec_losses import MultiScaleMel
from jaxherd.methods.codec_training import CodecTrainingConfig, ReconstructionCodec
from jaxherd.methods.flow_matching import FlowMatching
from jaxherd.methods.flow_sampling import SamplingPlan
from jaxherd.methods.music_samples import SampleMusic
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.velocity_transformer import LabelEmbedding, VelocityTransformerConfig
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import RunConfig, StepConfig, TrainStage

RATE, WIDTH, LABELS = 2000, 4, ("slow", "fast")


def experiment(scale) -> Experiment:
    """Return the run; the same at every scale."""
    root = os.environ["JAXHERD_TEST_MUSIC"]
    groups = tuple(AudioGroup(name, (os.path.join(root, name),)) for name in LABELS)
    seanet = SeanetConfig(channels=1, dimension=WIDTH, n_filters=4, ratios=(5, 2), lstm=0)
    optimizer = Optimizer(schedule=Schedule(3e-3, "constant", 0), weight_decay=0.0)
    settings = dict(steps=6, checkpoint_every=6, loggers=("jsonl",))
    codec = TrainStage(
        name="codec",
        model=CodecTrainingConfig(AudioAutoencoderConfig(seanet, RATE, initial_std=0.05), None),
        data=AudioClips(groups, RATE, 1, 500, batch_size=4, heldout_fraction=0.3),
        objective=ReconstructionCodec(mel=MultiScaleMel(exponents=(6,), n_mels=8, f_min=20.0)),
        optimizer=optimizer,
        layout=Layout("data", fsdp=1, data=-1),
        run_config=RunConfig(**settings, unit="samples"),
    )
    velocity = VelocityTransformerConfig(16, 2, 2, latent_dim=WIDTH, conditioner=LabelEmbedding(2))
    clips = LatentClips(
        latent_dim=WIDTH, frames=16, batch_size=8, coupling_group=4, min_frames=4, shorter_clips=0.5
    )
    flow = TrainStage(
        name="flow",
        model=velocity,
        data=clips,
        objective=FlowMatching(),
        optimizer=optimizer,
        layout=Layout("fsdp"),
        step=StepConfig(average_decay=0.5),
        run_config=RunConfig(**settings, unit="frames"),
        reads=("latents",),
    )
    stages = (
        codec,
        EncodeRecordings("latents", codec.model, codec.data, frames_per_chunk=64),
        flow,
        SampleMusic("samples", velocity, clips, 4, SamplingPlan(4), layout=Layout("fsdp"), keep=2),
    )
    return Experiment("tests/tiny_music_run", scale, "cpu", stages, "A tiny music run.")
