"""Claim (b): what edits by inversion keep of a clip, at an equal rate of success.

Every method has the same number of network evaluations; each is judged by the curve that it draws
over `target_flowstep`, not by one point of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.claims.claim import Claim, Decision, Results
from jaxherd.methods.clip_classifier import train_classifier
from jaxherd.methods.codec_latents import load_autoencoder
from jaxherd.methods.latent_inversion import edit, equal_evaluations, inversion
from jaxherd.methods.music_metrics import chroma_correlation, onset_correlation
from jaxherd.training.plots import seed_curves

from . import text_to_music as recipe
from .claims_shared import GROUP, SETTINGS, SHARED_TEXT, Say, clips, span, trained_flow

METHODS = ("regularized", "fixed_point", "ddim", "sdedit")
TIMES = (0.0, 0.05, 0.1, 0.15, 0.25, 0.4)
CONTROL_TIMES = (0.05, 0.15)
RATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
STEPS, CFG, CLIPS, JUDGED = 25, 4.0, 12, 50


def shares() -> Mapping[str, Any]:
    """Return the steps of each method at the evaluations of 25 regularised steps there and back."""
    plan = inversion("regularized")
    budget = STEPS * (plan.evaluations_per_step() + 2)
    return equal_evaluations(budget, {name: inversion(name) for name in METHODS})


def edit_run(seed: int, arm: str, folder: Path, say: Say) -> Mapping[str, float]:
    """Edit held-out clips to another label over the range of `target_flowstep`.

    Arm `no_edit` asks every method for the clip's own label.
    """
    flow = trained_flow(folder.parents[1], seed, GROUP, say)
    autoencoder = load_autoencoder(recipe.cpu_codec().model, flow.codec_folder)
    train = clips(flow.latents, "train", 1500, 7)
    judge = train_classifier(
        np.asarray(train["latents"]), np.asarray(train["labels"]), seed=0, weight_decay=1e-3
    )
    others = clips(flow.latents, "heldout", JUDGED, 500 + seed)
    told = judge.predict(np.asarray(others["latents"])) == np.asarray(others["labels"])
    numbers: dict[str, float] = {"judge": float(np.mean(told))}
    source = clips(flow.latents, "heldout", CLIPS, 200 + seed)
    kinds, own = len(flow.latents.labels), np.asarray(source["labels"])
    target = (own + 1 + np.arange(len(own)) % (kinds - 1)) % kinds
    wanted = jnp.asarray(own if arm == "no_edit" else target, jnp.int32)
    condition = flow.model.condition({"labels": wanted})
    rate, latents = flow.latents.sample_rate, flow.latents
    decode = jax.jit(lambda z: autoencoder.decode(z * (latents.std_L + 1e-5) + latents.mean_L))
    before = np.asarray(decode(source["latents"]))
    for method in METHODS if arm == "no_edit" else (arm,):
        share = shares()[method]
        for time in CONTROL_TIMES if arm == "no_edit" else TIMES:
            plan = inversion(method, steps=share.inversion_steps, target_flowstep=time)
            made = edit(
                flow.model,
                source["latents"],
                None,
                condition,
                plan,
                jax.random.key(seed),
                cfg_coef=CFG,
                generation_steps=share.generation_steps,
            )
            found = judge.predict(np.asarray(made.latents_BTC))
            name = f"{method}/{time}" if arm == "no_edit" else f"{time}"
            numbers[f"flip/{name}"] = float(np.mean(found == target))
            if arm == "no_edit":
                continue
            pairs = list(zip(before, np.asarray(decode(made.latents_BTC))))
            for measure, correlation in (
                ("chroma", chroma_correlation),
                ("onset", onset_correlation),
            ):
                numbers[f"{measure}/{name}"] = float(
                    np.mean([correlation(a, b, sample_rate=rate) for a, b in pairs])
                )
            numbers[f"evaluations/{name}"] = float(made.evaluations)
            say(f"{arm} at {time}: flips {numbers[f'flip/{name}']:.2f}, "
                f"chroma kept {numbers[f'chroma/{name}']:.3f}")  # fmt: skip
    return numbers


def kept_over_rates(numbers: Mapping[str, float], what: str = "chroma") -> float:
    """Return what is kept at a flip rate, averaged over `RATES`.

    At a rate the best value counts that the method reaches with at least as many flips; between
    the flow steps of neighbouring flip rates it is interpolated.  A rate that it never reaches counts as 0, what
    unrelated clips would keep.
    """
    points = sorted((numbers[f"flip/{t}"], numbers[f"{what}/{t}"]) for t in TIMES)
    dense = []
    for (f0, k0), (f1, k1) in zip(points, points[1:]):
        mix = np.linspace(0.0, 1.0, 21)
        dense += list(zip(f0 + mix * (f1 - f0), k0 + mix * (k1 - k0)))
    return float(
        np.mean([max((k for f, k in dense if f >= rate - 1e-9), default=0.0) for rate in RATES])
    )


def edit_decide(results: Results, threshold: Mapping[str, float]) -> Decision:
    """Return the verdict: the curve of the regularised inversion keeps more chroma."""
    controls = max(
        value
        for numbers in results["no_edit"].values()
        for name, value in numbers.items()
        if name.startswith("flip/")
    )
    judged = min(n["judge"] for n in results["regularized"].values())
    tells, still = judged >= threshold["judge"], controls <= threshold["no_edit"]
    reasons = [
        f"{'met' if tells else 'NOT met'}: the classifier tells held-out clips apart: least accuracy "
        f"{judged:.2f}, wanted at least {threshold['judge']}",
        f"{'met' if still else 'NOT met'}: edits towards the clip's own label do not flip it, by any "
        f"method: greatest share {controls:.2f}, wanted at most {threshold['no_edit']}",
    ]
    met_all, shown = True, []
    for other in ("sdedit", "ddim"):
        gains = _gains(results, "regularized", other)
        met = min(gains) >= threshold["gain"]
        met_all &= met
        reasons.append(
            f"{'met' if met else 'NOT met'}: chroma correlation kept over flip rates {RATES[0]} to "
            f"{RATES[-1]}, regularised minus {other}: {span(gains, '+.3f')}, wanted at least "
            f"{threshold['gain']}"
        )
        shown.append(f"{span(gains, '+.2f')} over {other}")
    reasons.append(
        f"reported: fixed point minus ddim: {span(_gains(results, 'fixed_point', 'ddim'), '+.3f')}"
    )
    for arm in METHODS:
        used = sorted({n[f"evaluations/{t}"] for n in results[arm].values() for t in TIMES})
        flips = ["/".join(f"{n[f'flip/{t}']:.2f}" for t in TIMES) for n in results[arm].values()]
        reasons.append(
            f"reported: {arm}: {used[-1]:.0f} evaluations at most; flips over target_flowstep "
            f"{TIMES}: {'; '.join(flips)}"
        )
    sound = tells and still
    verdict = "inconclusive" if not sound else ("holds" if met_all else "does not hold")
    ours = "chroma kept over a range of flip rates: " + ", ".join(shown)
    return Decision(verdict, tuple(reasons), ours)


def _gains(results: Results, one: str, other: str) -> list[float]:
    return [
        kept_over_rates(results[one][s]) - kept_over_rates(results[other][s]) for s in results[one]
    ]


def edit_draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw flips and preservation over target_flowstep."""
    arms = record["results"]

    def panel(name: str, label: str, title: str) -> dict[str, Any]:
        return {
            "x": list(TIMES),
            "series": {
                arm: [[n[f"{name}/{t}"] for t in TIMES] for n in arms[arm].values()]
                for arm in METHODS
            },
            "x_label": "target_flowstep (smaller edits more)",
            "y_label": label,
            "title": title,
        }

    seed_curves(
        path,
        [
            panel("flip", "share of clips with the target label", "Label flipped"),
            panel("chroma", "correlation with the source", "Chroma kept"),
            panel("onset", "correlation with the source", "Onsets kept"),
        ],
    )


