"""Run an experiment's stages in order, from wherever an earlier run stopped."""

import errno
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxherd.core import provenance
from jaxherd.core.errors import JaxherdError, StorageError
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
    for stage in experiment.stages:
        if hasattr(stage, "check") and not is_done(workdir / stage.name):
            stage.check(devices, compiler_options)
    made = prepare_folder(workdir)
    is_new = _claim(workdir, experiment, seed, is_main)
    try:
        return _run_stages(
            experiment,
            workdir,
            is_main,
            target=target,
            devices=devices,
            seed=seed,
            say=say,
            quiet=quiet,
            compiler_options=compiler_options or {},
        )
    except JaxherdError:
        if is_new and is_main:
            _withdraw(workdir, made)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        reason = "is read-only" if error.errno == errno.EROFS else "is full"
        raise StorageError(
            f"the disk of {workdir} {reason}: make room and run the same command to go on."
        ) from error


def _run_stages(
    experiment: Experiment,
    workdir: Path,
    is_main: bool,
    *,
    say: Callable[[str], None],
    **given: Any,
) -> dict[str, Any]:
    summaries: dict[str, Any] = {}
    # Absolute: a stage may hand a path on to what resolves it from elsewhere.
    workdir = workdir.absolute()
    for stage in experiment.stages:
        folder = workdir / stage.name
        if is_done(folder):
            summaries[stage.name] = json.loads((folder / "done.json").read_text())["summary"]
            say(f"{stage.name}: finished earlier, nothing to do.")
            continue
        context = StageContext(
            folder=folder,
            artifacts={name: workdir / name for name in stage.reads},
            say=say,
            **given,
        )
        if is_main:
            # Before the first checkpoint: one that a killed run leaves is known for what it is.
            sources = [*context.artifacts.values(), *provenance.given_folders(stage)]
            provenance.inherit(folder, sources)
        summaries[stage.name] = dict(stage.run(context))
        if is_main:
            finish(folder, summaries[stage.name])
    if is_main:
        write_report(experiment, workdir)
    return summaries


def prepare_folder(workdir: Path) -> list[Path]:
    """Make the folder and try to write in it; returns the folders that were made, inmost first.

    Raises:
      JaxherdError: it is a file, or cannot be written.
    """
    made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # A name of its own: the processes of a slice probe one shared folder at the same time.
        with tempfile.NamedTemporaryFile(dir=workdir, prefix=".probe."):
            pass
    except OSError as error:
        raise JaxherdError(
            f"workdir {workdir} cannot be written ({error.strerror or error}): choose another "
            "with --workdir."
        ) from error
    return made


def _withdraw(workdir: Path, made: list[Path]) -> None:
    """Forget a new run that failed before any of its stages wrote something."""
    if [path.name for path in workdir.iterdir()] != ["run.json"]:
        return
    (workdir / "run.json").unlink()
    for folder in made:
        folder.rmdir()


def _claim(workdir: Path, experiment: Experiment, seed: int, is_main: bool) -> bool:
    """Write down whose folder this is; returns whether it was nobody's."""
    path = workdir / "run.json"
    wanted = {"experiment": describe(experiment), "seed": seed}
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise JaxherdError(
                f"{path} cannot be read: delete it to go on, or choose another --workdir."
            ) from error
        for part in ("experiment", "seed"):
            change = _first_difference(found.get(part), json.loads(json.dumps(wanted[part])), part)
            if change:
                raise JaxherdError(
                    f"workdir {workdir} belongs to another run: {change}. Use the same settings "
                    "to resume, or another --workdir."
                )
        return False
    if is_main:
        write_json(path, {**wanted, "versions": versions(), "command": sys.argv})
    return True


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
