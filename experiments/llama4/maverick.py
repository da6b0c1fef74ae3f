"""Llama 4 Maverick pre-training: every second layer routes, 128 experts, top-1.

What it reproduces: the text decoder of Llama 4 Maverick (17B active, 400B with vision; text alone
400,711,848,960 parameters), spec llama4.md sections 1 to 3: dense and routed layers in turn, no QK
norm, no RoPE scaling.  Data mixture, optimiser, learning rate, batch size and balancing were never
disclosed: the values here are jaxherd's choices, not Meta's.

Scales
  cpu   a Maverick-shaped model of 7.6M parameters (1.5M active) on Python's sources and Shakespeare, about four
        minutes on two cores.
  gpu   1.9B parameters (0.34B active) on one host of 8 GPUs, C4.
  full  the released size on v5p:8x8x8 (512 chips), 8,192 tokens a chip and step (4.2M a step).
        Disclosed budget: about 22T tokens, 2.38M H100 hours [CARD].  Co-distillation from Behemoth
        is not part of this stage: Behemoth's weights and schedule are not public.

To prepare: as for llama4/scout.

Commands
  jaxherd run  llama4/maverick --on cpu
  jaxherd plan llama4/maverick --on v5p:8x8x8
"""

from jaxherd.core.experiment import Experiment, Scale
from jaxherd.core.layouts import Layout
from jaxherd.data.packed_text import PackedText, TokenizerFile, TrainedBpe
from jaxherd.inference.callbacks import SampleText
from jaxherd.layers.attention import TemperatureTuning
from jaxherd.models import presets
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, RunConfig, StepConfig, TrainStage

from .scout import SMOLLM2_TOKENIZER


def experiment(scale: Scale) -> Experiment:
    """Return Maverick pre-training at a scale."""
    stages = {"cpu": _cpu, "gpu": _gpu, "full": _full}[scale]()
    target = {"cpu": "cpu", "gpu": "gpu:8", "full": "v5p:8x8x8"}[scale]
    summary = "Llama 4 Maverick's text decoder, pre-trained from scratch."
    return Experiment("llama4/maverick", scale, target, stages, summary)


def _cpu() -> tuple[TrainStage, ...]:
    data = PackedText(
        corpus="python+shakespeare",
        tokenizer_config=TrainedBpe(2048, max_bytes=8_000_000),
        sequence_length=256,
        batch_size=8,
        max_eval_batches=24,
    )
    model = presets.llama4_text(
        vocab_size=2048,
        embed_dim=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=32,
        moe_step=2,
        expert_dim=256,
        dense_dim=512,
        qk_norm=False,
        chunk_size=64,
        temperature=TemperatureTuning(floor_scale=64),
        max_length=1024,
        selection_bias=True,
        scale_residual_init=True,
    )
    return (
        TrainStage(
            name="pretrain",
            model=model,
            data=data,
            objective=NextToken(balancing="bias_update", balancing_weight=1e-2),
            optimizer=Optimizer(schedule=Schedule(peak=4e-3, warmup_steps=40)),
            layout=Layout("single"),
            run_config=RunConfig(steps=500, eval_every=125, checkpoint_every=100),
            evaluations=(Evaluation("heldout"),),
            callbacks=(SampleText(("def ", "KING HENRY V:"), max_new_tokens=100),),
        ),
    )


def _gpu() -> tuple[TrainStage, ...]:
    data = PackedText(
        corpus="tfds://c4/en:3.1.0",
        tokenizer_config=TokenizerFile(SMOLLM2_TOKENIZER, vocab_size=49152),
        sequence_length=4096,
        batch_size=64,
        tokenize="stream",
        max_eval_documents=4096,
        max_eval_batches=16,
    )
    model = presets.llama4_text(
        vocab_size=49152,
        embed_dim=1024,
        num_layers=16,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        num_experts=32,
        moe_step=2,
        expert_dim=2048,
        dense_dim=4096,
        qk_norm=False,
        chunk_size=1024,
        temperature=TemperatureTuning(floor_scale=1024),
        max_length=16384,
        selection_bias=True,
    )
    return (
        TrainStage(
            name="pretrain",
            model=model,
            data=data,
            objective=NextToken(z_loss=1e-4, balancing="bias_update", remat="attention"),
            optimizer=Optimizer(schedule=Schedule(peak=6e-4, warmup_steps=1000)),
            layout=Layout("fsdp", fsdp=-1),
            step=StepConfig(compute_dtype="bfloat16"),
            run_config=RunConfig(steps=40_000, eval_every=1000, checkpoint_every=500),
            evaluations=(Evaluation("heldout"),),
        ),
    )


def _full() -> tuple[TrainStage, ...]:
    data = PackedText(
        corpus="tfds://c4/en:3.1.0",
        tokenizer_config=TokenizerFile("tokenizer.model", vocab_size=202048),
        sequence_length=8192,
        batch_size=512,
        tokenize="stream",
        max_eval_documents=4096,
        max_eval_batches=16,
    )
    return (
        TrainStage(
            name="pretrain",
            model=presets.llama4_maverick(),
            data=data,
            objective=NextToken(z_loss=1e-4, balancing="none", remat="kernel"),
            # Undisclosed by Meta; jaxherd's choice.
            optimizer=Optimizer(schedule=Schedule(peak=3e-4, warmup_steps=2000)),
            layout=Layout("fsdp_expert", fsdp=-1, expert=16),
            step=StepConfig(compute_dtype="bfloat16"),
            run_config=RunConfig(
                steps=100_000, eval_every=2000, checkpoint_every=500, keep_every=10_000
            ),
            evaluations=(Evaluation("heldout"),),
        ),
    )
