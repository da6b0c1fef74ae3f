"""Llama 4's post-training: light SFT on hard data, online RL with filtering, light DPO.

What it reproduces: spec llama4.md section 7.  Disclosed by Meta: the order (SFT, then online RL,
then DPO) and its reason (much SFT and DPO would hold back what RL can explore); more than half of
the SFT data, which judges found easy, was removed (95 % for Behemoth); RL alternates training with
filtering prompts, so that medium-to-hard ones stay.  Not disclosed: the RL algorithm, the reward
models, the judges, the data, every learning rate, batch size, number of steps and weight.  The
algorithm here is group-relative policy optimisation, the rewards are those of tasks that a program
can check, and all numbers are jaxherd's choices, not Meta's.

Stages
  pretrain  transcripts of small tasks, prompts included (cpu alone: a base model to work on)
  load      given weights (gpu and full)
  sft       the hardest half of the transcripts; loss on answers
  rl        rounds of answers by the policy itself, rewarded; prompts filtered every few rounds
  pairs     the best and the worst of the policy's own answers to each prompt
  dpo       preference optimisation on them against the policy that RL left

Scales
  cpu   a Scout-shaped model of 0.9M parameters on arithmetic, words and instructions, letter by
        letter; COST
  gpu   llama4/scout's model for one host of 8 GPUs: begin with its run,
          --set load.source=runs/llama4-scout-gpu
        and give your own files (below).  Rollouts are sampled on one GPU.
  full  Scout on v5p:4x4x8.  `rl` and `pairs` sample on one device of one process, which Scout does
        not fit: they are refused on a slice of several hosts until rollouts are shared out.  `load`,
        `sft` and `dpo` run; every step can be planned (`jaxherd plan ... --stage sft`).

To prepare (gpu and full), under data/ or wherever --set points:
  sft.jsonl       lines of {"prompt": ..., "completion": ..., "difficulty": number} or with
                  "messages" (`sft.data.source.path`); the difficulty comes from judges of yours
  problems.jsonl  lines of {"prompt": ..., "answer": ..., "capability": word}, where the prompt asks
                  for <answer>...</answer> (`rl.data.tasks.path`, and the same for `pairs`)

Commands
  jaxherd run  llama4/post_training --on cpu
  jaxherd plan llama4/post_training --on v5p:4x4x8 --stage sft
"""

import dataclasses
from typing import Any

from jaxherd.core.experiment import Experiment, Scale
from jaxherd.core.layouts import Layout
from jaxherd.data.conversations import AnswerRows, PreferencePairs
from jaxherd.data.examples import ExampleFile
from jaxherd.data.prompt_format import PromptFormat
from jaxherd.data.tokenizer_config import TokenizerFile
from jaxherd.layers.attention import TemperatureTuning
from jaxherd.methods.heldout_reward import HeldoutReward
from jaxherd.methods.online_rl import PolicyRollouts
from jaxherd.methods.policy_optimization import GroupPolicyOptimization
from jaxherd.methods.preference_optimization import PreferenceOptimization
from jaxherd.methods.preference_sampling import FILE as PAIRS
from jaxherd.methods.preference_sampling import SamplePairs
from jaxherd.methods.prompt_filter import PromptFilter
from jaxherd.methods.verifiable_tasks import AnswerFile, TaggedAnswer, VerifiableTasks
from jaxherd.models import presets
from jaxherd.training.guards import Guards
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, FrozenModel, RunConfig, StepConfig, TrainStage
from jaxherd.weights.load_stage import LoadWeights

from . import scout

# Letter by letter a tag costs as much as an answer: the shortest one.
TASKS = VerifiableTasks(
    tasks=(
        ("addition", 1),
        ("addition", 2),
        ("subtraction", 1),
        ("subtraction", 2),
        ("reversal", 2),
        ("reversal", 3),
        ("sorting", 2),
        ("sorting", 3),
        ("counting", 5),
        ("instructions", 1),
        ("instructions", 2),
    ),
    per_task=2000,
    heldout_per_task=48,
    answer=TaggedAnswer(tag="a"),
)


