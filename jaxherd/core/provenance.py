"""Where weights come from, carried from stage to stage of a run.

A stage's folder may hold `provenance/<origin>/`: an `origin.json` that says what was found, and the texts
(licence, notice) that must go along.  The runner copies those of every stage that a stage reads, before
it begins: parameters that training starts from, teachers, and data that a model made all count.  What an
origin asks for is not this file's business (`jaxherd.weights.licence`).
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import write_json

FOLDER, FILE = "provenance", "origin.json"


def record(folder: Path, name: str, about: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Write an origin into a stage's folder.

    Args:
      folder: of the stage.
      name: of the origin, as a folder may be called.
      about: what `origins` gives back; JSON.
      files: texts that go along.
    """
    place = folder / FOLDER / name
    place.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, place / path.name)
    write_json(place / FILE, about)


def origins(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return (folder, content of origin.json) of every origin, in the order of their names.

    Raises:
      JaxherdError: one cannot be read; nothing that may bind an export is passed over.
    """
    found = []
    for path in sorted((folder / FOLDER).glob(f"*/{FILE}")):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise JaxherdError(
                f"{str(path)!r} tells where the weights come from and cannot be read ({error}): "
                "restore it."
            ) from error
        if not isinstance(about, dict):
            raise JaxherdError(f"{str(path)!r} tells where the weights come from: restore it.")
        found.append((path.parent, about))
    return found


def inherit(folder: Path, sources: Iterable[Path]) -> None:
    """Copy the origins of other folders into a stage's; one that is there already stays."""
    for source in sources:
        for place, about in origins(source):
            if not (folder / FOLDER / place.name / FILE).exists():
                files = (path for path in place.iterdir() if path.name != FILE and path.is_file())
                record(folder, place.name, about, sorted(files))


def given_folders(config: Any) -> list[Path]:
    """Return the folders beside data that a stage's config names, whose provenance counts for it.

    Any part of a config may have `provenance_folders()`; parts are looked for in fields of dataclasses
    and in tuples.  What only measures (`evaluations`, `callbacks`) teaches nothing and does not count.
    """
    found: list[Path] = []
    if hasattr(config, "provenance_folders"):
        found += config.provenance_folders()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        for field in dataclasses.fields(config):
            if field.name in ("evaluations", "callbacks"):
                continue
            found += given_folders(getattr(config, field.name))
    elif isinstance(config, tuple | list):
        for item in config:
            found += given_folders(item)
    return found
