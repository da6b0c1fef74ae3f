"""Recordings decoded once: 16-bit samples at one rate in the cache, mapped into memory.

Decoding Vorbis costs more than a small training step; a random clip of a mapped track costs a copy.

Axis letters: T samples, C channels.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError
from jaxherd.core.reports import Report
from jaxherd.data.audio.files import AudioInfo, audio_blocks, audio_info
from jaxherd.data.cache import cache_root, locked
from jaxherd.data.sources import resolve

_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


@dataclasses.dataclass(frozen=True)
class AudioGroup:
    """Recordings of one kind.

    Attributes:
      label: what they are, in words.
      sources: files or folders, as `resolve` takes them; folders are searched for audio files.
      pattern: of file names in folders.
    """

    label: str
    sources: tuple[str, ...]
    pattern: str = "*"

    def files(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        report: Report | None = None,
    ) -> list[pathlib.Path]:
        """Return the files, sorted by name; `report` is told of packages that are fetched.

        Raises:
          JaxherdError: a source that cannot be had, or no audio file at all.
        """
        found: list[pathlib.Path] = []
        for source in self.sources:
            path = resolve(source, cache_dir=cache_dir, report=report)
            inside = [path] if path.is_file() else sorted(path.rglob(self.pattern))
            found += [f for f in inside if f.is_file() and f.suffix.lower() in _SUFFIXES]
        if not found:
            raise JaxherdError(f"group {self.label!r}: no audio file matches in {self.sources}.")
        return found


class Track:
    """One decoded recording.

    Attributes:
      name, digest: its folder and file, and a hash of the file.
      caption: the text of a file beside it (same name, .txt), which may be empty; None without one.
      source, sample_rate, channels: what its file holds, and what was made of it.
    """

    def __init__(
        self,
        name: str,
        path: pathlib.Path,
        digest: str,
        caption: str | None,
        source: AudioInfo,
        sample_rate: int,
    ):
        self.name, self.digest, self.caption = name, digest, caption
        self.source, self.sample_rate = source, sample_rate
        # Mapped anew by each read: a map keeps its file open, and there may be more recordings than
        # a process may open files.
        self._path, (self._length, self._channels) = path, np.load(path, mmap_mode="r").shape

    @property
    def channels(self) -> int:
        """Audio channels."""
        return self._channels

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, length: int) -> Float[np.ndarray, "T C"]:
        """Return samples [start, start + length) in [-1, 1], padded with silence past the end."""
        samples = np.load(self._path, mmap_mode="r")
        piece = np.asarray(samples[start : start + length], np.float32) / 32767.0
        return np.pad(piece, ((0, length - len(piece)), (0, 0)))


def open_track(
    path: pathlib.Path,
    *,
    sample_rate: int,
    channels: int,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Track:
    """Return a recording at this rate and number of channels, decoding it on first use.

    Raises:
      JaxherdError: a recording that cannot be decoded, or a caption that is not UTF-8.
    """
    caption = _caption(path.with_suffix(".txt"))
    digest, target = _place(path, sample_rate, channels, cache_dir)
    if not target.is_file():
        with locked(target):
            if not target.is_file():
                partial = target.with_suffix(".partial")
                try:
                    _decode(path, partial, sample_rate, channels)
                    partial.replace(target)
                finally:
                    partial.unlink(missing_ok=True)
    name = f"{path.parent.name}/{path.stem}"
    return Track(name, target, digest, caption, audio_info(path), sample_rate)


def open_tracks(
    paths: Sequence[pathlib.Path],
    *,
    sample_rate: int,
    channels: int,
    cache_dir: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> list[Track]:
    """Return recordings as `open_track` does; `report` is told how many are decoded.

    Nothing is told where all of them were decoded earlier.
    """
    form = {"sample_rate": sample_rate, "channels": channels, "cache_dir": cache_dir}
    what, told, found = "decoding recordings", False, []
    for number, path in enumerate(paths):
        if report is not None and not _place(path, **form)[1].is_file():
            if not told:
                report(what, 0, len(paths))
            if number:
                report(what, number, len(paths))
            told = True
        found.append(open_track(path, **form))
    if report is not None and told:
        report(what, len(paths), len(paths))
    return found


def _place(
    path: pathlib.Path,
    sample_rate: int,
    channels: int,
    cache_dir: str | os.PathLike[str] | None,
) -> tuple[str, pathlib.Path]:
    """Return a file's digest, and where its decoded samples are or will be."""
    digest = _digest(path, path.stat().st_size, path.stat().st_mtime_ns)
    folder = cache_root(cache_dir) / "audio"
    return digest, folder / f"{digest[:24]}-{sample_rate}-{channels}.npy"


