"""Folders that travel with the package: the recipes and the committed plans."""

from pathlib import Path

from jaxherd.core.errors import JaxherdError


def folder(name: str) -> Path:
    """Return the folder `experiments` or `tpu`: beside the package in a checkout, else inside it.

    Raises:
      JaxherdError: the package was installed without it.
    """
    package = Path(__file__).parents[1]
    for candidate in (package / "_resources" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise JaxherdError(f"this installation of jaxherd has no folder {name!r}: reinstall it.")