EDITS = Claim(
    id="melodyflow/edits",
    statement=(
        "Edits by regularised inversion turn a clip to another label while keeping more of it than "
        "SDEdit and naive inversion do at an equal rate of success."
    ),
    paper_figure=(
        "figures not recovered; reviews of v2: best on overall quality and text relevance, below "
        "AudioLDM2-Music on consistency; target_flowstep swept to 0.25 [rev]"
    ),
    protocol=SHARED_TEXT
    + """
36 held-out clips are edited to another label (guidance 4) from target_flowstep 0 to 0.4, by every
method with the evaluations of 25 regularised steps in and 25 guided steps back (200).  A softmax
regression on the modulation spectra of 4,500 training latents judges the label; its features and
weight decay were chosen on whole training recordings left out of its fit.  Kept is the correlation of
chroma with the source after decoding, read off each method's curve at flip rates from 0.3 to 0.8 and
averaged.  Arm `no_edit` asks every method for the clip's own label.  A first protocol (18 clips, one
point of the curve, a chroma that could not tell notes below 185 Hz apart, a judge of 0.61) is
replaced by this one; its record was inconclusive.
""",
    metric="chroma correlation with the source, averaged over flip rates; share of flipped clips",
    baselines=("ddim", "sdedit", "fixed_point"),
    controls=("no_edit",),
    threshold={"gain": 0.05, "no_edit": 0.25, "judge": 0.7},
    seeds=(0, 1, 2),
    arms=(*METHODS, "no_edit"),
    run=edit_run,
    decide=edit_decide,
    settings={**SETTINGS, "shares": dict(shares()), "times": TIMES, "rates": RATES},
    draw=edit_draw,
)
