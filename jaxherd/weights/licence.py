"""What Meta's Llama licences ask of whoever passes a derived model on.

A copy of the agreement and a file "Notice" with a prescribed line go along, and the model's name
begins with "Llama".  It is known by what stands beside the weights: a licence file, a Notice, or the
name that Hugging Face's config.json keeps.  Weights that were trained from nothing in an architecture
of Meta's are nobody's derivative.  No text of a licence is part of jaxherd: the copy is the source's.

Source: llama4.md section 10 (items 1 to 3).
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jaxherd.core.errors import JaxherdError

_TITLE = re.compile(r"llama\s+(\d+(?:\.\d+)?)\s+community\s+license", re.IGNORECASE)
# A licence names itself at its head; larger files are none.
_HEAD, _LARGEST = 4096, 1 << 20
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "Notice", "NOTICE")
_NAMES = re.compile(r"meta-llama/(?:Meta-)?Llama-(\d+(?:\.\d+)?)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class LlamaMaterials:
    """What tells that a checkpoint is derived from Llama Materials.

    Attributes:
      version: of the licence, such as "4".
      reason: what was found, for a sentence.
      licence: the copy of the agreement beside the weights; None if there is none.
      notice: likewise the Notice.
    """

    version: str
    reason: str
    licence: pathlib.Path | None = None
    notice: pathlib.Path | None = None

    def notice_text(self) -> str:
        """Return the attribution line that the licence prescribes, for this version."""
        return (
            f"Llama {self.version} is licensed under the Llama {self.version} Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
        )

    def files(self) -> tuple[list[pathlib.Path], dict[str, str]]:
        """Return (files to copy, texts to write by name) of an export."""
        assert self.licence is not None
        copied, written = [self.licence], {}
        if self.notice is None:
            written["Notice"] = self.notice_text()
        else:
            copied.append(self.notice)
        return copied, written

    def check_export(self, name: str) -> None:
        """Check that an export may go out under a name.

        Args:
          name: of the model, as that of its folder.
        Raises:
          JaxherdError: it does not begin with "Llama", or there is no copy of the agreement to go
            along.
        """
        if not name.lower().startswith("llama"):
            raise JaxherdError(
                f"this model is derived from Llama Materials ({self.reason}), and their licence asks "
                f"that its name begin with 'Llama': call the folder Llama-{name}."
            )
        if self.licence is None:
            raise JaxherdError(
                f"this model is derived from Llama Materials ({self.reason}), and a copy of their "
                "licence must go along: put it beside the weights as LICENSE."
            )


def llama_materials(
    folder: pathlib.Path, config: Mapping[str, Any] | None = None
) -> LlamaMaterials | None:
    """Return what makes a folder's checkpoint Llama Materials; None if nothing says so.

    Args:
      folder: with the weights.
      config: the content of its config.json, if it has one.
    """
    found: dict[str, pathlib.Path] = {}
    version = None
    for name in _FILES:
        path = folder / name
        title = _TITLE.search(_head(path))
        if title is not None:
            found.setdefault("notice" if name.lower() == "notice" else "licence", path)
            version = version or title[1]
    named = _NAMES.match(str((config or {}).get("_name_or_path") or ""))
    if version is None and named is None:
        return None
    if version is None and named is not None:
        reason = f"config.json names {named[0]}"
    else:
        first = found.get("licence") or found["notice"]
        reason = f"{first.name} is that of Llama {version}"
    return LlamaMaterials(version or (named[1] if named else ""), reason, **found)


def _head(path: pathlib.Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return ""
        with path.open("rb") as file:
            return file.read(_HEAD).decode("utf-8", "replace")
    except OSError:
        return ""
