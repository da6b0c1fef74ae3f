"""Latents of recordings on disk: the folder that an encoding stage leaves, read a clip at a time.

The folder holds `index.json`, one `.npy` a track with the posterior's mean and standard deviation,
[frames, 2, L] in float32 or float16, and one `.npy` a text with a text encoder's states of it,
[tokens, D], which tracks of one text share.  A clip is copied out of its track's file, mapped into
memory for that moment: 16,000 hours of 128 latents at 25 Hz are 1.5 TB in float32.  Nothing stays
open, since there may be more tracks than a process may open files.

Folders of before held one `.npz` a track, with its text; they are read whole, as they were.

Axis letters: F frames, L latent width, N tokens, D width of a text's states.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.audio.clips import SPLITS

INDEX = "index.json"
DTYPES = ("float32", "float16")
# What NumPy and zipfile raise for files that are cut off, empty or something else.
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class LatentTrack:
    """The posterior of one recording, in a file.

    Attributes:
      name, label: of the recording, and the number of its group.
      tokens, text_dim: N and D of its text's states; None and 0 without any.
    """

    def __init__(
        self, name: str, label: int, file: pathlib.Path, text_file: pathlib.Path | None = None
    ):
        """Look at the files' headers and sizes.

        Raises:
          JaxherdError: a file is absent, cut off or holds something else.
        """
        self.name, self.label = name, label
        self._file, self._text_file = file, text_file
        self._frames, two, self._width = _mapped(file, 3).shape
        if two != 2:
            raise damaged(file)
        self.tokens: int | None = None
        self.text_dim = 0
        if text_file is not None:
            self.tokens, self.text_dim = _mapped(text_file, 2).shape

    def __len__(self) -> int:
        return self._frames

    def read(
        self, start: int, length: int
    ) -> tuple[Float[np.ndarray, "F L"], Float[np.ndarray, "F L"]]:
        """Return mean and standard deviation of frames [start, start + length), in float32."""
        piece_F2L = np.array(_mapped(self._file, 3)[start : start + length], np.float32)
        return piece_F2L[:, 0], piece_F2L[:, 1]

    def text(self, most: int | None = None) -> Float[np.ndarray, "N D"] | None:
        """Return the first `most` states of the track's text; None where none were kept."""
        if self._text_file is None:
            return None
        return np.array(_mapped(self._text_file, 2)[:most], np.float32)


class ArchivedTrack(LatentTrack):
    """A track of the older form, held in memory: a `.npz` of mean, std and maybe text."""

    def __init__(self, name: str, label: int, file: pathlib.Path):
        self.name, self.label = name, label
        try:
            with np.load(file, allow_pickle=False) as data:
                self._mean_FL, self._std_FL = data["mean"], data["std"]
                self._text_ND = data["text"] if "text" in data.files else None
        except _UNREADABLE as error:
            raise damaged(file) from error
        if self._mean_FL.ndim != 2 or self._mean_FL.shape != self._std_FL.shape:
            raise damaged(file)
        self.tokens, self.text_dim = (None, 0) if self._text_ND is None else self._text_ND.shape

    def __len__(self) -> int:
        return len(self._mean_FL)

    def read(
        self, start: int, length: int
    ) -> tuple[Float[np.ndarray, "F L"], Float[np.ndarray, "F L"]]:
        """Return mean and standard deviation of frames [start, start + length)."""
        rows = slice(start, start + length)
        return self._mean_FL[rows], self._std_FL[rows]

    def text(self, most: int | None = None) -> Float[np.ndarray, "N D"] | None:
        """Return the first `most` states of the track's text; None where none were kept."""
        return None if self._text_ND is None else self._text_ND[:most]


