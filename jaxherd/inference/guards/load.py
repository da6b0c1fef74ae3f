"""Guards by what a user names: a file of rules, a folder with a classifier, or "builtin"."""

import os
import pathlib
from collections.abc import Sequence

from jaxherd.core.errors import JaxherdError
from jaxherd.data.sources import resolve
from jaxherd.inference.guards.guard import Guard, GuardChain
from jaxherd.inference.guards.rules import builtin_rules, load_rules

BUILTIN = "builtin"


def load_guard(source: str | os.PathLike[str]) -> Guard:
    """Return a guard.

    Args:
      source: "builtin", a .toml or .json file of rules, or the folder of a trained classifier.
    Raises:
      JaxherdError: there is none, or it is no guard.
    """
    if os.fspath(source) == BUILTIN:
        return builtin_rules()
    path = pathlib.Path(resolve(os.fspath(source)))
    if path.is_dir():
        from jaxherd.inference.guards.classifier import ClassifierGuard

        return ClassifierGuard.load(path)
    if path.suffix.lower() not in (".toml", ".json"):
        raise JaxherdError(
            f"{str(path)!r} is no guard: name a .toml or .json file of rules, the folder of a "
            f"classifier, or {BUILTIN!r}."
        )
    return load_rules(path)


def load_guards(sources: Sequence[str | os.PathLike[str]]) -> Guard | None:
    """Return the chain of several guards, the guard of one, or None of none."""
    guards = [load_guard(source) for source in sources]
    return guards[0] if len(guards) == 1 else GuardChain(guards) if guards else None
