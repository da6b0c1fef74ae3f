"""Which tags a recording has, by a trained network: rows for a Frechet distance, posteriors for a KLD.

    wave [T, C] -> log mel bands, in pieces of 187 frames -> 200 features -> 50 tags

The networks are musicnn's (Pons and Serra, arXiv 1909.06654), trained on MagnaTagATune or the Million
Song Dataset.  Graph and weights come as data with the wheel of that package, of which nothing is
installed or run (it asks for a NumPy that no supported Python has); TensorFlow evaluates the graph.
Published scores of music have other taggers (PaSST): figures of this one compare with each other alone.

Axis letters: T samples, C audio channels, K pieces, J frames, M bands, F features, L tags, N clips.
Source: melodyflow.md 7 and 8.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError, missing_extra
from jaxherd.data.audio.files import resample
from jaxherd.data.sources import resolve
from jaxherd.layers.spectral import StftConfig, mel_filterbank
from jaxherd.methods.music_metrics import posterior_divergence

NETWORK = "pypi://musicnn==0.1.0/musicnn/MTT_musicnn"
# What the networks were trained on: mono, in pieces of three seconds.
RATE, BANDS, FRAMES = 16_000, 96, 187
_STFT = StftConfig(512, 256)

# Names in the published graph; the last dense layer's input is the penultimate one's output.
_INPUT, _TRAINING, _TAGS = "model/Placeholder", "model/Placeholder_2", "model/Sigmoid"
_FEATURES = "model/dropout_1/cond/Merge"


@dataclasses.dataclass(frozen=True)
class MusicTagger:
    """One row for every three seconds, without overlap; what is left at the end is dropped.

    Attributes:
      head: "features" (200, before the last layer) or "tags" (50 probabilities, each tag by itself).
      source: folder of the network; `MSD_musicnn` beside it has the other data set's tags.
    """

    head: Literal["features", "tags"] = "features"
    source: str = NETWORK

    def __call__(
        self, wave_TC: Float[np.ndarray, "T C"], sample_rate: int
    ) -> Float[np.ndarray, "K F"]:
        """Return [max(1, frames // 187), 200 or 50]; shorter recordings are repeated.

        Raises:
          JaxherdError: no TensorFlow, a network that cannot be had or is another, no sample, or
            values that are no numbers.
        """
        run = _network(self.source)
        if not len(wave_TC) or not np.isfinite(wave_TC).all():
            raise JaxherdError("an embedding needs some samples, all of them finite numbers.")
        pieces = self.pieces(wave_TC, sample_rate)
        # One at a time: a long recording needs no more memory.
        return np.concatenate([run(self.head, piece[None]) for piece in pieces])

    @staticmethod
    def pieces(
        wave_TC: Float[np.ndarray, "T C"], sample_rate: int
    ) -> Float[np.ndarray, "K 187 96"]:
        """Return log10(1 + 10000 energy in mel bands) of every piece.

        In float32: the package's float16 overflows where a band's energy is above 6.5, as it is at a
        fifth of full scale.
        """
        mono_T = np.asarray(wave_TC, np.float32).mean(axis=1)
        if sample_rate != RATE:
            mono_T = resample(mono_T[:, None], sample_rate, RATE)[:, 0]
        padded = np.pad(mono_T, _STFT.n_fft // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, _STFT.n_fft)[:: _STFT.hop]
        power = np.square(np.abs(np.fft.rfft(frames * _STFT.window(), axis=1)))
        bands_JM = power @ mel_filterbank(BANDS, _STFT.n_fft, RATE, scale="slaney", norm="slaney")
        bands_JM = np.log10(1 + 10_000 * bands_JM).astype(np.float32)
        if len(bands_JM) < FRAMES:
            bands_JM = np.resize(bands_JM, (FRAMES, BANDS))  # repeats whole frames
        count = len(bands_JM) // FRAMES
        return bands_JM[: count * FRAMES].reshape(count, FRAMES, BANDS)


def tag_posteriors(
    clips: Sequence[Float[np.ndarray, "T C"]], sample_rate: int, source: str = NETWORK
) -> Float[np.ndarray, "N L"]:
    """Return every clip's probabilities, the mean over its pieces.

    Raises:
      JaxherdError: as `MusicTagger` does, or no clip.
    """
    if not clips:
        raise JaxherdError("there are no clips to tag.")
    tagger = MusicTagger("tags", source)
    return np.stack([tagger(clip, sample_rate).mean(axis=0) for clip in clips])


def tag_divergence(
    reference: Sequence[Float[np.ndarray, "T C"]],
    made: Sequence[Float[np.ndarray, "T C"]],
    sample_rate: int,
    source: str = NETWORK,
) -> float:
    """Return the KLD of tags: of clips against what was made for their captions, pair by pair.

    Raises:
      JaxherdError: as `tag_posteriors` and `posterior_divergence` do.
    """
    found = (tag_posteriors(clips, sample_rate, source) for clips in (reference, made))
    return posterior_divergence(*found, classes="many")


@functools.lru_cache(maxsize=2)
def _network(source: str) -> Callable[[str, np.ndarray], np.ndarray]:
    """Return (head, pieces) -> rows, the network opened once a process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it greets at every import
    try:
        import tensorflow
        from tensorflow.core.protobuf import meta_graph_pb2
    except ImportError as error:
        raise missing_extra("tensorflow", "music-tags", "Tagging music") from error
    folder = pathlib.Path(resolve(source))
    tf: Any = tensorflow.compat.v1
    meta = meta_graph_pb2.MetaGraphDef()
    try:
        meta.ParseFromString((folder / ".meta").read_bytes())
        # Without what only training needs, some of whose shapes TensorFlow refuses today.
        heads = {"features": _FEATURES, "tags": _TAGS}
        restore = meta.saver_def.restore_op_name
        part = tf.graph_util.extract_sub_graph(meta.graph_def, [*heads.values(), restore])
        graph = tf.Graph()
        with graph.as_default():
            tf.import_graph_def(part, name="")
        # On the CPU: an accelerator's memory is JAX's.
        session = tf.Session(graph=graph, config=tf.ConfigProto(device_count={"GPU": 0}))
        session.run(restore, {meta.saver_def.filename_tensor_name: f"{folder}/"})
    except Exception as error:  # protobuf's, TensorFlow's and the system's have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
        raise JaxherdError(f"{source!r} is no musicnn network ({reason}).") from error

    def run(head: str, pieces: np.ndarray) -> np.ndarray:
        feed = {f"{_INPUT}:0": pieces, f"{_TRAINING}:0": False}
        return session.run(f"{heads[head]}:0", feed)

    return run
