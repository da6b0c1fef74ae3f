"""MelodyFlow's codec against its discriminators: the autoencoder's stage alone.

What it reproduces: the 48 kHz stereo autoencoder of "High Fidelity Text-Guided Music Generation and
Editing via Single-Stage Flow Matching" (arXiv 2407.03648), spec melodyflow.md 2: each step updates
the multi-scale STFT discriminators by a hinge loss, and then the codec by the balanced sum of
waveform, mel, STFT, adversarial and feature-matching losses.  The weights of the losses were not
recovered: audiocraft's, and a guess for the STFT loss, which audiocraft does not have.

Scales
  cpu   the small codec of melodyflow/text_to_music with one small discriminator (a 512-point
        transform, L and R apart), 300 steps on the same recordings: about 7 minutes on two cores,
        and enough to see both players move, not enough to hear what the discriminator is for.
  gpu   the released codec's shape with all five discriminators on one host of 8 GPUs.
  full  the same on v5e:8x8.

Commands
  pip install '.[demo,audio]'
  jaxherd run  melodyflow/codec --on cpu
  jaxherd plan melodyflow/codec --on v5e:8x8
  jaxherd run  melodyflow/codec --on tpu --set codec.data.groups.0.sources.0=/path/to/music
"""

import dataclasses

from jaxherd.core.experiment import Experiment, Scale
from jaxherd.layers.spectral import StftConfig
from jaxherd.methods.codec_losses import LossWeights
from jaxherd.methods.codec_training import AdversarialCodec, CodecTrainingConfig
from jaxherd.methods.stft_loss import MultiScaleStft
from jaxherd.models.stft_discriminator import StftDiscriminatorConfig
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, TrainStage

from . import text_to_music as recipe


def experiment(scale: Scale) -> Experiment:
    """Return the codec's stage at a scale."""
    whole = recipe.experiment(scale)
    codec = _cpu() if scale == "cpu" else whole.stage("codec")
    summary = "A 48 kHz stereo autoencoder trained against STFT discriminators."
    return Experiment("melodyflow/codec", scale, whole.target, (codec,), summary)


def _cpu() -> TrainStage:
    stage = recipe.cpu_codec()
    plain = stage.objective
    critic = StftDiscriminatorConfig(n_ffts=(512,), filters=4, stereo="separate")
    objective = AdversarialCodec(
        # As in the recipe the waveform has more weight than audiocraft's 0.1; the adversarial and
        # the feature loss have together what the waveform has.  The STFT loss's weight is not
        # published: that of the mel loss, over windows of the same lengths.
        weights=LossWeights(adversarial=1.0, feature=1.0, waveform=2.0, mel=0.1, kl=1e-5, stft=0.1),
        mel=plain.mel,
        stft=MultiScaleStft(tuple(StftConfig(2**e) for e in plain.mel.exponents)),
        balancer=plain.balancer,
        waveform_loss=plain.waveform_loss,
        # At 1e-3 it had not left chance after 300 steps; at this rate it does, and swings.
        discriminator_optimizer=Optimizer(
            schedule=Schedule(5e-3, "constant", 0), beta1=0.5, beta2=0.9, weight_decay=0.0, clip=1.0
        ),
    )
    return dataclasses.replace(
        stage,
        model=CodecTrainingConfig(stage.model.autoencoder, critic, stft_slot=True),
        data=dataclasses.replace(stage.data, clip_samples=12_000),
        objective=objective,
        run_config=dataclasses.replace(
            stage.run_config, steps=300, eval_every=100, checkpoint_every=100
        ),
        evaluations=(Evaluation("heldout", objective=objective.evaluation()),),
    )
