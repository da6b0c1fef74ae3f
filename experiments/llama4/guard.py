"""A small guard beside Llama 4: a classifier of character n-grams, trained and calibrated here.

Stands in for PromptGuard 2 and Llama Guard (spec 11), whose weights are Meta's: the same place in front of and
behind a model, a far smaller network, and harmless data made by program (`methods/override_texts.py`).  The
threshold allows 1 % of false positives, the point at which Meta tells PromptGuard 2's recall (97.5 % and
88.7 %); the tasks are different, so that the figures do not compare.

Scales
  cpu   1.05M parameters, 300 steps; half a minute on two cores.
  gpu, full  the same, longer.

Commands
  jaxherd run llama4/guard --on cpu
  jaxherd serve SOURCE --guard builtin --guard runs/llama4-guard-cpu/calibrate/guard
"""

from jaxherd.core.experiment import Experiment, Scale
from jaxherd.core.layouts import Layout
from jaxherd.data.labelled_text import LabelledBatches
from jaxherd.methods.guard_training import CalibrateGuard, MultiLabel
from jaxherd.methods.override_texts import LABEL, OverrideTexts
from jaxherd.models.ngram_classifier import NgramClassifierConfig
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, RunConfig, TrainStage

STEPS: dict[Scale, int] = {"cpu": 300, "gpu": 1000, "full": 1000}


def experiment(scale: Scale) -> Experiment:
    """Return training and calibration at a scale."""
    target = {"cpu": "cpu", "gpu": "gpu:1", "full": "v5e:2x2"}[scale]
    model = NgramClassifierConfig((LABEL,))
    texts = OverrideTexts()
    train = TrainStage(
        name="classifier",
        model=model,
        data=LabelledBatches(texts, model.labels, model.ngrams, batch_size=64),
        objective=MultiLabel(smoothing=0.01),
        optimizer=Optimizer(schedule=Schedule(peak=3e-3, warmup_steps=20), weight_decay=0.01),
        layout=Layout("data", fsdp=1, data=-1),
        run_config=RunConfig(steps=STEPS[scale], checkpoint_every=100, unit="n-grams"),
        evaluations=(Evaluation("heldout"),),
    )
    stages = (train, CalibrateGuard("calibrate", "classifier", texts))
    return Experiment(
        "llama4/guard", scale, target, stages, "A small guard, trained and calibrated."
    )
