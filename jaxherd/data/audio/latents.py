"""Clips of standardised latents paired with noise, as batches.

Axis letters: B batch, F frames, L latent width.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxherd.core.batch import BatchField, BatchSpec
from jaxherd.core.errors import JaxherdError
from jaxherd.data.audio.latent_rows import EvenLatents, RandomLatents, coupled
from jaxherd.data.audio.latent_tracks import INDEX, LatentFolder, LatentTrack
from jaxherd.data.pipeline import GrainBatches, batch_rows, check_sharding

# States of a text that a row holds, in training and when a model is used.
TEXT_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class LatentClips:
    """Clips of standardised latents, each with its noise.

    Batch fields: "latents" and "noise" float32 [B, F, L], and "labels" int32 [B] or, with
    `text_dim`, "text_states" float32 [B, text_length, text_dim] and "text_mask" [B, text_length].
    With `min_frames` also "frame_mask" float32 [B, F], which is 1 for the frames that a clip has;
    after them latents and noise are zero.

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
      min_frames: recordings of fewer frames than F, but at least so many, take part as well, padded;
        None has whole clips alone.  The paper says "up to 30 s, variable duration" and no more.
      shorter_clips: probability that a training clip is cut to a random length between `min_frames`
        and what it could have.
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
    min_frames: int | None = None
    shorter_clips: float = 0.0
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
        if self.min_frames is not None and not 1 <= self.min_frames <= self.frames:
            raise JaxherdError(
                f"min_frames={self.min_frames} must lie between 1 and frames={self.frames}."
            )
        if not 0.0 <= self.shorter_clips <= 1.0:
            raise JaxherdError(f"shorter_clips={self.shorter_clips} must lie between 0 and 1.")
        if self.shorter_clips and self.min_frames is None:
            raise JaxherdError(
                f"shorter_clips={self.shorter_clips} needs min_frames, the length of the shortest."
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
        if self.min_frames is not None:
            fields["frame_mask"] = BatchField(shape[:2], "float32", axes[:2])
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
        self._check_text(tracks)
        place = {"process_index": process_index, "process_count": process_count}
        if split == "train":
            rows: Any = RandomLatents(
                folder,
                tracks,
                self.frames,
                seed,
                least=self.min_frames,
                shorter=self.shorter_clips,
            )
            length = None
        else:
            rows = EvenLatents(
                folder, tracks, self.frames, self.max_eval_clips, size, least=self.min_frames
            )
            length = len(rows) // size
        source = grain.MapDataset.source(rows).map(self._conditioned)
        dataset = batch_rows(
            source,
            batch_size=size,
            threads=self.threads,
            prefetch=self.prefetch,
            **place,
        )
        if group > 1 or self.min_frames is not None:
            dataset = dataset.map(lambda batch: coupled(batch, group))
        settings: tuple[Any, ...] = (
            *(_digest(folder), self.frames, split, seed, size, group),
            *(self.text_dim, self.text_length),
        )
        if self.min_frames is not None:
            settings += (self.min_frames, self.shorter_clips)
        return GrainBatches(
            dataset,
            fingerprint=hashlib.sha256(repr(settings).encode()).hexdigest()[:32],
            portable=True,
            about=self._about(folder, tracks),
            length=length,
            **place,
        )

    def _check_text(self, tracks: Sequence[LatentTrack]) -> None:
        if self.text_dim and any(track.text_dim != self.text_dim for track in tracks):
            raise JaxherdError(
                f"the latents of {self.stage!r} carry no text states of width {self.text_dim}: "
                "encode them with that text encoder, or set text_dim=0."
            )

    def _about(self, folder: LatentFolder, tracks: Sequence[LatentTrack]) -> dict[str, Any]:
        """Return what a log should say, with notes about what is left out, empty or cut."""
        least = self.frames if self.min_frames is None else self.min_frames
        about: dict[str, Any] = {
            "labels": list(folder.labels),
            "tracks": len(tracks),
            "minutes": round(sum(map(len, tracks)) / folder.frame_rate / 60, 1),
            "frame_rate": folder.frame_rate,
            "too_short": sum(len(track) < least for track in tracks),
            "padded": sum(least <= len(track) < self.frames for track in tracks),
        }
        notes = []
        if about["too_short"]:
            notes.append(
                f"{about['too_short']} of {len(tracks)} recordings have fewer than {least} frames "
                "and take no part: min_frames says how short they may be."
            )
        if self.text_dim:
            lengths = [track.tokens or 0 for track in tracks]
            about["captions_empty"] = lengths.count(0)
            if about["captions_empty"]:
                notes.append(
                    f"{about['captions_empty']} of {len(tracks)} captions are empty: these "
                    "recordings are trained on without a condition."
                )
            about["captions_cut"] = sum(length > self.text_length for length in lengths)
            if about["captions_cut"]:
                notes.append(
                    f"{about['captions_cut']} of {len(tracks)} captions have more than "
                    f"{self.text_length} tokens and are cut there."
                )
        return about | ({"notes": notes} if notes else {})

    def _conditioned(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the row with what the model is conditioned on."""
        track = row.pop("track")
        if self.min_frames is None:
            row.pop("frame_mask")
        if not self.text_dim:
            return row
        row.pop("labels")
        fields = text_rows([track.text(self.text_length)], self.text_dim, self.text_length)
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


def _digest(folder: LatentFolder) -> str:
    """Return a hash of the index and the sizes of its files."""
    text = (folder.path / INDEX).read_bytes()
    return hashlib.sha256(text).hexdigest()
