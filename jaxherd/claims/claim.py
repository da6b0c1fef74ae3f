"""What a claim is: a paper's statement with the small protocol that decides it.

The threshold is a field, so that it is part of the protocol's hash and must be committed before
the record that carries the same hash.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import describe

Verdict = Literal["holds", "does not hold", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = ("holds", "does not hold", "inconclusive")

# results[arm][seed][metric]
Results = Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Decision:
    """A verdict with its reasons.

    Attributes:
      verdict: "holds", "does not hold" or "inconclusive".
      reasons: one sentence for each condition of the threshold, met or not.
      ours: the figure for the table, in one line.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    ours: str

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise JaxherdError(f"a verdict is one of {', '.join(VERDICTS)}, not {self.verdict!r}.")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and how it is tried.

    Attributes:
      id: `<paper>/<name>`; the paper is the folder under experiments/.
      statement: the claim in our words.
      paper_figure: what the paper publishes for it, with the tag of its source.
      protocol: what is done, for a reader; what was tuned, and on which seed, belongs here.
      metric: what is measured, with its unit.
      baselines: arms against which the effect is measured.
      controls: arms that must fail for the measurement to mean anything.
      threshold: names and numbers that `decide` compares with, fixed before the run.
      seeds: at least three, none of them used for tuning.
      arms: all arms, baselines and controls included.
      run: `run(seed, arm, folder, say)` trains in `folder`, resuming what is there, and returns
        the numbers of one arm and seed.
      decide: `decide(results, threshold)` gives the verdict.
      settings: what the arms are in code (configs, stages); part of the hash.
      draw: `draw(record, path)` draws the record's figure; None draws none.
    """

    id: str
    statement: str
    paper_figure: str
    protocol: str
    metric: str
    baselines: tuple[str, ...]
    controls: tuple[str, ...]
    threshold: Mapping[str, float]
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    run: Callable[[int, str, Path, Callable[[str], None]], Mapping[str, float]]
    decide: Callable[[Results, Mapping[str, float]], Decision]
    settings: Any = None
    draw: Callable[[Mapping[str, Any], Path], None] | None = None

    def __post_init__(self):
        if not re.fullmatch(r"[a-z0-9_]+/[a-z0-9_-]+", self.id):
            raise JaxherdError(f"claim {self.id!r}: an id is <paper>/<name> in lower case.")
        if len(set(self.seeds)) < 3:
            raise JaxherdError(f"claim {self.id}: at least three different seeds are needed.")
        for name in (*self.baselines, *self.controls):
            if name not in self.arms:
                raise JaxherdError(f"claim {self.id}: {name!r} is none of its arms {self.arms}.")
        if not self.threshold:
            raise JaxherdError(f"claim {self.id}: it has no threshold.")

    @property
    def paper(self) -> str:
        """The folder under experiments/."""
        return self.id.split("/")[0]

    @property
    def name(self) -> str:
        """The id without its paper; names the record's files."""
        return self.id.split("/")[1]

    def told(self) -> dict[str, Any]:
        """Return all that a result depends on, as JSON values: every field of every config."""
        return {name: describe(getattr(self, name)) for name in _TOLD}

    def protocol_hash(self) -> str:
        """Return a hash of `told()`: text, threshold, seeds, arms and every value of the settings."""
        return hash_of(self.told())

    def is_as_told(self, told: Mapping[str, Any]) -> bool:
        """Return whether the protocol is the one that an earlier `told()` describes.

        A config may have learned an option since then, if it is at its default: what was run did
        not have it.  Any value that was told and is another now, a changed default too, counts.
        """
        return all(_same(getattr(self, name), told.get(name)) for name in _TOLD)


# `run`, `decide` and `draw` are code; the paper's figure decides nothing.
_TOLD = ("id", "statement", "protocol", "metric", "baselines", "controls", "threshold", "seeds",
         "arms", "settings")  # fmt: skip


def hash_of(told: Mapping[str, Any]) -> str:
    """Return the hash of what `Claim.told` gave."""
    text = json.dumps(told, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _same(now: Any, told: Any) -> bool:
    if dataclasses.is_dataclass(now) and not isinstance(now, type):
        if not isinstance(told, Mapping) or told.get("class") != type(now).__name__:
            return False
        fields = {f.name: f for f in dataclasses.fields(now)}
        return told.keys() <= fields.keys() | {"class"} and all(
            _same(getattr(now, name), told[name])
            if name in told
            else getattr(now, name) == _default(f)
            for name, f in fields.items()
        )
    if isinstance(now, Mapping):
        return (
            isinstance(told, Mapping)
            and {str(key) for key in now} == told.keys()
            and all(_same(value, told[str(key)]) for key, value in now.items())
        )
    if isinstance(now, list | tuple):
        return (
            isinstance(told, list | tuple)
            and len(now) == len(told)
            and all(_same(a, b) for a, b in zip(now, told))
        )
    return describe(now) == told


def _default(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
