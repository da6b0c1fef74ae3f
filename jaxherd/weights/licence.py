"""What Meta's Llama licences ask of whoever passes a derived model on.

A copy of the agreement and a file "Notice" with a prescribed line go along, and the model's name
begins with "Llama", also where a model was trained from Llama Materials or on their outputs.  Known it is
by what stands beside the weights (a licence file, a Notice, the head of a model card), by the name in
Hugging Face's config.json, by a GGUF file's metadata, and by the provenance that stages of a run carry on
(`jaxherd.core.provenance`).  Weights that were trained from nothing in an architecture of Meta's are
nobody's derivative.  No text of a licence is part of jaxherd: the copy is the source's.

Source: llama4.md section 10 (items 1 to 3).
"""

import dataclasses
import pathlib
import re
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from jaxherd.core import provenance
from jaxherd.core.errors import JaxherdError

_TITLE = re.compile(r"llama\s+(\d+(?:\.\d+)?)\s+community\s+license", re.IGNORECASE)
# A licence names itself at its head; larger files are none.
_HEAD, _LARGEST = 4096, 1 << 20
_FILES = re.compile(r"(licen[cs]e|notice)([-.].*)?", re.IGNORECASE)
_NAMES = re.compile(
    r"(?:https?://huggingface\.co/)?meta-llama/(?:Meta-)?Llama-(?:Guard-|Prompt-Guard-)?(\d+(?:\.\d+)?)",
    re.IGNORECASE,
)
# As Hugging Face's model cards and GGUF's general.license write it: llama4, llama3.2.
_SHORT = re.compile(r"llama-?(\d+(?:\.\d+)?)", re.IGNORECASE)
_FAMILY = "llama"


@dataclasses.dataclass(frozen=True)
class LlamaMaterials:
    """What tells that a checkpoint is derived from Llama Materials.

    Attributes:
      version: of the licence, such as "4".
      reason: what was found, for a sentence.
      licence: the copy of the agreement beside the weights; None if there is none.
      notice: likewise the Notice.
      others: materials of other versions of the licence that went into it as well.
    """

    version: str
    reason: str
    licence: pathlib.Path | None = None
    notice: pathlib.Path | None = None
    others: tuple["LlamaMaterials", ...] = ()

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
        for other in self.others:
            assert other.licence is not None
            text = other.licence.read_text(encoding="utf-8", errors="replace")
            written[f"LICENSE-Llama-{other.version}"] = text
            kept = other.notice
            written[f"Notice-Llama-{other.version}"] = (
                other.notice_text() if kept is None else kept.read_text(encoding="utf-8")
            )
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
        for one in (self, *self.others):
            if one.licence is None:
                raise JaxherdError(
                    f"this model is derived from Llama Materials ({one.reason}), and a copy of their "
                    "licence must go along: put it beside the weights as LICENSE."
                )

    def record(self, folder: pathlib.Path) -> None:
        """Write this into the folder of a stage, from where later stages have it."""
        for one in (self, *self.others):
            files = [path for path in (one.licence, one.notice) if path is not None]
            about = {"family": _FAMILY, "version": one.version, "reason": one.reason}
            provenance.record(folder, f"{_FAMILY}-{one.version}", about, files)


def llama_materials(
    folder: pathlib.Path, config: Mapping[str, Any] | None = None
) -> LlamaMaterials | None:
    """Return what makes a folder's checkpoint Llama Materials; None if nothing says so.

    Args:
      folder: with the weights, or of a stage of ours.
      config: the content of its config.json or a GGUF file's metadata, if it has either.
    Raises:
      JaxherdError: the provenance of a stage cannot be read.
    """
    licences, notices = _texts(folder)
    found: dict[str, LlamaMaterials] = {}
    for version in dict.fromkeys([*licences, *notices]):
        licence, notice = licences.get(version), notices.get(version)
        told = licence or notice
        assert told is not None
        reason = f"{told.name} is that of Llama {version}"
        found[version] = LlamaMaterials(version, reason, licence, notice)
    for place, about in provenance.origins(folder):
        if about.get("family") == _FAMILY:
            version = str(about.get("version", ""))
            own, kept = _texts(place), found.get(version)
            found[version] = LlamaMaterials(
                version,
                str(about.get("reason", "its provenance")),
                own[0].get(version) or (kept and kept.licence) or _only(licences),
                own[1].get(version) or (kept and kept.notice),
            )
    for version, reason in [*_in_config(config or {}), *_in_card(folder)]:
        if version not in found:
            # A copy beside it may be that of another version: which one binds is not ours to say.
            found[version] = LlamaMaterials(version, reason, _only(licences), None)
    if not found:
        return None
    first, *others = found.values()
    return dataclasses.replace(first, others=tuple(others))