def _caption(path: pathlib.Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise JaxherdError(
            f"the caption {str(path)!r} is not UTF-8 (byte {error.start}): save it as UTF-8."
        ) from error


def conversions(tracks: Sequence[Track]) -> dict[str, int]:
    """Return how many recordings came at another rate and with other channels than they have now."""
    return {
        "resampled": sum(t.source.sample_rate != t.sample_rate for t in tracks),
        "other_channels": sum(t.source.channels != t.channels for t in tracks),
    }


def conversion_notes(tracks: Sequence[Track]) -> list[str]:
    """Return a sentence about each kind of conversion that some of the recordings went through.

    And about those whose headers do not say how long they are.
    """
    counts, total = conversions(tracks), len(tracks)
    rates = sorted({t.source.sample_rate for t in tracks if t.source.sample_rate != t.sample_rate})
    widths = sorted({t.source.channels for t in tracks if t.source.channels != t.channels})
    notes = []
    if counts["resampled"]:
        notes.append(
            f"{counts['resampled']} of {total} recordings are at {', '.join(map(str, rates))} Hz, "
            f"resampled to {tracks[0].sample_rate} Hz."
        )
    if counts["other_channels"]:
        notes.append(
            f"{counts['other_channels']} of {total} recordings have "
            f"{', '.join(map(str, widths))} channel(s), made {tracks[0].channels}."
        )
    streamed = sum(t.source.streamed for t in tracks)
    if streamed:
        notes.append(
            f"{streamed} of {total} recordings do not say in their headers how long they are: they "
            "are read to their ends, and whether they were cut off cannot be told."
        )
    return notes


def _decode(path: pathlib.Path, target: pathlib.Path, sample_rate: int, channels: int) -> None:
    """Write the samples piece by piece: a recording of hours needs no more memory than one of minutes."""
    info = audio_info(path)
    most = -(-info.frames * sample_rate // info.sample_rate)
    done = 0
    with target.open("w+b") as file:

        def header(length: int) -> None:
            file.seek(0)
            entries = {"descr": "<i2", "fortran_order": False, "shape": (length, channels)}
            np.lib.format.write_array_header_1_0(file, entries)

        header(most)
        for wave_TC in audio_blocks(path, sample_rate=sample_rate, channels=channels):
            file.write(np.round(np.clip(wave_TC, -1, 1) * 32767).astype("<i2").tobytes())
            done += len(wave_TC)
        if done != most:  # a compressed file may hold a little less or more than it claims
            header(done)


@functools.lru_cache(maxsize=4096)
def _digest(path: pathlib.Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_tracks(
    tracks: list[Track], *, split: str, heldout_fraction: float, seed_name: str
) -> list[Track]:
    """Return the tracks of "train" or "heldout"; whole tracks are held out, at least one.

    Which ones follows from their contents alone, so that adding a track moves no other.
    """
    order = sorted(
        tracks, key=lambda t: hashlib.sha256(f"{seed_name}/{t.digest}".encode()).hexdigest()
    )
    held = max(1, round(len(order) * heldout_fraction))
    if held >= len(order):
        raise JaxherdError(
            f"{len(order)} track(s) leave none to train on with heldout_fraction="
            f"{heldout_fraction}: give more recordings or a smaller fraction."
        )
    chosen = order[:held] if split == "heldout" else order[held:]
    return sorted(chosen, key=lambda t: t.name)