def experiment(scale: Scale) -> Experiment:
    """Return the stages at a scale."""
    stages = {"cpu": _cpu, "gpu": _gpu, "full": _full}[scale]()
    target = {"cpu": "cpu", "gpu": "gpu:8", "full": "v5p:4x4x8"}[scale]
    summary = "Llama 4's post-training: SFT on hard data, online RL with filtering, DPO."
    return Experiment("llama4/post_training", scale, target, stages, summary)


def _cpu() -> tuple[Any, ...]:
    model = presets.llama4_text(
        vocab_size=259,
        embed_dim=96,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        num_experts=4,
        expert_dim=128,
        chunk_size=32,
        temperature=TemperatureTuning(floor_scale=32),
        max_length=128,
        selection_bias=True,
        scale_residual_init=True,
    )
    measures = (
        HeldoutReward(TASKS, max_new_tokens=20),
        HeldoutReward(TASKS, max_new_tokens=20, temperature=1.0, name="heldout_sampled"),
    )
    common: dict[str, Any] = dict(model=model, layout=Layout("single"), callbacks=measures)
    rows = AnswerRows(TASKS, sequence_length=128, batch_size=16, eval_batch_size=8)
    rollouts = PolicyRollouts(
        dataclasses.replace(TASKS, per_task=256),
        prompts=32,
        group=8,
        batch_size=128,
        max_new_tokens=20,
        sequence_length=48,
        rows=128,
        filter=PromptFilter(every=40, samples=4, lowest=0.0, highest=0.75, least=16),
    )
    return (
        TrainStage(
            name="pretrain",
            data=dataclasses.replace(rows, learn_prompts=True),
            objective=NextToken(balancing="bias_update", balancing_weight=1e-2),
            optimizer=Optimizer(schedule=Schedule(peak=3e-3, warmup_steps=50)),
            run_config=RunConfig(steps=600, eval_every=200, checkpoint_every=200),
            evaluations=(Evaluation("heldout"),),
            **common,
        ),
        TrainStage(
            name="sft",
            # Disclosed: more than half was removed.
            data=dataclasses.replace(rows, keep_hardest=0.5),
            objective=NextToken(),
            optimizer=Optimizer(schedule=Schedule(peak=5e-4, warmup_steps=10)),
            run_config=RunConfig(steps=60, checkpoint_every=60),
            evaluations=(Evaluation("heldout"),),
            initial="pretrain",
            reads=("pretrain",),
            **common,
        ),
        TrainStage(
            name="rl",
            data=rollouts,
            objective=GroupPolicyOptimization(clip_low=0.2, clip_high=0.28),
            optimizer=Optimizer(
                schedule=Schedule(peak=1e-4, kind="constant", warmup_steps=10), weight_decay=0.0
            ),
            # A batch of hard prompts is no broken one.
            guards=Guards(spike_sigmas=None),
            run_config=RunConfig(steps=240, eval_every=60, checkpoint_every=60),
            initial="sft",
            reads=("sft",),
            **common,
        ),
        SamplePairs("pairs", "rl", rollouts),
        _dpo(
            PreferencePairs(
                ExampleFile(PAIRS, stage="pairs", heldout_fraction=TASKS.heldout_fraction),
                sequence_length=48,
                batch_size=32,
            ),
            RunConfig(steps=40, eval_every=20, checkpoint_every=40),
            Schedule(peak=5e-5, warmup_steps=5),
            **common,
        ),
    )


def _dpo(
    data: Any, run_config: RunConfig, schedule: Schedule, remat: str = "none", **common: Any
) -> TrainStage:
    return TrainStage(
        name="dpo",
        data=data,
        objective=PreferenceOptimization(beta=0.1, remat=remat),
        optimizer=Optimizer(schedule=schedule, weight_decay=0.0),
        run_config=run_config,
        evaluations=(Evaluation("heldout"),),
        initial="rl",
        reads=("rl", "pairs"),
        frozen=(FrozenModel("reference", common["model"], "rl"),),
        **common,
    )


