"""Run an experiment's stages in order, from wherever an earlier run stopped."""

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import (
    Experiment,
    StageContext,
    describe,
    finish,
    is_done,
    write_json,
)

_VERSIONED = ("jaxherd", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")


def run_experiment(
    experiment: Experiment,
    workdir: Path,
    *,
    target: str,
    devices: tuple[Any, ...],
    seed: int = 0,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    is_main: bool = True,
    compiler_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run all unfinished stages; returns each stage's summary by name.

    The folder remembers the experiment: running another one, or the same with other settings, in
    it is an error rather than a mixture.

    Args:
      experiment: what to run.
      workdir: made if needed; `<workdir>/<stage>/` belongs to the stage.
      target, devices, seed, say, quiet, compiler_options: see `StageContext`.
      is_main: whether this process writes the records (process 0 of a slice).
    Raises:
      JaxherdError: the folder cannot be written or belongs to another run.
    """
    prepare_folder(workdir)
    _claim(workdir, experiment, seed, is_main)
    summaries: dict[str, Any] = {}
    for stage in experiment.stages:
        folder = workdir / stage.name
        if is_done(folder):
            summaries[stage.name] = json.loads((folder / "done.json").read_text())["summary"]
            say(f"{stage.name}: finished earlier, nothing to do.")
            continue
        context = StageContext(
            folder=folder,
            artifacts={name: workdir / name for name in stage.reads},
            target=target,
            devices=devices,
            seed=seed,
            say=say,
            quiet=quiet,
            compiler_options=compiler_options or {},
        )
        summaries[stage.name] = dict(stage.run(context))
        if is_main:
            finish(folder, summaries[stage.name])
    if is_main:
        write_report(experiment, workdir)
    return summaries


def prepare_folder(workdir: Path) -> None:
    """Make the folder and try to write in it.

    Raises:
      JaxherdError: it is a file, or cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise JaxherdError(
            f"workdir {workdir} cannot be written ({error.strerror or error}): choose another "
            "with --workdir."
        ) from error


def _claim(workdir: Path, experiment: Experiment, seed: int, is_main: bool) -> None:
    path = workdir / "run.json"
    wanted = {"experiment": describe(experiment), "seed": seed}
    if path.exists():
        found = json.loads(path.read_text())
        for part in ("experiment", "seed"):
            change = _first_difference(found.get(part), json.loads(json.dumps(wanted[part])), part)
            if change:
                raise JaxherdError(
                    f"workdir {workdir} belongs to another run: {change}. Use the same settings "
                    "to resume, or another --workdir."
                )
        return
    if is_main:
        write_json(path, {**wanted, "versions": versions(), "command": sys.argv})


def _first_difference(old: Any, new: Any, path: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            change = _first_difference(old.get(key), new.get(key), f"{path}.{key}")
            if change:
                return change
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new)):
            label = a.get("name", index) if isinstance(a, dict) else index
            change = _first_difference(a, b, f"{path}.{label}")
            if change:
                return change
        return None
    return None if old == new else f"{path} was {_short(old)} and is now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


def versions() -> dict[str, str]:
    """Return versions of Python and of the packages that matter to a result."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_report(experiment: Experiment, workdir: Path) -> Path:
    """Write `report.md` from what each stage reports; returns its path."""
    sections = [f"# {experiment.name} ({experiment.scale})", "", experiment.summary, ""]
    for stage in experiment.stages:
        if hasattr(stage, "report"):
            sections += [stage.report(workdir / stage.name), ""]
    path = workdir / "report.md"
    path.write_text("\n".join(sections), encoding="utf-8")
    return path
