"""Rows of latents: which clip of which track, its posterior sample, and the noise it goes with.

Axis letters: B batch, F frames, L latent width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.data.audio.clips import ENDLESS
from jaxherd.data.audio.latent_tracks import LatentFolder, LatentTrack
from jaxherd.data.coupling import couple


class RandomLatents:
    """Row i is a clip, its posterior sample and its noise, which the seed and i alone decide.

    A random group, then a track of it, then a moment of that.  With every clip whole, all moments
    of a group are alike: a track counts by the starts it has room for.  Where shorter clips are
    allowed that would all but leave out the tracks of one start, so that a track counts by its
    length.
    """

    def __init__(
        self,
        folder: LatentFolder,
        tracks: Sequence[LatentTrack],
        frames: int,
        seed: int,
        *,
        least: int | None = None,
        shorter: float = 0.0,
    ):
        """Sort the tracks.

        Args:
          folder, tracks: where clips come from.
          frames: of a row.
          seed: of all draws.
          least: frames of the shortest clip; shorter ones than `frames` are padded.  None has
            whole clips only.
          shorter: probability that a clip is cut to a random length.
        Raises:
          JaxherdError: a group without a track that is long enough.
        """
        self._folder, self._frames, self._seed = folder, frames, seed
        self._least, self._shorter = least, shorter
        shortest = frames if least is None else least
        groups = [
            [t for t in tracks if t.label == label and len(t) >= shortest]
            for label in sorted({t.label for t in tracks})
        ]
        if not all(groups) or not groups:
            raise JaxherdError(f"a group has no recording of at least {shortest} frames.")
        self._groups = [(group, self._odds(group)) for group in groups]

    def _odds(self, group: Sequence[LatentTrack]) -> np.ndarray:
        """Return the probability that a track or one before it is drawn."""
        lengths = np.array([len(track) for track in group], np.float64)
        weights = lengths - self._frames + 1 if self._least is None else lengths
        up_to = (weights / weights.sum()).cumsum()
        return up_to / up_to[-1]

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Any]:
        chance = np.random.default_rng((self._seed, index))
        group, up_to = self._groups[int(chance.integers(len(self._groups)))]
        # What `chance.choice(len(group), p=...)` draws, without its sums over all tracks.
        track = group[int(up_to.searchsorted(chance.random(), side="right"))]
        length = min(len(track), self._frames)
        if self._least is not None and self._shorter and chance.random() < self._shorter:
            length = int(chance.integers(self._least, length + 1))
        start = int(chance.integers(len(track) - length + 1))
        return latent_row(self._folder, track, start, length, self._frames, chance)


class EvenLatents:
    """Clips at even distances of every track, cut to whole batches.

    With `least`, a track of fewer than `frames` but at least so many frames is one clip.
    """

    def __init__(
        self,
        folder: LatentFolder,
        tracks: Sequence[LatentTrack],
        frames: int,
        most: int,
        batch: int,
        *,
        least: int | None = None,
    ):
        self._folder, self._frames = folder, frames
        places = []
        for track in tracks:
            room = len(track) - frames
            if room >= 0:
                count = min(most, 1 + room // frames)
                starts = np.linspace(0, room, count + 2)[1:-1]
                places += [(track, int(start)) for start in starts]
            elif least is not None and len(track) >= least:
                places.append((track, 0))
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
        length = min(len(track), self._frames)
        return latent_row(self._folder, track, start, length, self._frames, chance)


def latent_row(
    folder: LatentFolder,
    track: LatentTrack,
    start: int,
    length: int,
    frames: int,
    chance: np.random.Generator,
) -> dict[str, Any]:
    """Return one row: a standardised posterior sample, noise of unit variance, mask and track.

    The sample is zero after `length` frames; the noise has all `frames`, since any row's noise may
    go with any row's latents.
    """
    mean_FL, std_FL = track.read(start, length)
    noise = chance.standard_normal((2, frames, mean_FL.shape[1]), dtype=np.float32)
    latents_FL = np.zeros(noise[1].shape, np.float32)
    latents_FL[:length] = folder.standardise(mean_FL + std_FL * noise[0, :length])
    return {
        "latents": latents_FL,
        "noise": noise[1],
        "labels": np.asarray(track.label, np.int32),
        "frame_mask": (np.arange(frames) < length).astype(np.float32),
        "track": track,
    }


def coupled(batch: Mapping[str, np.ndarray], group: int) -> dict[str, np.ndarray]:
    """Return the batch with its noise assigned to the latents within runs of `group` rows.

    Under a `frame_mask` the cost of a pair counts the frames that the latents have, and what the
    noise holds after them is set to zero.
    """
    mask_BF, noise = batch.get("frame_mask"), np.array(batch["noise"])
    if group > 1:
        for start in range(0, len(noise), group):
            rows = slice(start, start + group)
            valid = None if mask_BF is None else mask_BF[rows]
            order = couple(batch["latents"][rows], batch["noise"][rows], valid).permutation_B
            noise[rows] = batch["noise"][rows][order]
    if mask_BF is not None:
        noise *= mask_BF[..., None]
    return {**batch, "noise": noise}
