"""Latents of recordings: where a stage keeps them, and clips of them paired with noise.

The folder holds `index.json` and one `.npz` a track with the posterior's mean and standard
deviation, [frames, L] each, and where a text encoder was given its states of the caption,
[tokens, D].  It is written by the stage that encodes recordings, of which this
file knows nothing.

Axis letters: B batch, F frames, L latent width.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxherd.core.batch import BatchField, BatchSpec
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.audio.clips import ENDLESS, SPLITS
from jaxherd.data.coupling import couple
from jaxherd.data.pipeline import GrainBatches, batch_rows, check_sharding

INDEX = "index.json"
# States of a text that a row holds, in training and when a model is used.
TEXT_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class LatentTrack:
    """The posterior of one recording."""

    name: str
    label: int
    mean_FL: np.ndarray
    std_FL: np.ndarray
    text_ND: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.mean_FL)


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
        """Return the tracks of a split.

        Raises:
          JaxherdError: an unknown split, or a file that is absent or damaged.
        """
        if split not in SPLITS:
            raise JaxherdError(f"There is no split {split!r}: {nearest(split, SPLITS)}")
        found = []
        for entry in self.tracks:
            if entry["split"] != split:
                continue
            file = (self.path / entry["file"]).resolve()
            if not file.is_relative_to(self.path.resolve()):
                raise JaxherdError(f"{self.path / INDEX} names a file outside of its folder.")
            try:
                with np.load(file, allow_pickle=False) as data:
                    track = LatentTrack(
                        entry["name"],
                        entry["label"],
                        data["mean"],
                        data["std"],
                        data["text"] if "text" in data.files else None,
                    )
            except (OSError, ValueError, KeyError) as error:
                raise JaxherdError(
                    f"the latents {str(file)!r} are damaged: encode the recordings again."
                ) from error
            found.append(track)
        return found

    def standardise(self, latents: np.ndarray) -> np.ndarray:
        """Return (x - mean) / (std + 1e-5).  Source: melodyflow.md 2.1."""
        return (latents - self.mean_L) / (self.std_L + 1e-5)


@dataclasses.dataclass(frozen=True)
class LatentClips:
    """Clips of standardised latents, each with its noise.

    Batch fields: "latents" and "noise" float32 [B, F, L], and "labels" int32 [B] or, with
    `text_dim`, "text_states" float32 [B, text_length, text_dim] and "text_mask" [B, text_length].

    Latents are sampled from their posterior.  Within groups of `coupling_group` rows the noise is
    assigned to the latents at the least total squared distance, exactly and on the host
    (melodyflow.md 4); the draw of the noise does not depend on the latents.

    Attributes:
      stage: the earlier stage that encoded the recordings.
      latent_dim: L, which a plan needs before the latents exist.
      frames: F.
      batch_size, eval_batch_size: B over all processes.
      coupling_group: rows among which noise is assigned, at most those of one process and dividing
        them; 1 leaves every row its own draw (independent pairing).
      text_dim, text_length: width of the text encoder's states, and how many of them a row holds
        (longer captions are cut and counted); 0 gives the group's label instead.
      max_eval_clips: of each held-out track.
      threads, prefetch: as for `batch_rows`.
    """

    stage: str = "latents"
    latent_dim: int = 128
    frames: int = 750
    batch_size: int = 64
    eval_batch_size: int | None = None
    coupling_group: int = 64
    text_dim: int = 0
    text_length: int = TEXT_LENGTH
    max_eval_clips: int = 16
    threads: int = 1
    prefetch: int = 4

    needs_artifacts = True

    def __post_init__(self):
        for name in ("latent_dim", "frames", "batch_size", "coupling_group", "max_eval_clips"):
            if getattr(self, name) < 1:
                raise JaxherdError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.batch_size % self.coupling_group:
            raise JaxherdError(
                f"coupling_group={self.coupling_group} does not divide batch_size={self.batch_size}."
            )

    def batch_spec(self, split: str = "train") -> BatchSpec:
        """Return the global shapes of a batch; does no input or output."""
        rows = self.batch_size if split == "train" else self.eval_batch_size or self.batch_size
        axes = ("batch", "length", None)
        shape = (rows, self.frames, self.latent_dim)
        fields = {
            "latents": BatchField(shape, "float32", axes),
            "noise": BatchField(shape, "float32", axes),
        }
        if not self.text_dim:
            return fields | {"labels": BatchField((rows,), "int32", ("batch",))}
        words = (rows, self.text_length)
        return fields | {
            "text_states": BatchField((*words, self.text_dim), "float32", ("batch", None, None)),
            "text_mask": BatchField(words, "float32", ("batch", None)),
        }

    def build(
        self,
        *,
        split: str,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        artifacts: Mapping[str, pathlib.Path] | None = None,
    ) -> GrainBatches:
        """Open the clips: endless for "train", one pass over whole batches for "heldout"."""
        import grain

        if artifacts is None or self.stage not in artifacts:
            raise JaxherdError(f"latent clips need the folder of the stage {self.stage!r}.")
        folder = LatentFolder.open(artifacts[self.stage])
        if len(folder.mean_L) != self.latent_dim:
            raise JaxherdError(
                f"the latents of {self.stage!r} are {len(folder.mean_L)} wide and latent_dim is "
                f"{self.latent_dim}: set it to the codec's."
            )
        size = self.batch_spec(split)["latents"].shape[0]
        local = check_sharding(size, process_index, process_count)
        group = self.coupling_group if split == "train" else 1
        if local % group:
            raise JaxherdError(
                f"coupling_group={group} does not divide the {local} rows of one process."
            )
        tracks = folder.load(split)
        place = {"process_index": process_index, "process_count": process_count}
        if split == "train":
            rows: Any = RandomLatents(folder, tracks, self.frames, seed)
            length = None
        else:
            rows = EvenLatents(folder, tracks, self.frames, self.max_eval_clips, size)
            length = len(rows) // size
        source = grain.MapDataset.source(rows).map(self._conditioned)
        dataset = batch_rows(
            source,
            batch_size=size,
            threads=self.threads,
            prefetch=self.prefetch,
            **place,
        )
        if group > 1:
            dataset = dataset.map(lambda batch: coupled(batch, group))
        settings = (
            *(_digest(folder), self.frames, split, seed, size, group),
            *(self.text_dim, self.text_length),
        )
        about: dict[str, Any] = {
            "labels": list(folder.labels),
            "tracks": len(tracks),
            "minutes": round(sum(map(len, tracks)) / folder.frame_rate / 60, 1),
            "frame_rate": folder.frame_rate,
        }
        if self.text_dim:
            lengths = [0 if t.text_ND is None else len(t.text_ND) for t in tracks]
            about["captions_cut"] = sum(length > self.text_length for length in lengths)
            if about["captions_cut"]:
                about["notes"] = [
                    f"{about['captions_cut']} of {len(tracks)} captions have more than "
                    f"{self.text_length} tokens and are cut there."
                ]
        return GrainBatches(
            dataset,
            fingerprint=hashlib.sha256(repr(settings).encode()).hexdigest()[:32],
            portable=True,
            about=about,
            length=length,
            **place,
        )

    def _conditioned(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the row with what the model is conditioned on."""
        text_ND = row.pop("text")
        if not self.text_dim:
            return row
        row.pop("labels")
        if text_ND is None or text_ND.shape[1] != self.text_dim:
            raise JaxherdError(
                f"the latents of {self.stage!r} carry no text states of width {self.text_dim}: "
                "encode them with that text encoder, or set text_dim=0."
            )
        fields = text_rows([text_ND], self.text_dim, self.text_length)
        return {**row, **{name: value[0] for name, value in fields.items()}}


