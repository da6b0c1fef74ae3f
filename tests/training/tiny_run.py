"""A tiny training run for the tests: byte tokens of a few text files.

The environment gives JAXHERD_TEST_TEXTS (folder of the texts), and JAXHERD_TEST_MODEL ("scout" for
routed experts).
"""

import os

from jaxherd.core.experiment import Experiment
from jaxherd.core.layouts import Layout
from jaxherd.data.packed_text import Bytes, PackedText
from jaxherd.layers.attention import TemperatureTuning
from jaxherd.models import presets
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, RunConfig, TrainStage

_COMMON = dict(
    vocab_size=Bytes().vocab_size,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
)


def model():
    """Return a two-layer Llama, quick to compile, or a four-layer Scout."""
    if os.environ.get("JAXHERD_TEST_MODEL") != "scout":
        return presets.llama(hidden_dim=32, **_COMMON)
    scout = _COMMON | dict(
        num_layers=4,
        num_experts=4,
        expert_dim=16,
        chunk_size=8,
        temperature=TemperatureTuning(floor_scale=8),
        selection_bias=True,
    )
    return presets.llama4_text(**scout)


def experiment(scale) -> Experiment:
    """Return the run; the same at every scale."""
    data = PackedText(
        corpus=os.environ["JAXHERD_TEST_TEXTS"],
        tokenizer_config=Bytes(),
        sequence_length=32,
        batch_size=8,
        heldout_fraction=0.2,
        max_eval_batches=2,
    )
    scout = os.environ.get("JAXHERD_TEST_MODEL") == "scout"
    objective = NextToken(balancing="bias_update" if scout else "none", balancing_weight=1e-2)
    stage = TrainStage(
        name="pretrain",
        model=model(),
        data=data,
        objective=objective,
        optimizer=Optimizer(schedule=Schedule(peak=1e-2, warmup_steps=5)),
        layout=Layout("single"),
        run_config=RunConfig(steps=30, eval_every=20, checkpoint_every=6, loggers=("jsonl",)),
        evaluations=(Evaluation("heldout", data),),
    )
    return Experiment("tests/tiny_run", scale, "cpu", (stage,), "A tiny run for the tests.")
