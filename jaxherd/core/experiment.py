"""What an experiment is: named stages that read each other's artifacts and can stop anywhere.

A stage is a frozen dataclass with a `name`, the names of stages it `reads`, and `run(context)`.
What a stage does (train, merge, quantise, evaluate) is the business of higher floors.  A stage
that has finished leaves `done.json`; a run that stops anywhere goes on at the first stage without
one, and a training stage goes on at its last committed step.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxherd.core import overrides
from jaxherd.core.errors import JaxherdError, nearest

Scale = Literal["cpu", "gpu", "full"]
SCALES: tuple[Scale, ...] = ("cpu", "gpu", "full")


@runtime_checkable
class Stage(Protocol):
    """One resumable step of an experiment.

    It may also have `writes`, what it leaves in its folder in a few words, for `jaxherd inspect`;
    `check(devices, compiler_options)`, which raises before anything is written; and
    `report(folder)`, its section of the run's report.
    """

    @property
    def name(self) -> str:
        """Unique within the experiment; names the stage's folder."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of earlier stages whose artifacts this one needs."""
        ...

    def run(self, context: "StageContext") -> Mapping[str, Any]:
        """Do the work, or go on with it, and return a JSON-able summary."""
        ...


@dataclasses.dataclass(frozen=True)
class StageContext:
    """What a stage is given.

    Attributes:
      folder: the stage's own folder, an absolute path; all that it writes goes here.
      artifacts: folders of the stages that it reads, by name; absolute paths.
      target: name of the target, such as "cpu" or "v5p:4x4x8".
      devices: the devices to use, in order.
      seed: of the whole run.
      say: prints one line for the user.
      quiet: no progress bar.
      compiler_options: of XLA, the same that a plan for the target used.
    """

    folder: Path
    artifacts: Mapping[str, Path]
    target: str
    devices: tuple[Any, ...]
    seed: int
    say: Callable[[str], None] = print
    quiet: bool = False
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Named stages, in order, at one scale.

    Attributes:
      name: `<paper>/<file>`, such as "llama4/scout".
      scale: "cpu", "gpu" or "full".
      target: where this scale is meant to run, such as "cpu" or "v5p:4x4x8".
      stages: in the order in which they run.
      summary: one sentence for `jaxherd list`.
    """

    name: str
    scale: Scale
    target: str
    stages: tuple[Any, ...]
    summary: str = ""

    def __post_init__(self):
        seen: set[str] = set()
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise JaxherdError(f"{self.name}: {stage!r} is not a stage (name, reads, run).")
            if stage.name in seen:
                raise JaxherdError(f"{self.name}: two stages are called {stage.name!r}.")
            for needed in stage.reads:
                if needed not in seen:
                    raise JaxherdError(
                        f"{self.name}: stage {stage.name!r} reads {needed!r}, which is no earlier "
                        "stage; " + nearest(needed, seen)
                    )
            seen.add(stage.name)
        if not self.stages:
            raise JaxherdError(f"{self.name}: an experiment needs at least one stage.")

    def stage(self, name: str) -> Any:
        """Return the stage of this name.

        Raises:
          JaxherdError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise JaxherdError(
            f"{self.name} has no stage {name!r}; " + nearest(name, [s.name for s in self.stages])
        )

    def with_overrides(self, assignments: Sequence[str]) -> "Experiment":
        """Return the experiment with each `path.to.field=value` applied.

        The path starts with a stage's name (`pretrain.optimizer.peak=1e-3`) or with a field of
        stages, and then applies to every stage that has it (`optimizer.peak=1e-3`).  Of several
        values for one field of a stage the last one counts, and the others are not looked at.

        Raises:
          JaxherdError: a name that does not exist, answered with the nearest one, or a wrong value.
        """
        experiment, waiting = self, self._last_of_each(assignments)
        while waiting:
            # A value may be wrong only as long as a later one is not set: it is tried again then.
            refused: list[tuple[_Override, JaxherdError]] = []
            for override in waiting:
                try:
                    experiment = experiment._with_override(override)
                except JaxherdError as error:
                    refused.append((override, error))
            if len(refused) == len(waiting):
                raise refused[0][1]
            waiting = [override for override, _ in refused]
        return experiment

    def _last_of_each(self, assignments: Sequence[str]) -> list["_Override"]:
        """Return the overrides, each without the places that a later one sets too.

        So each place is set once, and it does not matter in which order the overrides succeed.
        """
        kept, taken = [], set()
        for text in reversed(assignments):
            path, value = overrides.parse_assignment(text)
            places = self._places(path)
            own = tuple(place for place in places if place not in taken)
            taken.update(places)
            if own:
                kept.append(_Override(".".join(path), own, value))
        return kept[::-1]

    def _places(self, path: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
        """Return (stage, path inside it) of every place that a path names."""
        names = [stage.name for stage in self.stages]
        if path[0] in names and len(path) > 1:
            owners, inside = [self.stage(path[0])], path[1:]
        else:
            owners, inside = [s for s in self.stages if overrides.has_path(s, path)], path
        if not owners:
            fields = {f.name for stage in self._configs() for f in dataclasses.fields(stage)}
            raise JaxherdError(
                f"--set {'.'.join(path)}: {self.name} has no stage or field {path[0]!r}; "
                + nearest(path[0], [*names, *fields])
            )
        return [(stage.name, overrides.from_the_front(stage, inside)) for stage in owners]

    def _with_override(self, override: "_Override") -> "Experiment":
        inside = dict(override.places)
        stages = tuple(
            overrides.replace_at(stage, inside[stage.name], override.value, shown=override.shown)
            if stage.name in inside
            else stage
            for stage in self.stages
        )
        return dataclasses.replace(self, stages=stages)

    def fields(self) -> dict[str, str]:
        """Return every field that `with_overrides` can set, by path, with its value as text."""
        return {
            f"{stage.name}.{path}": value
            for stage in self._configs()
            for path, value in overrides.fields(stage)
        }

    def _configs(self) -> list[Any]:
        """Return the stages that are dataclasses: those of others cannot be set."""
        return [stage for stage in self.stages if dataclasses.is_dataclass(stage)]


@dataclasses.dataclass(frozen=True)
class _Override:
    """A value for one place in each of some stages; `shown` is the path as it was given."""

    shown: str
    places: tuple[tuple[str, tuple[str, ...]], ...]
    value: str


def is_done(folder: Path) -> bool:
    """Return whether the stage of this folder has finished."""
    return (folder / "done.json").exists()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, also after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True, default=str)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def describe(config: Any) -> Any:
    """Return a JSON-able picture of nested dataclasses, with class names, for records."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: describe(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"class": type(config).__name__, **fields}
    if isinstance(config, Mapping):
        return {str(key): describe(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [describe(item) for item in config]
    if config is None or isinstance(config, str | int | float | bool):
        return config
    return getattr(config, "__name__", None) or str(config)


def finish(folder: Path, summary: Mapping[str, Any]) -> None:
    """Mark a stage as finished."""
    write_json(folder / "done.json", {"finished_at": time.time(), "summary": dict(summary)})
