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


def installed() -> bool:
    """Return whether the recipes lie inside the installed package, where nothing is to be written."""
    return folder("experiments").is_relative_to(Path(__file__).parents[1])


def in_checkout(name: str) -> Path | None:
    """Return the folder `experiments` or `tpu` of a checkout, where its files may be written.

    None where jaxherd is installed and no checkout is near.
    """
    if not installed():
        return folder(name)
    place = checkout()
    return None if place is None else place / name


def checkout() -> Path | None:
    """Return the nearest checkout of jaxherd: the current folder or one above it, or None."""
    here = Path.cwd()
    for place in (here, *here.parents):
        if (place / "jaxherd" / "core" / "resources.py").is_file() and (
            place / "experiments"
        ).is_dir():
            return place
    return None
