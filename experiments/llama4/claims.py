"""Claims about Llama 4, each with a protocol small enough for two CPU cores."""

import dataclasses

from jaxherd.core.experiment import Experiment
from jaxherd.data.packed_text import PackedText, TrainedBpe
from jaxherd.data.retrieval import RetrievalText
from jaxherd.layers.attention import TemperatureTuning
from jaxherd.layers.rope import RopeConfig
from jaxherd.methods.long_context import LengthSweep
from jaxherd.models import presets
from jaxherd.models.decoder import DecoderConfig
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import RunConfig, TrainStage

LENGTH, CHUNK, LENGTHS = 64, 16, (64, 128, 256, 512)
ROPE = RopeConfig(250.0)


def irope_data() -> RetrievalText:
    """Return text with planted pairs, at the trained length."""
    text = PackedText(
        corpus="python+shakespeare",
        tokenizer_config=TrainedBpe(512, max_bytes=8_000_000),
        sequence_length=LENGTH,
        batch_size=32,
    )
    return RetrievalText(text, pairs=4, keys=32, values=32)


def irope_model(arm: str) -> DecoderConfig:
    """Return the model of an arm."""
    base = presets.llama4_text(
        vocab_size=irope_data().vocab_size,
        embed_dim=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        moe_layers=(),
        dense_dim=192,
        chunk_size=CHUNK,
        rope=ROPE,
        temperature=TemperatureTuning(floor_scale=LENGTH),
        max_length=max(LENGTHS),
        scale_residual_init=True,
    )
    chunked = base.layers[0].attention
    attention = {
        "irope": lambda a: a,
        "all_rope": lambda a: dataclasses.replace(a, rope=ROPE) if a.rope is None else a,
        "local": lambda a: chunked,
    }[arm]
    layers = tuple(
        dataclasses.replace(layer, attention=attention(layer.attention)) for layer in base.layers
    )
    return dataclasses.replace(base, layers=layers)


def irope_experiment(arm: str, steps: int = 1000, peak: float = 8e-3) -> Experiment:
    """Return the training of an arm."""
    data = irope_data()
    stage = TrainStage(
        name="pretrain",
        model=irope_model(arm),
        data=data,
        objective=NextToken(),
        optimizer=Optimizer(schedule=Schedule(peak=peak, warmup_steps=50)),
        run_config=RunConfig(steps=steps, checkpoint_every=steps, loggers=("jsonl",)),
        callbacks=(LengthSweep(data, LENGTHS, tokens=131072),),
    )
    return Experiment(f"llama4/irope-length-{arm}", "cpu", "cpu", (stage,))
