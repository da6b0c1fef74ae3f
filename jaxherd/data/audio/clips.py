"""Random clips of recordings as batches.

Axis letters: B batch, T samples, C channels.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxherd.core.batch import BatchField, BatchSpec
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.reports import Report
from jaxherd.data.audio.tracks import (
    AudioGroup,
    Track,
    conversion_notes,
    conversions,
    open_tracks,
    split_tracks,
)
from jaxherd.data.pipeline import GrainBatches, batch_rows, check_sharding

SPLITS = ("train", "heldout")
# Rows of an endless dataset: at a million a second, nine years.
ENDLESS = 2**48


@dataclasses.dataclass(frozen=True)
class AudioClips:
    """Clips of one length from groups of recordings; needs the extra `audio`.

    Batch fields: "audio" float32 [B, T, C] in [-1, 1] and "labels" int32 [B], the group.

    A training clip comes from a random group (all groups alike), then a random moment of its
    tracks.  Held-out tracks are never trained on; a pass over them takes clips at even distances.

    Attributes:
      groups: recordings by label.
      sample_rate: Hz; recordings are resampled.
      channels: 1 or 2.
      clip_samples: T.
      batch_size, eval_batch_size: B over all processes; evaluation has the same when None.
      heldout_fraction: of the tracks of each group, at least one.
      max_eval_clips: of each held-out track.
      min_level_db: training clips quieter than this, in dB of full scale, are drawn again, at most
        eight times.
      threads, prefetch: as for `batch_rows`.
    """

    groups: tuple[AudioGroup, ...]
    sample_rate: int = 48_000
    channels: int = 2
    clip_samples: int = 48_000
    batch_size: int = 16
    eval_batch_size: int | None = None
    heldout_fraction: float = 0.15
    max_eval_clips: int = 8
    min_level_db: float = -60.0
    threads: int = 1
    prefetch: int = 4

    def __post_init__(self):
        if not self.groups:
            raise JaxherdError("audio clips need at least one group of recordings.")
        for name in ("sample_rate", "channels", "clip_samples", "batch_size", "max_eval_clips"):
            if getattr(self, name) < 1:
                raise JaxherdError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.heldout_fraction < 1:
            raise JaxherdError(f"heldout_fraction={self.heldout_fraction} must be inside (0, 1).")

    @property
    def labels(self) -> tuple[str, ...]:
        """The groups' labels, in order."""
        return tuple(group.label for group in self.groups)

    def batch_spec(self, split: str = "train") -> BatchSpec:
        """Return the global shapes of a batch; does no input or output."""
        rows = self.batch_size if split == "train" else self.eval_batch_size or self.batch_size
        shape = (rows, self.clip_samples, self.channels)
        return {
            "audio": BatchField(shape, "float32", ("batch", "length", None)),
            "labels": BatchField((rows,), "int32", ("batch",)),
        }

    def tracks(
        self,
        split: str,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        report: Report | None = None,
    ) -> list[list[Track]]:
        """Return the tracks of a split, a list a group.

        Args:
          split: "train" or "heldout".
          cache_dir: of decoded recordings.
          report: is told of packages that are fetched and recordings that are decoded.
        Raises:
          JaxherdError: an unknown split, recordings that cannot be had, or too few of them.
        """
        if split not in SPLITS:
            raise JaxherdError(f"There is no split {split!r}: {nearest(split, SPLITS)}")
        files = [group.files(cache_dir, report=report) for group in self.groups]
        opened = iter(
            open_tracks(
                [path for group in files for path in group],
                sample_rate=self.sample_rate,
                channels=self.channels,
                cache_dir=cache_dir,
                report=report,
            )
        )
        return [
            split_tracks(
                [next(opened) for _ in own],
                split=split,
                heldout_fraction=self.heldout_fraction,
                seed_name=group.label,
            )
            for group, own in zip(self.groups, files)
        ]

    def build(
        self,
        *,
        split: str,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        report: Report | None = None,
    ) -> GrainBatches:
        """Open the clips: endless for "train", one pass over whole batches for "heldout".

        `report` is told of recordings that have to be fetched and decoded first.
        """
        import grain

        size = self.batch_spec(split)["audio"].shape[0]
        check_sharding(size, process_index, process_count)
        tracks = self.tracks(split, cache_dir=cache_dir, report=report)
        place = {"process_index": process_index, "process_count": process_count}
        if split == "train":
            rows: Any = RandomClips(tracks, self.clip_samples, seed, self.min_level_db)
            length = None
        else:
            rows = EvenClips(tracks, self.clip_samples, self.max_eval_clips, size)
            length = len(rows) // size
        dataset = batch_rows(
            grain.MapDataset.source(rows),
            batch_size=size,
            threads=self.threads,
            prefetch=self.prefetch,
            **place,
        )
        every = [track for group in tracks for track in group]
        digests = [[t.digest for t in group] for group in tracks]
        about = {
            "groups": {
                group.label: {
                    "tracks": [t.name for t in own],
                    "minutes": round(sum(map(len, own)) / self.sample_rate / 60, 1),
                }
                for group, own in zip(self.groups, tracks)
            },
            "sample_rate": self.sample_rate,
            "converted": conversions(every),
            "notes": conversion_notes(every),
        }
        settings = (
            digests,
            self.sample_rate,
            self.channels,
            self.clip_samples,
            self.min_level_db,
            split,
            seed,
            size,
        )
        return GrainBatches(
            dataset,
            fingerprint=hashlib.sha256(repr(settings).encode()).hexdigest()[:32],
            portable=True,
            about=about,
            length=length,
            **place,
        )

    def preview(self, batch: Mapping[str, np.ndarray]) -> str:
        """Return loudness and label of a batch's clips, a line each."""
        lines = []
        for wave_TC, label in list(zip(batch["audio"], batch["labels"]))[:8]:
            level = 20 * np.log10(max(float(np.sqrt(np.mean(wave_TC**2))), 1e-6))
            seconds = len(wave_TC) / self.sample_rate
            lines.append(f"{seconds:.2f} s of {self.labels[label]}: {level:.1f} dB of full scale")
        return "\n".join(lines)


