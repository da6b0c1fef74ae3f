"""MelodyFlow: a 48 kHz stereo codec, then rectified flow in its latents, conditioned on words.

What it reproduces: "High Fidelity Text-Guided Music Generation and Editing via Single-Stage Flow
Matching" (arXiv 2407.03648), spec melodyflow.md: a SEANet autoencoder at 25 Hz (section 2), a
transformer with U-shaped skips of 1B parameters as velocity (section 3), flow matching with
mini-batch optimal-transport coupling (section 4).  Its training data (16,000 hours of licensed
music) is not public.  Optimiser, batch size, steps and the codec's ratios and widths were not
recovered: the values here are audiocraft's and jaxherd's, not the paper's.

Stages: `codec` trains the autoencoder with its discriminator; `latents` encodes every recording;
`flow` trains the velocity network; `samples` draws clips from it with
64 midpoint evaluations and writes them as sound.

Scales
  cpu   48 kHz stereo, 32 latents at 100 Hz (a small codec at the paper's 25 Hz did not learn the
        waveform in minutes, see the README), three groups of recordings from Debian packages as the
        three labels; codec without a discriminator; flow of 1.1M parameters on 0.96 s.
        About 15 minutes on two cores.
  gpu   the small network (400M) on one host of 8 GPUs, 30 s clips, T5 states as conditions.
  full  the medium network (1B) on v5e:8x8, 30 s clips, T5 states as conditions.
        Reported for the released model on MusicCaps: FAD 4.79, KLD 1.28, CLAP 0.29 [card].

Commands
  pip install '.[demo,audio]'
  jaxherd run  melodyflow/text_to_music --on cpu
  jaxherd plan melodyflow/text_to_music --on v5e:8x8 --stage flow      (or --stage samples)
  jaxherd music generate runs/melodyflow-text_to_music-cpu --prompt "orchestral music" --out a.wav
"""

import dataclasses

from jaxherd.core.experiment import Experiment, Scale
from jaxherd.core.layouts import Layout
from jaxherd.data.audio.clips import AudioClips
from jaxherd.data.audio.latents import LatentClips
from jaxherd.data.audio.tracks import AudioGroup
from jaxherd.methods.balancer import BalancerConfig
from jaxherd.methods.codec_latents import EncodeRecordings
from jaxherd.methods.codec_losses import LossWeights, MultiScaleMel
from jaxherd.methods.codec_training import (
    AdversarialCodec,
    CodecTrainingConfig,
    ReconstructionCodec,
)
from jaxherd.methods.flow_matching import FlowMatching
from jaxherd.methods.music_samples import SampleMusic
from jaxherd.models import codec_presets, velocity_transformer
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.velocity_transformer import LabelEmbedding, VelocityTransformerConfig
from jaxherd.training.guards import Guards
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, RunConfig, StepConfig, TrainStage

# Real 48 kHz and 44.1 kHz music that anybody can have, under free licences; whole tracks are held
# out.  The labels are what a listener would call them.
GROUPS = (
    AudioGroup("calm electronic music", ("deb://singularity-music==007-2",)),
    AudioGroup("orchestral music", ("deb://wesnoth-1.16-music==1:1.16.9-1",)),
    AudioGroup(
        "heavy metal",
        (
            "deb://fretsonfire-songs-muldjord==2.dfsg-2.1",
            "deb://fretsonfire-songs-sectoid==1.dfsg-3.1",
        ),
        "song.ogg",
    ),
)
LATENTS, FRAMES = 32, 96


def experiment(scale: Scale) -> Experiment:
    """Return codec, latents and flow at a scale."""
    stages = {"cpu": _cpu, "gpu": _gpu, "full": _full}[scale]()
    target = {"cpu": "cpu", "gpu": "gpu:8", "full": "v5e:8x8"}[scale]
    summary = "A 48 kHz stereo codec and text-conditioned rectified flow in its latents."
    return Experiment("melodyflow/text_to_music", scale, target, stages, summary)


def cpu_codec(bottleneck: str = "gaussian") -> TrainStage:
    """Return the small codec's training; `bottleneck` may be "rvq" at the same frame rate."""
    codec = AudioAutoencoderConfig(
        SeanetConfig(dimension=LATENTS, n_filters=12, ratios=(10, 8, 6), lstm=0),
        initial_std=0.02,
    )
    if bottleneck == "rvq":
        codec = codec_presets.quantised(codec, stages=8, codes=256)
    # More weight on the waveform than audiocraft's 0.1 to 2: so short a training learns the phase of
    # nothing else.  MelodyFlow's own weights are not published, nor is that of the KL.
    objective = ReconstructionCodec(
        weights=LossWeights(waveform=2.0, mel=0.1, kl=1e-5),
        mel=MultiScaleMel(exponents=(8, 11)),
        balancer=BalancerConfig(per_batch_item=False),
        waveform_loss="relative",
    )
    return TrainStage(
        name="codec",
        model=CodecTrainingConfig(codec, None),
        data=AudioClips(
            GROUPS, clip_samples=24_000, batch_size=4, eval_batch_size=8, min_level_db=-40.0
        ),
        objective=objective,
        # Audiocraft does not clip; at this learning rate single clips would undo much.
        optimizer=Optimizer(
            schedule=Schedule(2e-3, "cosine", 50, final=0.05),
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.0,
            clip=1.0,
        ),
        layout=Layout("single"),
        step=StepConfig(average_decay=0.99),
        # One bad step is made good by the next ones; skipping them would keep what it did.
        guards=Guards(spike_sigmas=None),
        run_config=RunConfig(steps=1500, eval_every=250, checkpoint_every=250, unit="samples"),
        evaluations=(
            Evaluation("heldout", objective=dataclasses.replace(objective, sample=False)),
        ),
    )


