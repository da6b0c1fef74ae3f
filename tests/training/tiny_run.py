"""A tiny training run for the tests: a Scout-shaped model of two layers on a few text files.

The environment chooses what goes wrong: JAXHERD_TEST_TEXTS (folder of the texts), and
JAXHERD_TEST_POISON ("nan:STEP,..." or "spike:STEP,...": which updates get a bad loss).
"""

import dataclasses
import os

import jax.numpy as jnp

from jaxherd.core.experiment import Experiment
from jaxherd.core.layouts import Layout
from jaxherd.data.packed_text import Bytes, PackedText
from jaxherd.layers.attention import TemperatureTuning
from jaxherd.models import presets
from jaxherd.training.guards import Guards
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, RunConfig, TrainStage


@dataclasses.dataclass(frozen=True)
class Poisoned(NextToken):
    """`NextToken` whose loss (and so its gradient) is multiplied in batches that hold a token."""

    kind: str = "nan"
    batches: tuple[int, ...] = ()

    def __call__(self, model, batch, key, *, frozen=None):
        """Return the loss, poisoned where the batch carries the mark."""
        loss, metrics = super().__call__(model, batch, key, frozen=frozen)
        # `Marked` writes the number of the batch into the padding-free byte counts.
        number = batch["target_bytes"][0, 0] // 1000
        bad = jnp.isin(number, jnp.asarray(self.batches or (-1,)))
        factor = jnp.where(bad, jnp.nan if self.kind == "nan" else 1e4, 1.0)
        total, weight = metrics["loss"]
        return loss * factor, metrics | {"loss": (total * factor, weight)}


class _Marked:
    def __init__(self, inner):
        self._inner, self.close = inner, inner.close

    def __iter__(self):
        return self

    def __next__(self):
        batch = dict(next(self._inner))
        batch["target_bytes"] = batch["target_bytes"].copy()
        batch["target_bytes"][0, 0] += 1000 * self._inner.get_state()["steps"]
        return batch

    def get_state(self):
        return self._inner.get_state()

    def set_state(self, state):
        self._inner.set_state(state)


@dataclasses.dataclass(frozen=True)
class Marked(PackedText):
    """`PackedText` that tells in each training batch which number it has."""

    def build(self, *, split, **settings):
        """Open the data."""
        data = super().build(split=split, **settings)
        return _Marked(data) if split == "train" else data


def experiment(scale) -> Experiment:
    """Return the run; the same at every scale."""
    kind, _, steps = os.environ.get("JAXHERD_TEST_POISON", "").partition(":")
    batches = tuple(int(step) for step in steps.split(",") if step)
    data = (Marked if batches else PackedText)(
        corpus=os.environ["JAXHERD_TEST_TEXTS"],
        tokenizer_config=Bytes(),
        sequence_length=32,
        batch_size=8,
        heldout_fraction=0.2,
        max_eval_batches=2,
    )
    model = presets.llama4_text(
        vocab_size=Bytes().vocab_size,
        embed_dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_experts=4,
        nope_interval=9,
        expert_dim=16,
        chunk_size=8,
        temperature=TemperatureTuning(floor_scale=8),
        selection_bias=True,
        max_length=64,
    )
    objective = NextToken(balancing="bias_update", balancing_weight=1e-2)
    if batches:
        objective = Poisoned(
            balancing="bias_update", balancing_weight=1e-2, kind=kind, batches=batches
        )
    stage = TrainStage(
        name="pretrain",
        model=model,
        data=data,
        objective=objective,
        optimizer=Optimizer(schedule=Schedule(peak=1e-2, warmup_steps=5)),
        layout=Layout("single"),
        guards=Guards(spike_after=10),
        run_config=RunConfig(steps=30, eval_every=20, checkpoint_every=6, loggers=("jsonl",)),
        evaluations=(Evaluation("heldout", data),),
    )
    return Experiment("tests/tiny_run", scale, "cpu", (stage,), "A tiny run for the tests.")