def _given(
    load: LoadWeights,
    tokenizer: TokenizerFile,
    layout: Layout,
    length: int,
    batch: int,
    step: StepConfig,
    remat: str,
) -> tuple[Any, ...]:
    """Return the stages on a user's own files, from given weights."""
    form = PromptFormat("chat")
    common: dict[str, Any] = dict(model=load.model, layout=layout, step=step)
    rollouts = PolicyRollouts(
        AnswerFile("data/problems.jsonl"),
        tokenizer_config=tokenizer,
        prompt_format=form,
        prompts=batch,
        group=8,
        batch_size=4 * batch,
        max_new_tokens=length // 2,
        sequence_length=length,
        rows=64,
        filter=PromptFilter(every=16, samples=4, least=batch),
    )
    measure = HeldoutReward(rollouts.tasks, max_new_tokens=length // 2, rows=64)
    files: dict[str, Any] = dict(
        tokenizer_config=tokenizer, prompt_format=form, sequence_length=length
    )
    return (
        load,
        TrainStage(
            name="sft",
            # Disclosed: more than half was removed.
            data=AnswerRows(
                ExampleFile("data/sft.jsonl"), keep_hardest=0.5, batch_size=batch, **files
            ),
            objective=NextToken(remat=remat),
            optimizer=Optimizer(schedule=Schedule(peak=1e-5, warmup_steps=50)),
            run_config=RunConfig(steps=500, eval_every=100, checkpoint_every=100),
            evaluations=(Evaluation("heldout"),),
            callbacks=(measure,),
            initial="load",
            reads=("load",),
            **common,
        ),
        TrainStage(
            name="rl",
            data=rollouts,
            objective=GroupPolicyOptimization(clip_low=0.2, clip_high=0.28, remat=remat),
            optimizer=Optimizer(
                schedule=Schedule(peak=1e-6, kind="constant", warmup_steps=20), weight_decay=0.0
            ),
            guards=Guards(spike_sigmas=None),
            run_config=RunConfig(steps=2000, eval_every=200, checkpoint_every=100),
            callbacks=(measure,),
            initial="sft",
            reads=("sft",),
            # As many rows at once as in the other stages.
            **{**common, "step": dataclasses.replace(step, accumulate=4)},
        ),
        SamplePairs("pairs", "rl", rollouts, dtype=step.compute_dtype),
        _dpo(
            PreferencePairs(ExampleFile(PAIRS, stage="pairs"), batch_size=batch, **files),
            RunConfig(steps=200, eval_every=50, checkpoint_every=100),
            Schedule(peak=5e-7, warmup_steps=20),
            callbacks=(measure,),
            remat=remat,
            **common,
        ),
    )


def _gpu() -> tuple[Any, ...]:
    (pretrain,) = scout.experiment("gpu").stages
    return _given(
        LoadWeights("load", "runs/llama4-scout-gpu", pretrain.model),
        pretrain.data.tokenizer_config,
        pretrain.layout,
        length=1024,
        batch=64,
        step=pretrain.step,
        remat="attention",
    )


def _full() -> tuple[Any, ...]:
    # The folder of Llama 4 Scout, which is Llama Material: give your own copy's path to
    # load.source and to the tokenizer of each stage.
    layout = Layout("fsdp_expert", fsdp=-1, expert=16)
    folder = "Llama-4-Scout-17B-16E"
    return _given(
        LoadWeights("load", folder, presets.llama4_scout(), layout),
        TokenizerFile(folder, vocab_size=202048),
        layout,
        length=8192,
        batch=128,
        step=StepConfig(compute_dtype="bfloat16"),
        remat="kernel",
    )
