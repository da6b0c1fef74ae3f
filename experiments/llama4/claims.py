"""Claims about Llama 4, each with a protocol small enough for two CPU cores."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxherd.claims.claim import Claim, Decision, Results
from jaxherd.core.experiment import Experiment
from jaxherd.core.runner import run_experiment
from jaxherd.data.packed_text import PackedText, TrainedBpe
from jaxherd.data.retrieval import RetrievalText
from jaxherd.layers.attention import TemperatureTuning
from jaxherd.layers.rope import RopeConfig
from jaxherd.methods import long_context
from jaxherd.methods.long_context import LengthSweep
from jaxherd.models import presets
from jaxherd.models.decoder import DecoderConfig
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.plots import seed_curves
from jaxherd.training.stage import RunConfig, TrainStage

# Trained length L, chunk of the RoPE layers, and the lengths of the measurements.
LENGTH, CHUNK, LENGTHS = 64, 16, (64, 128, 256, 512)
# At Scout's 8192 tokens 29 of 64 rotary pairs turn less than once; theta 80 keeps that share
# (7 of 16) at 64 tokens.
ROPE = RopeConfig(80.0)
# Scout's own theta: at 512 tokens most pairs hardly turn, so that the layer is nearly without RoPE.
SLOW_ROPE = RopeConfig(500000.0)
ARMS = {
    "irope": "iRoPE",
    "all_rope": "RoPE in every layer",
    "all_rope_slow": "RoPE in every layer, theta 500,000 in the global one",
    "local": "control: no global layer",
}


def irope_data() -> RetrievalText:
    """Return text with planted pairs, at the trained length."""
    text = PackedText(
        corpus="python+shakespeare",
        tokenizer_config=TrainedBpe(512, max_bytes=8_000_000),
        sequence_length=LENGTH,
        batch_size=16,
        add_bos=False,
        add_eos=False,
    )
    return RetrievalText(
        text,
        pairs=8,
        occurrences=4,
        keys=8,
        values=8,
        planting="fused",
        plain_share=0.2,
        end_share=0.3,
    )


def irope_model(arm: str) -> DecoderConfig:
    """Return the model of an arm; all have the same number of parameters."""
    base = presets.llama4_text(
        vocab_size=irope_data().vocab_size,
        embed_dim=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        moe_layers=(),
        dense_dim=192,
        chunk_size=CHUNK,
        rope=ROPE,
        temperature=TemperatureTuning(floor_scale=LENGTH),
        max_length=max(LENGTHS),
        init_std=0.1,
        tie_embeddings=True,
        scale_residual_init=True,
    )
    chunked, nope = base.layers[0].attention, base.layers[-1].attention
    local, full = {
        "irope": (chunked, nope),
        "all_rope": (chunked, dataclasses.replace(nope, rope=ROPE)),
        "all_rope_slow": (chunked, dataclasses.replace(nope, rope=SLOW_ROPE)),
        "local": (chunked, chunked),
    }[arm]
    layers = tuple(
        dataclasses.replace(layer, attention=full if layer.attention == nope else local)
        for layer in base.layers
    )
    return dataclasses.replace(base, layers=layers)


def irope_experiment(arm: str, steps: int = 600, peak: float = 4e-3) -> Experiment:
    """Return the training of an arm, with the measurements after it."""
    data = irope_data()
    stage = TrainStage(
        name="pretrain",
        model=irope_model(arm),
        data=data,
        objective=NextToken(),
        optimizer=Optimizer(schedule=Schedule(peak=peak, warmup_steps=50)),
        run_config=RunConfig(steps=steps, checkpoint_every=200, loggers=("jsonl",)),
        callbacks=(LengthSweep(data, LENGTHS, tokens=131072),),
    )
    return Experiment(f"llama4/irope-length-{arm}", "cpu", "cpu", (stage,))


def irope_run(seed: int, arm: str, folder: Path, say: Callable[[str], None]) -> Mapping[str, float]:
    """Train and measure one arm; the trainer resumes at its last checkpoint."""
    import jax

    experiment = irope_experiment(arm)
    devices = tuple(jax.devices("cpu")[:1])
    run_experiment(experiment, folder, target="cpu", devices=devices, seed=seed, say=say)
    return json.loads((folder / "pretrain" / long_context.FILE).read_text(encoding="utf-8"))


def irope_decide(results: Results, threshold: Mapping[str, float]) -> Decision:
    """Return the verdict: all conditions on retrieval and on the loss, in every seed."""
    first, last = f"accuracy/{LENGTHS[0]}", f"accuracy/{LENGTHS[-1]}"

    def values(arm: str, name: str) -> list[float]:
        return [numbers[name] for numbers in results[arm].values()]

    learned = min(*values("irope", first), *values("all_rope", first))
    blind = max(*values("local", first), *values("local", last))
    kept = min(values("irope", last))
    ahead = kept - max(values("all_rope", last))
    harm = max(values("irope", "loss_harm"))
    rules = {
        "sound": [
            (learned >= threshold["learned"], f"both arms learned retrieval at L: least accuracy "
             f"{learned:.3f}, wanted at least {threshold['learned']}"),
            (blind <= threshold["blind"], f"the control without global layers fails: greatest "
             f"accuracy {blind:.3f}, wanted at most {threshold['blind']}"),
        ],
        "effect": [
            (kept >= threshold["kept"], f"iRoPE retrieves at 8L: least accuracy {kept:.3f}, "
             f"wanted at least {threshold['kept']}"),
            (ahead >= threshold["ahead"], f"least of iRoPE minus greatest of all-RoPE at 8L: "
             f"{ahead:+.3f}, wanted at least {threshold['ahead']}"),
            (harm <= threshold["harm"], f"length does iRoPE's loss little harm beyond L: greatest "
             f"{harm:+.4f} nats a token, wanted at most {threshold['harm']}"),
        ],
    }  # fmt: skip
    reasons = tuple(
        f"{'met' if met else 'NOT met'}: {text}" for group in rules.values() for met, text in group
    )
    if not all(met for met, _ in rules["sound"]):
        verdict = "inconclusive"
    else:
        verdict = "holds" if all(met for met, _ in rules["effect"]) else "does not hold"

    def span(arm: str, name: str, form: str) -> str:
        found = values(arm, name)
        return f"{min(found):{form}} to {max(found):{form}}"

    saved = min(values("all_rope", "loss_harm")) - harm
    reasons += (
        f"reported, not decided upon: {ARMS['all_rope_slow']}: retrieval "
        f"{span('all_rope_slow', first, '.3f')} at L, {span('all_rope_slow', last, '.3f')} at 8L, "
        f"harm to the loss {span('all_rope_slow', 'loss_harm', '+.4f')}",
        f"reported, not decided upon: least harm to the loss of all-RoPE minus greatest of iRoPE: "
        f"{saved:+.4f} nats a token",
    )
    ours = (
        f"retrieval at 8L: {span('irope', last, '.2f')} against {span('all_rope', last, '.2f')} "
        f"with RoPE everywhere; harm to the loss beyond L: {span('irope', 'loss_harm', '+.4f')} "
        f"against {span('all_rope', 'loss_harm', '+.4f')} nats a token"
    )
    return Decision(verdict, reasons, ours)


def irope_draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw retrieval by length and harm to the loss by position, a line a seed."""
    buckets = range(1, LENGTHS[-1] // LENGTH + 1)

    def of(arm: str, value: Callable[[Mapping[str, float]], list[float]]) -> list[list[float]]:
        return [value(numbers) for numbers in record["results"][arm].values()]

    def harm(numbers: Mapping[str, float]) -> list[float]:
        return [
            numbers[f"loss/bucket {b}"] - numbers[f"loss_in_windows/bucket {b}"] for b in buckets
        ]

    seed_curves(
        path,
        [
            {
                "x": list(LENGTHS),
                "series": {
                    label: of(arm, lambda n: [n[f"accuracy/{length}"] for length in LENGTHS])
                    for arm, label in ARMS.items()
                },
                "x_label": f"length of the row (tokens); trained at {LENGTH}",
                "y_label": "share of values retrieved",
                "title": "Retrieval of planted pairs",
                "log_x": True,
                "limits": (-0.02, 1.02),
            },
            {
                "x": [(b - 0.5) * LENGTH for b in buckets],
                "series": {label: of(arm, harm) for arm, label in ARMS.items()},
                "x_label": f"position of the token; trained to {LENGTH}",
                "y_label": "nats a token",
                "title": "Loss in the long row minus in windows of the trained length",
                "lines": {"no harm": 0.0},
            },
        ],
    )


IROPE_LENGTH = Claim(
    id="llama4/irope-length",
    statement=(
        "With layers without positional encoding in between (iRoPE), a model retrieves at 8 times "
        "its trained length, and its loss is unharmed there; the same model with RoPE in every "
        "layer, theta scaled to the trained length, retrieves far less, by at least 0.3 in every "
        "seed (with theta 500,000 less by 0.18 to 0.27, reported and not decided upon)."
    ),
    paper_figure=(
        "none published for this comparison; disclosed: trained at 256K, context to 10M credited "
        "to NoPE interleaving and temperature tuning [BLOGq] [HFc] [recall], architecture [LM] [MT]"
    ),
    protocol="""\
Models of Scout's shape, four layers, width 64, 4 query and 2 key/value heads of 32, dense SwiGLU
feed-forward of 192 (no experts: routing is not what is tried), tied embeddings: three layers of
chunked attention (chunk 16) with RoPE and QK norm, the fourth global without RoPE, with temperature
tuning (floor_scale = L).  Theta is 80, which keeps Scout's share of rotary pairs that turn less
than once within the trained length (29 of 64, here 7 of 16).

Arm all_rope differs from irope in one field: its global layer has RoPE.  Arm local, the control
that must fail, has chunked attention in all four layers.  Arm all_rope_slow is all_rope with theta
500,000 in the global layer, which at these lengths is nearly no RoPE; it is reported and not
decided upon.

Trained at L = 64 on Python's sources and Shakespeare, BPE of 512 tokens, 16 rows a step.  80 % of
the rows carry 8 symbols planted at random places, each of which stands for one of 8 keys with one
of 8 values; later in the row the key's own symbol asks for it.  After training, on held-out text:
(1) rows of L, 2L, 4L and 8L with 8 symbols anywhere and all keys asked at the end: share of values
that are the most probable of all tokens; (2) plain rows of 8L: loss by position minus the loss of
the same tokens read in windows of L, averaged over positions from L on.

Learning rate, initial scale, steps and rows were tuned on seed 100, which is not among the seeds,
and so was the kind of retrieval: key and value as two tokens, which takes two steps of attention,
was not learned in the time given here.  Thresholds were fixed after seed 100 and before any
recorded run.  On seed 100 neither arm's loss was harmed by length (-0.003 and +0.002 nats): models
trained so briefly hardly use far text.  A run of seed 100 with 2.7 times the tokens and other rows,
in which retrieval was not learned, gave +0.011 and +0.084.  So the loss is a condition on iRoPE
alone, and the difference between the arms is reported only.
""",
    metric="retrieval accuracy at 8L (share); harm of length to the loss beyond L (nats a token)",
    baselines=("all_rope",),
    controls=("local",),
    threshold={
        "learned": 0.9,
        "blind": 0.3,
        "kept": 0.8,
        "ahead": 0.3,
        "harm": 0.05,
    },
    seeds=(0, 1, 2),
    arms=tuple(ARMS),
    run=irope_run,
    decide=irope_decide,
    settings={arm: irope_experiment(arm) for arm in ARMS},
    draw=irope_draw,
)

CLAIMS = (IROPE_LENGTH,)