class RandomClips:
    """Row i is a clip that the seed and i alone decide."""

    def __init__(
        self, tracks: Sequence[Sequence[Track]], length: int, seed: int, min_level_db: float
    ):
        self._tracks, self._length, self._seed = tracks, length, seed
        self._least = 10 ** (min_level_db / 10)
        self._shares = [
            np.cumsum([max(1, len(t) - length) for t in group], dtype=np.float64)
            for group in tracks
        ]

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        chance = np.random.default_rng((self._seed, index))
        label = int(chance.integers(len(self._tracks)))
        wave_TC = self._draw(label, chance)
        for _ in range(8):
            if np.square(wave_TC).mean() >= self._least:
                break
            wave_TC = self._draw(label, chance)
        return {"audio": wave_TC, "labels": np.asarray(label, np.int32)}

    def _draw(self, label: int, chance: np.random.Generator) -> np.ndarray:
        shares = self._shares[label]
        at = chance.random() * shares[-1]
        number = int(np.searchsorted(shares, at, side="right"))
        start = int(at - (shares[number - 1] if number else 0.0))
        return self._tracks[label][number].read(start, self._length)


class EvenClips:
    """Clips at even distances of every track, cut to whole batches."""

    def __init__(self, tracks: Sequence[Sequence[Track]], length: int, most: int, batch: int):
        self._length, self._places = length, []
        for label, group in enumerate(tracks):
            for track in group:
                room = max(0, len(track) - length)
                count = min(most, 1 + room // length)
                self._places += [
                    (label, track, int(start)) for start in np.linspace(0, room, count + 2)[1:-1]
                ]
        if len(self._places) < batch:
            raise JaxherdError(
                f"the held-out tracks give {len(self._places)} clips, less than a batch of {batch}: "
                "lower eval_batch_size or raise max_eval_clips."
            )
        # In random order, so that what is cut off is shared among the groups.
        chance = np.random.default_rng(0)
        order = chance.permutation(len(self._places))[: len(self._places) // batch * batch]
        self._places = [self._places[i] for i in order]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        label, track, start = self._places[index]
        return {"audio": track.read(start, self._length), "labels": np.asarray(label, np.int32)}
