"""A stage that encodes recordings with a trained codec, for models of its latents.

Axis letters: F frames, L latent width.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.experiment import StageContext, write_json
from jaxherd.core.modules import abstract, split
from jaxherd.core.reports import Report
from jaxherd.data.audio.clips import SPLITS, AudioClips
from jaxherd.data.audio.latent_tracks import (
    DTYPES,
    INDEX,
    LatentTrack,
    is_whole,
    write_text,
    write_track,
)
from jaxherd.data.audio.tracks import Track, conversion_notes
from jaxherd.models.seanet import AudioAutoencoder
from jaxherd.models.seanet_streaming import encode_chunks
from jaxherd.training.progress import Counts
from jaxherd.training.replica import load_replica
from jaxherd.weights.load import load, load_tokenizer


@dataclasses.dataclass(frozen=True)
class EncodeRecordings:
    """Encode every recording of an audio data config, whole, without seams.

    Each finished track is kept, so that a run that was stopped goes on with the next one; a file
    that was cut off is written again.  The statistics by which latents are standardised are those
    that codec training has tracked, or, with `statistics="measured"`, those of the training tracks'
    posteriors.

    Attributes:
      name, codec: this stage, and the stage that trained the codec.
      model: config of the module that the codec's stage trained, with an `autoencoder`.
      data: whose recordings.
      text_encoder: source of a T5 encoder with its tokenizer; its states of each recording's
        caption are kept beside the latents, of its group's label where no caption is given; an
        empty caption is no condition.  None keeps no text.
      frames_per_chunk: latent frames encoded at a time.
      storage: "float16" keeps latents in half of the space; mean and deviation are then rounded by
        at most 2^-11 of themselves, and recordings whose values do not fit are refused.
    """

    name: str
    model: Any
    data: AudioClips
    codec: str = "codec"
    statistics: str = "measured"
    text_encoder: str | None = None
    frames_per_chunk: int = 250
    storage: str = "float32"

    writes: ClassVar[str] = "a .npy of latents for each recording, index.json with their statistics"

    def __post_init__(self):
        if self.storage not in DTYPES:
            raise JaxherdError(f"storage={self.storage!r}: " + nearest(self.storage, DTYPES))
        if self.statistics not in ("measured", "tracked"):
            raise JaxherdError(f"statistics={self.statistics!r} must be 'measured' or 'tracked'.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The codec's stage."""
        return (self.codec,)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        """Encode what is not encoded yet and write the index; returns the statistics."""
        autoencoder = load_autoencoder(self.model, context.artifacts[self.codec])
        describe = None if self.text_encoder is None else TextEncoder(self.text_encoder)
        # Each process encodes its share into the folder that all of them see.
        own, processes = jax.process_index(), jax.process_count()
        with Counts(self.name, quiet=context.quiet or own != 0) as report:
            recordings = list(self._recordings(report))
        if own == 0:
            for note in conversion_notes([track for *_, track in recordings]):
                context.say(f"{self.name}: {note}")
            if self.storage != "float32":
                context.say(f"{self.name}: latents are rounded to {self.storage}.")
        for number, (_, group, _, track) in enumerate(recordings):
            if number % processes != own:
                continue
            # First the text: a track is finished when its latents are there.
            text_file = self._text_file(context.folder, group, track)
            if describe is not None and text_file is not None and not is_whole(text_file):
                write_text(text_file, describe(_words(group, track)), writer=own)
            file = _latent_file(context.folder, track)
            if not is_whole(file):
                self._encode(autoencoder, track, file)
                if not context.quiet:
                    count = f"{number + 1} of {len(recordings)} recordings"
                    context.say(f"{self.name}: encoded {count}, {track.name} ({group}).")
        if processes > 1:
            multihost_utils.sync_global_devices(f"{self.name}: recordings are encoded")
        if own == 0:
            write_json(context.folder / INDEX, self._index(autoencoder, context.folder))
        if processes > 1:
            multihost_utils.sync_global_devices(f"{self.name}: the index is written")
        index = json.loads((context.folder / INDEX).read_text(encoding="utf-8"))
        frames = sum(entry["frames"] for entry in index["tracks"])
        return {
            "tracks": len(index["tracks"]),
            "minutes": round(frames / index["frame_rate"] / 60, 1),
            "latent_std": float(np.mean(index["std"])),
        }

    def _index(self, autoencoder: AudioAutoencoder, folder: Path) -> dict[str, Any]:
        """Return the index of all recordings; measured statistics take one pass over the latents."""
        entries, sums = [], np.zeros((3, autoencoder.config.seanet.dimension))
        for name, group, label, track in self._recordings():
            file, text_file = _latent_file(folder, track), self._text_file(folder, group, track)
            latents = LatentTrack(track.name, label, file, text_file)
            if name == "train" and self.statistics == "measured":
                mean_FL, std_FL = (x.astype(np.float64) for x in latents.read(0, len(latents)))
                sums += [
                    np.full(mean_FL.shape[1], len(mean_FL)),
                    mean_FL.sum(axis=0),
                    (mean_FL**2 + std_FL**2).sum(axis=0),
                ]
            entry = {"file": file.name, "split": name, "label": label, "name": track.name,
                     "frames": len(latents)}  # fmt: skip
            entries.append(entry | ({} if text_file is None else {"text": text_file.name}))
        if self.statistics == "tracked":
            mean_L = np.asarray(autoencoder.latent_mean[...])
            std_L = np.asarray(autoencoder.latent_std[...])
        else:
            count, first, second = sums
            mean_L = first / count
            std_L = np.sqrt(np.maximum(second / count - mean_L**2, 0))
        return {
            "frame_rate": autoencoder.config.frame_rate,
            "sample_rate": autoencoder.config.sample_rate,
            "latent_dim": len(mean_L),
            "labels": list(self.data.labels),
            "mean": mean_L.tolist(),
            "std": std_L.tolist(),
            "tracks": entries,
        }

    def report(self, folder: Path) -> str:
        """Return a Markdown section about this stage."""
        path = folder / INDEX
        if not path.is_file():
            return f"## {self.name}\n"
        index = json.loads(path.read_text(encoding="utf-8"))
        seconds = sum(t["frames"] for t in index["tracks"]) / index["frame_rate"]
        return (
            f"## {self.name}\n\n- recordings: {len(index['tracks'])}, {seconds / 60:.1f} minutes\n"
            f"- latents: {index['latent_dim']} wide, {index['frame_rate']:g} a second\n"
        )

    def _recordings(self, report: Report | None = None) -> Iterator[tuple[str, str, int, Track]]:
        for name in SPLITS:
            for label, tracks in enumerate(self.data.tracks(name, report=report)):
                for track in tracks:
                    yield name, self.data.labels[label], label, track

    def _text_file(self, folder: Path, group: str, track: Track) -> Path | None:
        """Return where the states of a track's text are; tracks of one text share them."""
        if self.text_encoder is None:
            return None
        said = json.dumps([self.text_encoder, _words(group, track)])
        return folder / f"text-{hashlib.sha256(said.encode()).hexdigest()[:20]}.npy"

    def _encode(self, autoencoder: AudioAutoencoder, track: Track, file: Path) -> None:
        length = self.frames_per_chunk * autoencoder.config.seanet.hop
        chunks = (
            track.read(start, min(length, len(track) - start))[None]
            for start in range(0, len(track), length)
        )
        found = list(encode_chunks(autoencoder, chunks, frames_per_chunk=self.frames_per_chunk))
        mean_FL = np.concatenate([np.asarray(p.mean_BTL, np.float32)[0] for p in found])
        std_FL = np.concatenate([np.asarray(p.std_BTL, np.float32)[0] for p in found])
        write_track(file, mean_FL, std_FL, dtype=self.storage, writer=jax.process_index())


