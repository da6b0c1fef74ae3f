"""The claim about MelodyFlow's codec: a continuous bottleneck against a quantised one."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from jaxherd.claims.claim import Claim, Decision, Results
from jaxherd.methods.codec_training import CodecTrainingConfig
from jaxherd.models import codec_presets
from jaxherd.training.stage import RunConfig, TrainStage

from . import text_to_music as recipe
from .claims_shared import Say, run_stages, span

# Stages of 256 codes of each quantised arm: 8 bits each.
QUANTISED = {"quantised": 13, "starved": 2}
CODEC_ARMS, CODEC_STEPS = ("continuous", *QUANTISED), 600


def codec_stage(arm: str) -> TrainStage:
    """Return a training of the small codec with this bottleneck."""
    stage = recipe.cpu_codec()
    codec, objective = stage.model.autoencoder, stage.objective
    if arm in QUANTISED:
        codec = codec_presets.averaged(codec, stages=QUANTISED[arm], codes=256)
    objective = dataclasses.replace(
        objective, weights=dataclasses.replace(objective.weights, kl=3e-3)
    )
    return dataclasses.replace(
        stage,
        model=CodecTrainingConfig(codec, None),
        objective=objective,
        run_config=RunConfig(
            steps=CODEC_STEPS, checkpoint_every=500, loggers=("jsonl",), unit="samples"
        ),
        evaluations=(dataclasses.replace(stage.evaluations[0], objective=objective),),
    )


def codec_run(seed: int, arm: str, folder: Path, say: Say) -> Mapping[str, float]:
    """Train one bottleneck; held-out numbers of its last evaluation."""
    run_stages(f"codec-{arm}", (codec_stage(arm),), folder, seed, say)
    lines = (folder / "codec" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [r for r in map(json.loads, lines) if r["kind"] == "eval"][-1]
    return {name: last[f"heldout/{name}"] for name in ("snr_db", "mel_distance", "bits_per_frame")}


def codec_decide(results: Results, threshold: Mapping[str, float]) -> Decision:
    """Return the verdict: at an equal rate the continuous codec reconstructs better.

    The control says whether the rate is what limits a codec of this size at all.
    """

    def values(arm: str, name: str) -> list[float]:
        return [n[name] for n in results[arm].values()]

    def gains(arm: str, other: str) -> list[float]:
        return [a - b for a, b in zip(values(arm, "snr_db"), values(other, "snr_db"))]

    rate = max(values("continuous", "bits_per_frame"))
    allowed = threshold["rate"] * min(values("quantised", "bits_per_frame"))
    equal = rate <= allowed
    lost = gains("quantised", "starved")
    binds = min(lost) >= threshold["binds_db"]
    found = gains("continuous", "quantised")
    mels = [
        a / b
        for a, b in zip(values("continuous", "mel_distance"), values("quantised", "mel_distance"))
    ]
    better = min(found) >= threshold["snr_db"]
    nearer = max(mels) <= threshold["mel"]
    reasons = (
        f"{'met' if equal else 'NOT met'}: the continuous codec spends about as much: at most "
        f"{rate:.1f} bits a frame against {min(values('quantised', 'bits_per_frame')):.1f}, "
        f"{allowed:.1f} allowed",
        f"{'met' if binds else 'NOT met'}: the control of 16 bits a frame is worse than the "
        f"quantised codec: by {span(lost, '.2f')} dB, wanted at least {threshold['binds_db']}",
        f"{'met' if better else 'NOT met'}: SNR gain {span(found, '+.2f')} dB, wanted at least "
        f"{threshold['snr_db']}",
        f"{'met' if nearer else 'NOT met'}: mel distance continuous / quantised "
        f"{span(mels, '.3f')}, wanted at most {threshold['mel']}",
    )
    sound = equal and binds
    verdict = "inconclusive" if not sound else ("holds" if better and nearer else "does not hold")
    ours = (
        f"SNR {span(values('continuous', 'snr_db'), '.2f')} against "
        f"{span(values('quantised', 'snr_db'), '.2f')} dB at "
        f"{span(values('continuous', 'bits_per_frame'), '.0f')} against "
        f"{min(values('quantised', 'bits_per_frame')):.0f} bits a frame"
    )
    return Decision(verdict, reasons, ours)


BOTTLENECK = Claim(
    id="melodyflow/bottleneck",
    statement="The continuous bottleneck reconstructs better than a quantised one at an equal rate.",
    paper_figure="ablation of the codec's bottleneck in the paper's table 3; not recovered [rev]",
    protocol="""\
The recipe's small codec, Gaussian with a KL weight that brings its rate (KL in bits) to that of
EnCodec's residual quantiser of 13 stages of 256 codes (104 bits a frame), all else equal, trained for
600 steps each; held-out recordings.  Arm `starved` has 2 stages: if it is no worse, the rate is not
what limits these codecs and nothing can be said.  Tried before: against 18 stages (144 bits), in
the same seeds, the continuous codec came out 0.00 to 0.08 dB behind; its trainings are those that
count here, so that its rate (102 to 106 bits) was known when 13 stages were chosen to match it.  On seed 100, not counted, a quantiser whose
codes are learnt by gradient (DAC's) had not begun to learn the waveform in 200 steps.
""",
    metric="held-out SNR in dB and mel distance at the rate in bits a frame",
    baselines=("quantised",),
    controls=("starved",),
    threshold={"rate": 1.05, "binds_db": 0.3, "snr_db": 0.5, "mel": 1.0},
    seeds=(0, 1, 2),
    arms=CODEC_ARMS,
    run=codec_run,
    decide=codec_decide,
    settings={arm: codec_stage(arm) for arm in CODEC_ARMS},
)
