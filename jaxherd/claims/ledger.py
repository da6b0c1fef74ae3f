"""The ledger: find claims, run their arms and seeds, keep the record.

Each finished (arm, seed) leaves `result.json` in the work folder, so that a run that was stopped
goes on with the one that it was at (whose own training resumes at its last checkpoint).
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxherd.claims.claim import VERDICTS, Claim, hash_of
from jaxherd.core import catalog, resources
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.experiment import describe, write_json
from jaxherd.core.runner import prepare_folder, versions

RECORDS = "records"
STALE = (
    "the claim's protocol (its text, threshold, seeds or a config's value) has changed since its "
    "record was made, or the record was edited; what is shown came out under the older protocol, and "
    "`jaxherd claims ID --run` decides anew."
)


def discover(root: Path | None = None) -> dict[str, Claim]:
    """Return all claims by id, from `CLAIMS` of every `<paper>/claims.py`.

    Args:
      root: holds the papers' folders; the experiments that come with jaxherd by default.
    Raises:
      JaxherdError: a file without `CLAIMS`, a claim of another paper, or an id twice.
    """
    root = resources.folder("experiments") if root is None else root
    found: dict[str, Claim] = {}
    for path in sorted(root.glob("*/claims.py")):
        module = catalog.load_file(path)
        for claim in getattr(module, "CLAIMS", None) or _no_claims(path):
            if claim.paper != path.parent.name:
                raise JaxherdError(f"{path}: claim {claim.id} belongs to another paper's folder.")
            if claim.id in found:
                raise JaxherdError(f"{path}: two claims are called {claim.id}.")
            found[claim.id] = claim
    return found


def _no_claims(path: Path):
    raise JaxherdError(f"{path} defines no CLAIMS, a tuple of jaxherd.claims.claim.Claim.")


def choose(claims: Mapping[str, Claim], ids: tuple[str, ...]) -> list[Claim]:
    """Return the claims with these ids, or all of them when none is named.

    Raises:
      JaxherdError: no such claim, answered with the nearest one.
    """
    for name in ids:
        if name not in claims:
            raise JaxherdError(f"no claim {name!r}; " + nearest(name, claims))
    return [claims[name] for name in ids or claims]


def record_path(claim: Claim, root: Path | None = None) -> Path:
    """Return where the claim's record is, or will be."""
    root = resources.folder("experiments") if root is None else root
    return root / claim.paper / RECORDS / f"{claim.name}.json"


def read_record(claim: Claim, root: Path | None = None) -> dict[str, Any] | None:
    """Return the claim's record, or None if it was never run.

    Raises:
      JaxherdError: the file is no record of this claim.
    """
    path = record_path(claim, root)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise JaxherdError(f"{path} is no JSON ({error}): restore it or run the claim.") from error
    if record.get("claim") != claim.id or record.get("verdict") not in VERDICTS:
        raise JaxherdError(f"{path} is no record of {claim.id}: restore it or run the claim.")
    return record


def status(claim: Claim, record: Mapping[str, Any] | None) -> str:
    """Return the verdict, "not run", or "stale" when the protocol changed since the record."""
    if record is None:
        return "not run"
    # The hash seals what the record says of its protocol; that is then compared with the claim's.
    told = {**{name: record.get(name) for name in claim.told()}, "id": record.get("claim")}
    sealed = record["protocol_hash"] == hash_of(told)
    return record["verdict"] if sealed and claim.is_as_told(told) else "stale"


def run_claim(
    claim: Claim,
    workdir: Path,
    *,
    root: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run what is missing of the claim's arms and seeds, decide, and write record and figure.

    Args:
      claim: what to run.
      workdir: results of a protocol are kept in `<workdir>/<paper>-<name>-<hash>/<arm>-<seed>/`.
      root: the record goes to `<root>/<paper>/records/`; see `discover`.
      say: prints one line for the user.
    Raises:
      JaxherdError: a folder cannot be written, or an arm returned something that is no number.
    """
    prepare_folder(workdir)
    path = record_path(claim, root)
    _check_writable(path.parent)
    results: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in claim.arms}
    seconds, total = 0.0, len(claim.arms) * len(claim.seeds)
    pairs = [(seed, arm) for seed in claim.seeds for arm in claim.arms]
    for number, (seed, arm) in enumerate(pairs, 1):
        say(f"{claim.id} {number}/{total}: {arm}, seed {seed}")
        result = run_arm(claim, arm, seed, workdir, say=say)
        results[arm][seed] = result["numbers"]
        seconds += result["seconds"]
    record = make_record(claim, results, seconds)
    if claim.draw is not None:
        record["figure"] = f"{claim.name}.png"
        claim.draw(record, path.with_name(record["figure"]))
    write_json(path, record)
    say(f"{claim.id}: {record['verdict']}; record in {path}")
    return record


def run_arm(
    claim: Claim, arm: str, seed: int, workdir: Path, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Return {"numbers", "seconds"} of one arm and seed, from an earlier run if there was one.

    Different arms and seeds may run in processes of their own, over one work folder.
    After a stop, "seconds" are those of the last attempt.
    """
    place = workdir / f"{claim.paper}-{claim.name}-{claim.protocol_hash()}" / f"{arm}-{seed}"
    kept = place / "result.json"
    if kept.is_file():
        say("finished earlier.")
        return json.loads(kept.read_text(encoding="utf-8"))
    place.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    numbers = _numbers(claim, arm, claim.run(seed, arm, place, say))
    result = {"numbers": numbers, "seconds": time.monotonic() - started}
    write_json(kept, result)
    return result


def make_record(
    claim: Claim, results: Mapping[str, Mapping[int, Mapping[str, float]]], seconds: float
) -> dict[str, Any]:
    """Return the record of finished results: numbers, spread, verdict and how they came about."""
    decision = claim.decide(results, claim.threshold)
    return {
        "claim": claim.id,
        "statement": claim.statement,
        "paper_figure": claim.paper_figure,
        "protocol": claim.protocol,
        "protocol_hash": claim.protocol_hash(),
        "metric": claim.metric,
        "baselines": list(claim.baselines),
        "controls": list(claim.controls),
        "threshold": dict(claim.threshold),
        "seeds": list(claim.seeds),
        "arms": list(claim.arms),
        "settings": describe(claim.settings),
        "verdict": decision.verdict,
        "ours": decision.ours,
        "reasons": list(decision.reasons),
        "spread": {arm: spread(by_seed) for arm, by_seed in results.items()},
        "results": {
            arm: {str(seed): dict(numbers) for seed, numbers in by_seed.items()}
            for arm, by_seed in results.items()
        },
        "command": f"jaxherd claims {claim.id} --run",
        "seconds": round(seconds),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def spread(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean, least and greatest value over the seeds of each metric."""
    runs = list(by_seed.values())
    return {
        name: {
            "mean": sum(run[name] for run in runs) / len(runs),
            "min": min(run[name] for run in runs),
            "max": max(run[name] for run in runs),
        }
        for name in runs[0]
    }


def _numbers(claim: Claim, arm: str, values: Mapping[str, Any]) -> dict[str, float]:
    for name, value in values.items():
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not math.isfinite(value):
            raise JaxherdError(f"{claim.id}: arm {arm!r} returned {name}={value!r}, no number.")
    if not values:
        raise JaxherdError(f"{claim.id}: arm {arm!r} returned no numbers.")
    return {name: float(value) for name, value in values.items()}


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise JaxherdError(
            f"the record's folder {folder} cannot be written: run claims from a checkout."
        )