def text_rows(states_ND: Sequence[np.ndarray], width: int, length: int) -> dict[str, np.ndarray]:
    """Return the batch fields of texts: their states cut or padded to `length`, and the mask.

    Args:
      states_ND: [tokens, width] of each row; no token is the null condition.
      width: of the states.
      length: tokens of a row.
    """
    text_BND = np.zeros((len(states_ND), length, width), np.float32)
    mask_BN = np.zeros((len(states_ND), length), np.float32)
    for row, states in enumerate(states_ND):
        kept = states[:length]
        text_BND[row, : len(kept)], mask_BN[row, : len(kept)] = kept, 1.0
    return {"text_states": text_BND, "text_mask": mask_BN}


def coupled(batch: Mapping[str, np.ndarray], group: int) -> dict[str, np.ndarray]:
    """Return the batch with its noise assigned to the latents within runs of `group` rows."""
    noise = np.empty_like(batch["noise"])
    for start in range(0, len(noise), group):
        rows = slice(start, start + group)
        order = couple(batch["latents"][rows], batch["noise"][rows]).permutation_B
        noise[rows] = batch["noise"][rows][order]
    return {**batch, "noise": noise}


class RandomLatents:
    """Row i is a clip, its posterior sample and its noise, which the seed and i alone decide."""

    def __init__(self, folder: LatentFolder, tracks: Sequence[LatentTrack], frames: int, seed: int):
        self._folder, self._frames, self._seed = folder, frames, seed
        self._groups = [
            [t for t in tracks if t.label == label and len(t) >= frames]
            for label in sorted({t.label for t in tracks})
        ]
        if not all(self._groups) or not self._groups:
            raise JaxherdError(f"a group has no recording of at least {frames} frames.")

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Any]:
        chance = np.random.default_rng((self._seed, index))
        group = self._groups[int(chance.integers(len(self._groups)))]
        room = np.array([len(t) - self._frames + 1 for t in group], np.float64)
        track = group[int(chance.choice(len(group), p=room / room.sum()))]
        start = int(chance.integers(len(track) - self._frames + 1))
        return latent_row(self._folder, track, start, self._frames, chance)