def cpu_flow(coupling_group: int = 64) -> TrainStage:
    """Return the small velocity network's training; a coupling group of 1 pairs independently."""
    objective = FlowMatching(condition_dropout=0.2)
    return TrainStage(
        name="flow",
        model=VelocityTransformerConfig(
            128, 4, 4, latent_dim=LATENTS, conditioner=LabelEmbedding(len(GROUPS))
        ),
        data=LatentClips(
            latent_dim=LATENTS,
            frames=FRAMES,
            batch_size=64,
            eval_batch_size=32,
            coupling_group=coupling_group,
        ),
        objective=objective,
        optimizer=Optimizer(schedule=Schedule(1e-3, "cosine", 100, final=0.05), weight_decay=0.01),
        layout=Layout("single"),
        step=StepConfig(average_decay=0.99),
        run_config=RunConfig(steps=1500, eval_every=500, checkpoint_every=250, unit="frames"),
        evaluations=(Evaluation("heldout", objective=objective.evaluation()),),
        reads=("latents",),
    )


def _cpu() -> tuple:
    codec = cpu_codec()
    flow = cpu_flow()
    samples = SampleMusic("samples", flow.model, flow.data)
    return codec, EncodeRecordings("latents", codec.model, codec.data), flow, samples


def _large(flow: VelocityTransformerConfig, batch: int, coupling_group: int) -> tuple:
    music = (AudioGroup("music", ("music",)),)
    # Half of the mel loss's share: not published, nor is whether the paper's codec has this loss.
    codec_objective = AdversarialCodec(weights=LossWeights(stft=1.0))
    codec = TrainStage(
        name="codec",
        model=CodecTrainingConfig(codec_presets.melodyflow_codec(), stft_slot=True),
        # Point it, and the stage `latents`, at your own recordings:
        # --set codec.data.groups.0.sources.0=/path/to/music and latents.data... likewise.
        data=AudioClips(music, clip_samples=48_000, batch_size=64),
        objective=codec_objective,
        optimizer=Optimizer(
            schedule=Schedule(3e-4, "constant", 0),
            beta1=0.5,
            beta2=0.9,
            weight_decay=0.0,
            clip=None,
        ),
        layout=Layout("data", fsdp=1, data=-1),
        step=StepConfig(average_decay=0.99),
        run_config=RunConfig(steps=400_000, eval_every=2000, checkpoint_every=2000, unit="samples"),
        evaluations=(Evaluation("heldout", objective=codec_objective.evaluation()),),
    )
    # 24 heads' scores of 752 frames would not fit beside each other: layers are computed again.
    objective = FlowMatching(remat="full")
    # The assignment is solved where the data is read, so a group may have all rows of a process; the
    # larger it is, the more it shortens the paths.
    # The paper says "segments up to 30 s, variable duration": from which length on, and how many are
    # shorter than they could be, are not published.  5 s and a quarter are ours.
    clips = LatentClips(
        batch_size=batch,
        coupling_group=coupling_group,
        frames=752,
        text_dim=768,
        min_frames=128,
        shorter_clips=0.25,
    )
    return (
        codec,
        # Captions are text files beside the recordings; which T5 the paper has was not recovered,
        # audiocraft's default is t5-base.
        EncodeRecordings(
            "latents",
            codec.model,
            codec.data,
            statistics="tracked",
            text_encoder="hf://google-t5/t5-base",
        ),
        TrainStage(
            name="flow",
            model=flow,
            data=clips,
            objective=objective,
            # Not recovered from the paper; its sibling JASCO's (melodyflow.md 4).
            optimizer=Optimizer(schedule=Schedule(1e-4, "cosine", 4000), clip=1.0),
            layout=Layout("fsdp"),
            step=StepConfig(compute_dtype="bfloat16", average_decay=0.99, average_every=10),
            run_config=RunConfig(
                steps=500_000, eval_every=5000, checkpoint_every=2500, unit="frames"
            ),
            evaluations=(Evaluation("heldout", objective=objective.evaluation()),),
            reads=("latents",),
        ),
        SampleMusic(
            "samples",
            flow,
            clips,
            batch_size=batch // 8,
            prompts=("calm piano over soft strings", "fast drums and a distorted guitar"),
            # 2 GiB of weights on every chip: split, each evaluation would gather them again.
            layout=Layout("data", fsdp=1, data=-1),
            step=StepConfig(compute_dtype="bfloat16"),
        ),
    )


def _gpu() -> tuple:
    # One host reads for all eight GPUs.
    return _large(velocity_transformer.melodyflow_small(), 256, 256)


def _full() -> tuple:
    # Sixteen hosts of four chips read 32 rows each.
    return _large(velocity_transformer.melodyflow_medium(), 512, 32)
