"""Find experiments by name or path and load them at a scale."""

import ast
import dataclasses
import hashlib
import importlib.util
import sys
import types
from pathlib import Path

from jaxherd.core import resources
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.experiment import SCALES, Experiment, Scale

# Recipes import their neighbours as `from . import other` through this package.
_PACKAGE = "jaxherd_experiments"
_NOT_RECIPES = ("_", "claims")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An experiment file that was found.

    Attributes:
      name: `<paper>/<file>`.
      path: of the Python file.
      summary: first line of its docstring, read without running it.
    """

    name: str
    path: Path
    summary: str


def entries() -> list[Entry]:
    """Return the experiments that come with jaxherd, by name."""
    root = resources.folder("experiments")
    found = []
    for path in sorted(root.glob("*/*.py")):
        if path.stem.startswith(_NOT_RECIPES):
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        summary = docstring.splitlines()[0] if docstring else ""
        found.append(Entry(f"{path.parent.name}/{path.stem}", path, summary))
    return found


def load(name: str, scale: Scale) -> Experiment:
    """Return the experiment of this name (or path of a Python file) at a scale.

    Raises:
      JaxherdError: no such experiment or scale, or the file has no `experiment(scale)`.
    """
    if scale not in SCALES:
        raise JaxherdError(f"no scale {scale!r}: choose among {', '.join(SCALES)}.")
    module = load_file(find(name))
    if not hasattr(module, "experiment"):
        raise JaxherdError(f"{name}: the file defines no experiment(scale).")
    experiment = module.experiment(scale)
    if not isinstance(experiment, Experiment):
        raise JaxherdError(f"{name}: experiment({scale!r}) returned no jaxherd Experiment.")
    return experiment


def find(name: str) -> Path:
    """Return the path of an experiment file.

    Raises:
      JaxherdError: there is none, answered with the nearest name.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise JaxherdError(f"no experiment file {name}.")
        return path
    known = {entry.name: entry.path for entry in entries()}
    if name not in known:
        raise JaxherdError(f"no experiment {name!r}; " + nearest(name, known))
    return known[name]


def load_file(path: Path) -> types.ModuleType:
    """Import a recipe; it may import the files beside it (`from . import other`)."""
    path = path.resolve()
    root = resources.folder("experiments").resolve()
    if not path.is_relative_to(root):
        # Two files of the same name in two folders are two experiments.
        package = f"jaxherd_user_{hashlib.sha256(str(path.parent).encode()).hexdigest()[:12]}"
        _package(package, path.parent)
        return _execute(path, f"{package}.{path.stem}")
    _package(_PACKAGE, root)
    paper = path.parent.name
    _package(f"{_PACKAGE}.{paper}", path.parent)
    return _execute(path, f"{_PACKAGE}.{paper}.{path.stem}")


def _package(name: str, folder: Path) -> None:
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


def _execute(path: Path, name: str) -> types.ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Frozen dataclasses look their module up while they are made.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
