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

    def protocol_hash(self) -> str:
        """Return a hash of all that a result depends on: text, threshold, seeds, arms, settings.

        Fields of the settings that have their default value do not count, so that a record does
        not go stale because some config learned a new option.
        """
        parts = {
            f.name: _told(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in ("run", "decide", "draw", "paper_figure")
        }
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _told(config: Any) -> Any:
    """Return what `describe` returns, without fields at their default values."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if f.default is dataclasses.MISSING or value != f.default:
                fields[f.name] = _told(value)
        return {"class": type(config).__name__, **fields}
    if isinstance(config, Mapping):
        return {str(key): _told(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [_told(item) for item in config]
    return describe(config)
