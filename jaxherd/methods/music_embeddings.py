"""What recordings are compared by: rows of features a clip, by band energies or by a trained network.

    wave [T, C] -> rows [K, F]        -> Frechet distance of two sets of clips
                -> notes [K, 88]      -> how much of what was played an edit has kept

The networks here are basic-pitch's (Bittner et al., ICASSP 2022): a harmonic stack of constant-Q
bins and convolutions that say which pitches sound.  Their trained weights come as data with the
wheel of that package, of which nothing is installed or run; `onnxruntime` evaluates them.  A network
that knows genres, instruments and moods is in `music_tagger`, one that hears pitch in `music_pitch`.

Axis letters: T samples, C audio channels, W windows, K frames or rows, F features.
Source: melodyflow.md 7 and 8.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError, missing_extra, nearest
from jaxherd.data.audio.files import resample
from jaxherd.data.sources import resolve
from jaxherd.methods.music_metrics import frechet_of, log_mel_embedding
from jaxherd.methods.music_pitch import Crepe
from jaxherd.methods.music_tagger import MusicTagger

NETWORK = "pypi://basic-pitch==0.4.0/basic_pitch/saved_models/icassp_2022/nmp.onnx"
# What the network was trained on: mono, in windows of two seconds less one hop.
RATE, HOP, WINDOW = 22_050, 256, 43_844
# Frames of a window, and those at either edge that see too little of the sound.
FRAMES, MARGIN = 172, 15

_HEADS = {
    "note": "StatefulPartitionedCall:1",
    "onset": "StatefulPartitionedCall:2",
    "contour": "StatefulPartitionedCall:0",
}


# (wave [T, C], Hz) to rows [K, F]: one or many, F the same for every recording.
Embedding = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LogMelStatistics:
    """One row a clip: mean and deviation over time of log energies in bands; no network."""

    bands: int = 12

    def __call__(
        self, wave_TC: Float[np.ndarray, "T C"], sample_rate: int
    ) -> Float[np.ndarray, "1 F"]:
        """Return [1, 2 bands]."""
        return log_mel_embedding(wave_TC, sample_rate, self.bands)[None]


@dataclasses.dataclass(frozen=True)
class BasicPitch:
    """One row a frame of 256 / 22050 s: the posteriorgram of a head of basic-pitch.

    Windows overlap so that no kept frame lies at an edge, and frames are evenly spaced; the
    package's own windows are 188 samples closer, so that its frames drift against time.

    Attributes:
      head: "note" (88 piano keys that sound), "onset" (88 that begin) or "contour" (264, three a
        semitone).
      source: of the network's file.
    """

    head: Literal["note", "onset", "contour"] = "note"
    source: str = NETWORK

    def __call__(
        self, wave_TC: Float[np.ndarray, "T C"], sample_rate: int
    ) -> Float[np.ndarray, "K F"]:
        """Return probabilities, [max(1, samples at 22,050 Hz // 256), 88 or 264].

        Raises:
          JaxherdError: no `onnxruntime`, weights that cannot be had, no sample, or values that are
            no numbers.
        """
        session = _session(self.source)
        if not len(wave_TC) or not np.isfinite(wave_TC).all():
            raise JaxherdError("an embedding needs some samples, all of them finite numbers.")
        windows, frames = self.windows(wave_TC, sample_rate)
        rows = []
        for window in windows:  # one at a time: a long recording needs no more memory
            (found,) = session.run([_HEADS[self.head]], {session.get_inputs()[0].name: window})
            rows.append(found[0, MARGIN : FRAMES - MARGIN])
        return np.concatenate(rows)[:frames]

    @staticmethod
    def windows(
        wave_TC: Float[np.ndarray, "T C"], sample_rate: int
    ) -> tuple[list[Float[np.ndarray, "1 W 1"]], int]:
        """Return (what the network is fed, the number of frames to keep)."""
        mono_T = np.asarray(wave_TC, np.float32).mean(axis=1)
        if sample_rate != RATE:
            mono_T = resample(mono_T[:, None], sample_rate, RATE)[:, 0]
        frames = max(1, len(mono_T) // HOP)
        kept = FRAMES - 2 * MARGIN
        count = -(-frames // kept)
        whole = np.zeros(MARGIN * HOP + count * kept * HOP + WINDOW, np.float32)
        whole[MARGIN * HOP : MARGIN * HOP + len(mono_T)] = mono_T
        starts = (number * kept * HOP for number in range(count))
        return [whole[None, s : s + WINDOW, None] for s in starts], frames


EMBEDDINGS: Mapping[str, Embedding] = {
    "log-mel": LogMelStatistics(),
    "notes": BasicPitch("note"),
    "onsets": BasicPitch("onset"),
    "contours": BasicPitch("contour"),
    "pitch": Crepe(),
    "tagger": MusicTagger(),
}


def embedding(name: str) -> Embedding:
    """Return an embedding of `EMBEDDINGS`.

    Raises:
      JaxherdError: no such one.
    """
    if name not in EMBEDDINGS:
        raise JaxherdError(f"no embedding {name!r}; " + nearest(name, EMBEDDINGS))
    return EMBEDDINGS[name]


def embed_all(
    clips: Sequence[Float[np.ndarray, "T C"]], sample_rate: int, embed: Embedding
) -> Float[np.ndarray, "K F"]:
    """Return the rows of all clips, one clip after the other."""
    return np.concatenate([embed(clip, sample_rate) for clip in clips])


def frechet_of_clips(
    a: Sequence[Float[np.ndarray, "T C"]],
    b: Sequence[Float[np.ndarray, "T C"]],
    sample_rate: int,
    embed: Embedding,
) -> float:
    """Return the Frechet distance of two sets of clips under an embedding.

    Raises:
      JaxherdError: as `frechet_of` and the embedding do.
    """
    return frechet_of(*(embed_all(clips, sample_rate, embed) for clips in (a, b)))


def note_correlation(
    a_TC: Float[np.ndarray, "T C"], b_TC: Float[np.ndarray, "S C"], *, sample_rate: int
) -> float:
    """Return the correlation of two recordings' note posteriorgrams over all frames and keys.

    Raises:
      JaxherdError: recordings of different lengths, or as `BasicPitch` does.
    """
    a, b = _notes(a_TC, b_TC, sample_rate)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-20))


def note_f_measure(
    a_TC: Float[np.ndarray, "T C"],
    b_TC: Float[np.ndarray, "S C"],
    *,
    sample_rate: int,
    threshold: float = 0.3,
) -> float:
    """Return 2 |A and B| / (|A| + |B|) of the frames and keys that sound; 1 where none does.

    Args:
      a_TC, b_TC: the source and what became of it.
      sample_rate: of both.
      threshold: a key sounds above this probability; the package's default.
    Raises:
      JaxherdError: recordings of different lengths, or as `BasicPitch` does.
    """
    a, b = (notes > threshold for notes in _notes(a_TC, b_TC, sample_rate))
    sounding = int(a.sum() + b.sum())
    return 1.0 if not sounding else float(2 * (a & b).sum() / sounding)


def _notes(a_TC, b_TC, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    if len(a_TC) != len(b_TC):
        raise JaxherdError(
            f"notes are compared frame by frame; {len(a_TC)} and {len(b_TC)} samples are not as "
            "long as each other: cut one of them."
        )
    embed = BasicPitch("note")
    first, second = (embed(wave, sample_rate) for wave in (a_TC, b_TC))
    return first, second


@functools.lru_cache(maxsize=2)
def _session(source: str) -> Any:
    """Return the network, opened once a process."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("onnxruntime", "music-metrics", "Comparing notes") from error
    path = resolve(source)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of initialisers that it does not need
    try:
        session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its errors have no common base class but Exception
        reason = str(error).strip().splitlines()[0][:160].rstrip(".")
        raise JaxherdError(f"{source!r} is no network that can be opened ({reason}).") from error
    shape = session.get_inputs()[0].shape
    if list(shape[1:]) != [WINDOW, 1] or not set(_HEADS.values()) <= {
        output.name for output in session.get_outputs()
    }:
        raise JaxherdError(f"{source!r} takes {shape}: it is not basic-pitch's note network.")
    return session