class EvenLatents:
    """Clips at even distances of every track, cut to whole batches."""

    def __init__(
        self,
        folder: LatentFolder,
        tracks: Sequence[LatentTrack],
        frames: int,
        most: int,
        batch: int,
    ):
        self._folder, self._frames = folder, frames
        places = []
        for track in tracks:
            room = len(track) - frames
            if room >= 0:
                count = min(most, 1 + room // frames)
                starts = np.linspace(0, room, count + 2)[1:-1]
                places += [(track, int(start)) for start in starts]
        if len(places) < batch:
            raise JaxherdError(
                f"the held-out tracks give {len(places)} clips, less than a batch of {batch}: lower "
                "eval_batch_size or raise max_eval_clips."
            )
        order = np.random.default_rng(0).permutation(len(places))
        self._places = [places[i] for i in order[: len(places) // batch * batch]]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        track, start = self._places[index]
        chance = np.random.default_rng((0, index))
        return latent_row(self._folder, track, start, self._frames, chance)


def latent_row(
    folder: LatentFolder,
    track: LatentTrack,
    start: int,
    frames: int,
    chance: np.random.Generator,
) -> dict[str, Any]:
    """Return one row: a standardised posterior sample, noise of unit variance, label and text."""
    mean_FL = track.mean_FL[start : start + frames]
    noise = chance.standard_normal((2, *mean_FL.shape), dtype=np.float32)
    sample_FL = mean_FL + track.std_FL[start : start + frames] * noise[0]
    return {
        "latents": folder.standardise(sample_FL).astype(np.float32),
        "noise": noise[1],
        "labels": np.asarray(track.label, np.int32),
        "text": track.text_ND,
    }


def _digest(folder: LatentFolder) -> str:
    """Return a hash of the index and the sizes of its files."""
    text = (folder.path / INDEX).read_bytes()
    return hashlib.sha256(text).hexdigest()