def _words(group: str, track: Track) -> str:
    """Return what a text encoder is given for a recording."""
    return group if track.caption is None else track.caption


def _latent_file(folder: Path, track: Track) -> Path:
    return folder / f"{hashlib.sha256(track.digest.encode()).hexdigest()[:20]}.npy"


class TextEncoder:
    """A frozen T5 encoder with its tokenizer: text to states [tokens, D] in float32.

    It computes in float32 whatever its checkpoint is stored in: T5's activations outgrow float16,
    and the states are to be those of training (melodyflow.md 3.4).
    """

    def __init__(self, source: str):
        self._model = load(source, dtype="float32")
        self._tokenizer = load_tokenizer(source)
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, text: str) -> np.ndarray:
        """Return the last hidden states of a text, its end token included.

        A text without a word has none: it is the null condition (melodyflow.md 3.4).
        """
        if not text.strip():
            return np.zeros((0, self._model.config.embed_dim), np.float32)
        if text not in self._known:
            tokens = self._tokenizer.encode(text)
            end = self._tokenizer.eos_id
            if end is not None and (not tokens or tokens[-1] != end):
                tokens.append(end)
            # Few lengths are compiled: padding is masked.
            length = -(-len(tokens) // 32) * 32
            padded = np.zeros((1, length), np.int32)
            padded[0, : len(tokens)] = tokens
            mask = (np.arange(length) < len(tokens))[None]
            states = _states(self._model, jnp.asarray(padded), jnp.asarray(mask))
            self._known[text] = np.asarray(states[0, : len(tokens)], np.float32)
        return self._known[text]


@functools.lru_cache(maxsize=2)
def text_encoder(source: str) -> Callable[[str], np.ndarray]:
    """Return the text encoder at a source; texts it has seen are kept."""
    return TextEncoder(source)


def cut_notes(lengths: Mapping[str, int], limit: int) -> tuple[str, ...]:
    """Return a sentence about each text that has more tokens than the limit."""
    return tuple(
        f"the prompt {text[:40] + '...' if len(text) > 40 else text!r} has {length} tokens and is "
        f"cut to the {limit} that the model's conditions have."
        for text, length in lengths.items()
        if length > limit
    )


@jax.jit
def _states(model: Any, tokens_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    return model(tokens_BL, mask_BL)


def load_autoencoder(model: Any, folder: Path) -> AudioAutoencoder:
    """Return the autoencoder of a codec's training stage, on the first device of each process.

    Args:
      model: config of what the stage trained.
      folder: of the stage.
    """
    definition, *parts = split(abstract(model.build, jax.random.key(0)))
    return definition.merge(*load_replica(folder, *parts)).autoencoder