def joined(materials: Iterable[LlamaMaterials | None]) -> LlamaMaterials | None:
    """Return several findings as one; None if there is none."""
    found: dict[str, LlamaMaterials] = {}
    for one in materials:
        for part in () if one is None else (one, *one.others):
            kept = found.get(part.version)
            if kept is None or kept.licence is None:
                found[part.version] = dataclasses.replace(part, others=())
    if not found:
        return None
    first, *others = found.values()
    return dataclasses.replace(first, others=tuple(others))


# Modules that `load` gave, as long as they live.  What is made of them (cast, trained) is not known here:
# stages carry provenance in their folders, and `save` takes `derived_from`.
_LOADED: weakref.WeakKeyDictionary[Any, LlamaMaterials] = weakref.WeakKeyDictionary()


def remember(module: Any, materials: LlamaMaterials | None) -> None:
    """Keep what is known of a loaded module."""
    if materials is not None:
        _LOADED[module] = materials


def remembered(module: Any) -> LlamaMaterials | None:
    """Return what is known of a module that `load` gave."""
    return _LOADED.get(module)


def _texts(
    folder: pathlib.Path,
) -> tuple[dict[str, pathlib.Path], dict[str, pathlib.Path]]:
    """Return (licences, notices) of a folder by version."""
    licences: dict[str, pathlib.Path] = {}
    notices: dict[str, pathlib.Path] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if _FILES.fullmatch(path.name) and (title := _TITLE.search(_head(path))):
                is_notice = path.name.lower().startswith("notice")
                (notices if is_notice else licences).setdefault(title[1], path)
    return licences, notices


def _only(licences: Mapping[str, pathlib.Path]) -> pathlib.Path | None:
    return next(iter(licences.values())) if len(licences) == 1 else None


def _in_config(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    named = _NAMES.match(str(config.get("_name_or_path") or ""))
    if named:
        found.append((named[1], f"config.json names {named[0]}"))
    for key, value in config.items():
        if not isinstance(value, str):
            continue
        if key == "general.license" and (short := _SHORT.fullmatch(value)):
            found.append((short[1], f"general.license of the GGUF file is {value}"))
        if key.startswith("general.base_model.") and (named := _NAMES.match(value)):
            found.append((named[1], f"{key} of the GGUF file is {value}"))
    return found


def _in_card(folder: pathlib.Path) -> list[tuple[str, str]]:
    """Return what the lines between --- at the head of a README.md say."""
    head = _head(folder / "README.md").removeprefix("\ufeff")
    if not head.startswith("---"):
        return []
    found = []
    for line in head[3:].partition("\n---")[0].splitlines():
        key, _, value = line.strip().lstrip("- ").partition(":")
        key, value = (key.strip(), value.strip()) if value or ":" in line else ("", key.strip())
        value = value.strip("'\"")
        if key in ("license", "license_name") and (short := _SHORT.match(value)):
            found.append((short[1], f"README.md has the license {value}"))
        if key in ("", "base_model") and (named := _NAMES.match(value)):
            found.append((named[1], f"README.md names {value} as its base"))
    return found


def _head(path: pathlib.Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return ""
        with path.open("rb") as file:
            return file.read(_HEAD).decode("utf-8", "replace")
    except OSError:
        return ""