@dataclasses.dataclass(frozen=True)
class LatentFolder:
    """What the folder of an encoding stage says.

    Attributes:
      path: of the folder.
      frame_rate: frames a second; sample_rate: Hz of the recordings.
      labels: names of the groups.
      mean_L, std_L: the statistics by which latents are standardised.
      tracks: file, split, label and name of each recording.
    """

    path: pathlib.Path
    frame_rate: float
    sample_rate: int
    labels: tuple[str, ...]
    mean_L: np.ndarray
    std_L: np.ndarray
    tracks: tuple[Mapping[str, Any], ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "LatentFolder":
        """Read the index.

        Raises:
          JaxherdError: there is none, or it is damaged.
        """
        path = pathlib.Path(path)
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            return cls(
                path,
                float(index["frame_rate"]),
                int(index["sample_rate"]),
                tuple(index["labels"]),
                np.asarray(index["mean"], np.float32),
                np.asarray(index["std"], np.float32),
                tuple(index["tracks"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JaxherdError(
                f"{str(path)!r} holds no latents ({type(error).__name__}: {error}): run the stage "
                "that encodes the recordings."
            ) from error

    def load(self, split: str) -> list[LatentTrack]:
        """Return the tracks of a split; of each file, header and size are looked at.

        Raises:
          JaxherdError: an unknown split, or a file that is absent, damaged or of another width.
        """
        if split not in SPLITS:
            raise JaxherdError(f"There is no split {split!r}: {nearest(split, SPLITS)}")
        root = self.path.resolve()
        found = []
        for entry in self.tracks:
            try:
                if entry["split"] != split:
                    continue
                name, label = str(entry["name"]), int(entry["label"])
                file, text = root / entry["file"], entry.get("text")
                text_file = None if text is None else root / text
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise JaxherdError(
                    f"{str(self.path / INDEX)!r} is damaged: run the stage that encodes the "
                    "recordings again."
                ) from error
            for named in (file, text_file):
                if named is not None and not named.resolve().is_relative_to(root):
                    raise JaxherdError(f"{self.path / INDEX} names a file outside of its folder.")
            if file.suffix == ".npz":
                found.append(ArchivedTrack(name, label, file))
            else:
                found.append(LatentTrack(name, label, file, text_file))
        return found

    def standardise(self, latents: np.ndarray) -> np.ndarray:
        """Return (x - mean) / (std + 1e-5).  Source: melodyflow.md 2.1."""
        return (latents - self.mean_L) / (self.std_L + 1e-5)


def write_track(
    file: pathlib.Path,
    mean_FL: Float[np.ndarray, "F L"],
    std_FL: Float[np.ndarray, "F L"],
    *,
    dtype: str = "float32",
    writer: int = 0,
) -> None:
    """Write a track; whoever looks sees nothing or the whole file.

    Args:
      file: an `.npy` file.
      mean_FL, std_FL: of the posterior.
      dtype: "float16" halves the size and rounds every value by at most 2^-11 of itself.
      writer: number of this process; two that write the same file do not meet.
    Raises:
      JaxherdError: values that are no numbers, or that float16 does not hold: means above 65,504,
        deviations below 2^-14, under which they would lose digits.
    """
    both_F2L = np.stack([mean_FL, std_FL], axis=1)
    if not np.isfinite(both_F2L).all():
        raise JaxherdError(
            f"the latents for {str(file)!r} hold values that are no numbers: the codec that made "
            "them is broken."
        )
    limits = np.finfo(np.float16)
    if dtype == "float16" and (
        np.abs(both_F2L).max(initial=0) > limits.max
        or np.min(std_FL, initial=1) < limits.smallest_normal
    ):
        raise JaxherdError(
            f"the latents for {str(file)!r} do not fit float16 (largest value "
            f"{np.abs(both_F2L).max():.3g}, smallest deviation {np.min(std_FL):.3g}): keep them "
            "with storage='float32'."
        )
    _write(file, both_F2L.astype(dtype), writer)


def write_text(file: pathlib.Path, states_ND: Float[np.ndarray, "N D"], *, writer: int = 0) -> None:
    """Write the states of a text, in float32, in the same manner."""
    _write(file, np.asarray(states_ND, np.float32), writer)


def is_whole(file: pathlib.Path) -> bool:
    """Return whether an array was written to its end: what a kill or a full disk left does not count."""
    try:
        _mapped(file, None)
    except JaxherdError:
        return False
    return True


def _write(file: pathlib.Path, array: np.ndarray, writer: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{writer}.partial")
    with partial.open("wb") as out:
        np.save(out, array, allow_pickle=False)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def _mapped(file: pathlib.Path, ndim: int | None) -> np.memmap:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        raise damaged(file) from error
    whole = isinstance(array, np.memmap) and file.stat().st_size == array.offset + array.nbytes
    if not whole or (ndim is not None and array.ndim != ndim):
        raise damaged(file)
    return array


def damaged(file: pathlib.Path) -> JaxherdError:
    """Return the error for a file that is not what the index says."""
    return JaxherdError(
        f"the latents {str(file)!r} are damaged: delete that file and the stage's done.json, and "
        "encode the recordings again."
    )
