"""Llama 4's post-training stages on a released small model: SmolLM2-135M-Instruct.

The same stages and the same reservations as llama4/post_training, from weights that anybody can
have; SmolLM2 is no Llama 4.  Prompts are sentences in its chat format that ask for
<answer>...</answer>, which it hardly gives before `sft`.

Scales
  cpu   a few steps of each stage, to see all of it work; COST
  gpu   one GPU, some hundred steps.
  full  the same on one TPU host, v5e:2x2.

Commands
  jaxherd run llama4/post_training_smollm2 --on cpu
"""

import dataclasses
from typing import Any

from jaxherd.core.experiment import Experiment, Scale
from jaxherd.core.layouts import Layout
from jaxherd.data.conversations import AnswerRows, PreferencePairs
from jaxherd.data.examples import ExampleFile
from jaxherd.data.prompt_format import PromptFormat
from jaxherd.data.tokenizer_config import TokenizerFile
from jaxherd.methods.heldout_reward import HeldoutReward
from jaxherd.methods.online_rl import PolicyRollouts
from jaxherd.methods.policy_optimization import GroupPolicyOptimization
from jaxherd.methods.preference_optimization import PreferenceOptimization
from jaxherd.methods.preference_sampling import FILE as PAIRS
from jaxherd.methods.preference_sampling import SamplePairs
from jaxherd.methods.prompt_filter import PromptFilter
from jaxherd.methods.verifiable_tasks import VerifiableTasks
from jaxherd.models import presets
from jaxherd.training.guards import Guards
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, FrozenModel, RunConfig, StepConfig, TrainStage
from jaxherd.weights.load_stage import LoadWeights

from .scout import SMOLLM2_TOKENIZER


@dataclasses.dataclass(frozen=True)
class _Size:
    """What differs between the scales."""

    steps: tuple[int, int, int]
    batch: int
    prompts: int
    per_task: int
    heldout: int
    filter_every: int
    compute_dtype: str


SIZES: dict[Scale, _Size] = {
    "cpu": _Size((4, 4, 2), 8, 4, 4, 2, 2, "float32"),
    "gpu": _Size((100, 400, 40), 32, 32, 200, 32, 16, "bfloat16"),
    "full": _Size((100, 400, 40), 32, 32, 200, 32, 16, "bfloat16"),
}


def experiment(scale: Scale) -> Experiment:
    """Return the stages at a scale."""
    target = {"cpu": "cpu", "gpu": "gpu:1", "full": "v5e:2x2"}[scale]
    summary = "Llama 4's post-training stages on SmolLM2-135M-Instruct."
    return Experiment("llama4/post_training_smollm2", scale, target, _stages(SIZES[scale]), summary)


def _stages(size: _Size) -> tuple[Any, ...]:
    tasks = VerifiableTasks(
        tasks=(("addition", 1), ("addition", 2), ("multiplication", 1), ("counting", 2)),
        per_task=size.per_task,
        heldout_per_task=size.heldout,
        wording="words",
    )
    files: dict[str, Any] = dict(
        tokenizer_config=TokenizerFile(SMOLLM2_TOKENIZER, vocab_size=49152),
        prompt_format=PromptFormat("chat", system="You answer briefly."),
        sequence_length=96,
    )
    model = presets.smollm2_135m()
    rows = AnswerRows(tasks, batch_size=size.batch, keep_hardest=0.5, packing="none", **files)
    rollouts = PolicyRollouts(
        tasks,
        prompts=size.prompts,
        group=8,
        batch_size=size.prompts * 8 // 2,
        max_new_tokens=24,
        rows=32,
        filter=PromptFilter(every=size.filter_every, samples=2, least=4),
        **files,
    )
    measure = HeldoutReward(tasks, max_new_tokens=24, rows=32)
    common: dict[str, Any] = dict(
        model=model,
        layout=Layout("data", fsdp=1, data=-1),
        step=StepConfig(compute_dtype=size.compute_dtype),
        callbacks=(measure,),
    )
    sft, rl, dpo = size.steps
    return (
        LoadWeights("load", "smollm2-135m-instruct", model),
        TrainStage(
            name="sft",
            data=rows,
            objective=NextToken(),
            optimizer=Optimizer(schedule=Schedule(peak=1e-4, warmup_steps=2)),
            run_config=RunConfig(steps=sft, checkpoint_every=50),
            evaluations=(Evaluation("heldout"),),
            initial="load",
            reads=("load",),
            **common,
        ),
        TrainStage(
            name="rl",
            data=rollouts,
            objective=GroupPolicyOptimization(clip_low=0.2, clip_high=0.28),
            optimizer=Optimizer(
                schedule=Schedule(peak=1e-5, kind="constant", warmup_steps=2), weight_decay=0.0
            ),
            guards=Guards(spike_sigmas=None),
            run_config=RunConfig(steps=rl, eval_every=50, checkpoint_every=50),
            initial="sft",
            reads=("sft",),
            **common,
        ),
        SamplePairs("pairs", "rl", rollouts, dtype=size.compute_dtype),
        TrainStage(
            name="dpo",
            data=PreferencePairs(ExampleFile(PAIRS, stage="pairs"), batch_size=size.batch, **files),
            objective=PreferenceOptimization(beta=0.1),
            optimizer=Optimizer(schedule=Schedule(peak=1e-6, warmup_steps=2), weight_decay=0.0),
            run_config=RunConfig(steps=dpo, checkpoint_every=50),
            initial="rl",
            reads=("rl", "pairs"),
            frozen=(FrozenModel("reference", model, "rl"),),
            **common,
        ),
    )
