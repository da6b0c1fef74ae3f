"""Read and write WAV, FLAC and OGG files; needs the extra `audio`.

Axis letters: T samples, C channels.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError, missing_extra
from jaxherd.data.audio.wav_header import wav_length

FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS")}

# What a file may claim to hold before it is decoded.
MAX_SECONDS, MAX_CHANNELS, MAX_RATE = 4 * 3600, 16, 384_000


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is absent
        raise missing_extra("soundfile", "audio", "reading and writing audio") from error
    return soundfile


@dataclasses.dataclass(frozen=True)
class AudioInfo:
    """What a file says of itself: Hz, samples in each channel, channels.

    `streamed`: its header does not say how long it is, as what a program wrote into a pipe; the
    samples are those up to the file's end, and whether it was cut off cannot be told.
    """

    sample_rate: int
    frames: int
    channels: int
    streamed: bool = False

    @property
    def seconds(self) -> float:
        """Length."""
        return self.frames / self.sample_rate


def audio_info(
    path: str | os.PathLike[str], *, max_seconds: int | float = MAX_SECONDS
) -> AudioInfo:
    """Return what a file claims to hold; nothing is decoded.

    Raises:
      JaxherdError: no such file, no audio, cut off, empty, or longer than `max_seconds`.
    """
    soundfile = _soundfile()
    if not pathlib.Path(path).is_file():
        raise JaxherdError(f"There is no audio file {os.fspath(path)!r}: check the path.")
    try:
        with soundfile.SoundFile(path) as file:
            info = AudioInfo(file.samplerate, file.frames, file.channels)
            kind = file.format
    except soundfile.SoundFileError as error:
        raise _undecodable(path, error) from error
    if not (0 < info.sample_rate <= MAX_RATE and 0 < info.channels <= MAX_CHANNELS):
        raise JaxherdError(
            f"{os.fspath(path)!r} claims {info.channels} channels at {info.sample_rate} Hz."
        )
    if info.frames > max_seconds * info.sample_rate:
        raise JaxherdError(
            f"{os.fspath(path)!r} is {info.seconds:.0f} s long, more than the "
            f"{max_seconds:.0f} s that are read: cut it."
        )
    if kind == "OGG" and not _ogg_ends(path):
        raise JaxherdError(
            f"{os.fspath(path)!r} is cut off after {info.seconds:.1f} s, without the page that ends "
            "an Ogg stream: fetch it again, or write what is there to a new file."
        )
    if kind in ("WAV", "WAVEX", "RF64"):
        info = _checked_wav(path, info)
    if not info.frames:
        raise JaxherdError(f"{os.fspath(path)!r} holds no sound.")
    return info


def _checked_wav(path: str | os.PathLike[str], info: AudioInfo) -> AudioInfo:
    """Return the info with `streamed`; a file that is shorter than its header says is refused."""
    length = wav_length(path)
    if length is None:
        return info
    if length.is_cut:
        raise JaxherdError(
            f"{os.fspath(path)!r} is cut off after {info.seconds:.2f} s of the {length.seconds:.2f} s "
            "that its header promises: fetch it again, or write what is there to a new file."
        )
    if length.promised == 0 and length.held:
        raise JaxherdError(
            f"{os.fspath(path)!r} says in its header that it holds no sound, though {length.held} "
            "bytes follow: a recording that was never finished has to be repaired first."
        )
    return dataclasses.replace(info, streamed=length.promised is None)


def _ogg_ends(path: str | os.PathLike[str]) -> bool:
    """Return whether the last page is marked as the last, and whole; libsndfile does not say."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 17)))  # a page has at most 65,307 bytes
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 28 or not page[5] & 4:
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])


def _undecodable(path: str | os.PathLike[str], error: Exception) -> JaxherdError:
    return JaxherdError(
        f"{os.fspath(path)!r} cannot be decoded as audio ({str(error).rstrip('.')})."
    )


def audio_blocks(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = None,
    channels: int | None = None,
    max_seconds: int | float = MAX_SECONDS,
    block_seconds: float = 30.0,
) -> Iterator[Float[np.ndarray, "T C"]]:
    """Yield a file's wave piece by piece, in memory that does not grow with its length.

    The pieces are those of `read_audio`, also where the rate changes: each is resampled with as
    much of its neighbours as the filter sees.

    Raises:
      JaxherdError: as `read_audio` does; what is wrong inside of the file is found on the way.
    """
    info = audio_info(path, max_seconds=max_seconds)
    check_channels(info.channels, channels or info.channels, path)
    new_rate = sample_rate or info.sample_rate
    divisor = math.gcd(info.sample_rate, new_rate)
    up, down = new_rate // divisor, info.sample_rate // divisor
    # The filter of `resample_poly` reaches 10 max(up, down) / up input samples to either side.
    # Pieces and margins are whole numbers of `down`, so that each begins at an output sample.
    margin = 0 if up == down else math.ceil((10 * max(up, down) / up + 1) / down) * down
    block = max(1, round(block_seconds * info.sample_rate / down)) * down
    held, before = None, 0
    for piece, last in _decoded(path, info, block + margin):
        held = piece if held is None else np.concatenate([held, piece])
        while len(held) >= before + block + margin or (last and len(held) > before):
            rest = len(held) - before
            size = rest if last and rest <= block else block
            window = held[: before + size + margin]
            yield _converted(window, before, size, channels, up, down)
            keep = max(0, before + size - margin)
            held, before = held[keep:], before + size - keep


def _decoded(path, info: AudioInfo, size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield (samples, whether they are the last), checked."""
    soundfile = _soundfile()
    read = 0
    try:
        with soundfile.SoundFile(path) as file:
            # The positions in a whole Ogg file may run ahead of what it holds (0.13 s were seen);
            # that the last page is there was checked before.
            slack = 1.0 if file.format == "OGG" else 0.1
            piece = file.read(size, dtype="float32", always_2d=True)
            while len(piece):
                read += len(piece)
                if not np.isfinite(piece).all():
                    raise JaxherdError(
                        f"{os.fspath(path)!r} holds values that are no numbers: mend or leave it out."
                    )
                following = file.read(size, dtype="float32", always_2d=True)
                yield piece, not len(following)
                piece = following
    except soundfile.SoundFileError as error:
        raise _undecodable(path, error) from error
    if read < info.frames - slack * info.sample_rate:
        raise JaxherdError(
            f"{os.fspath(path)!r} ends after {read / info.sample_rate:.1f} s of the "
            f"{info.seconds:.1f} s that it claims to hold: fetch it again."
        )


def _converted(window_TC, before: int, size: int, channels: int | None, up: int, down: int):
    """Return the window's samples [before, before + size) with these channels at the new rate."""
    if channels is not None:
        window_TC = with_channels(window_TC, channels)
    if up == down:
        return window_TC[before : before + size]
    start = before // down * up
    return resample(window_TC, down, up)[start : start + math.ceil(size * up / down)]


def read_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = None,
    channels: int | None = None,
    max_seconds: int | float = MAX_SECONDS,
) -> tuple[Float[np.ndarray, "T C"], int]:
    """Return (wave in [-1, 1], sample rate in Hz) of a whole file.

    Args:
      path: any format that libsndfile decodes.
      sample_rate: resample to this rate; the file's own when None.
      channels: mix down to one, or spread one over several; the file's own when None.
      max_seconds: longer files are refused before they are decoded.
    Raises:
      JaxherdError: no such file, no audio, damaged or cut off, empty, too long, values that are no
        numbers, or not convertible.
    """
    rate = sample_rate or audio_info(path, max_seconds=max_seconds).sample_rate
    blocks = audio_blocks(path, sample_rate=rate, channels=channels, max_seconds=max_seconds)
    return np.concatenate(list(blocks)), rate


def check_channels(own: int, channels: int, path: str | os.PathLike[str] | None = None) -> None:
    """Raise a JaxherdError if `with_channels` cannot do it; it names the file if one is given."""
    if own != channels and own != 1 and channels != 1:
        where = "" if path is None else f"{os.fspath(path)!r}: "
        raise JaxherdError(f"{where}{own} channels cannot be made {channels}: mix them down first.")


def with_channels(wave_TC: Float[np.ndarray, "T C"], channels: int) -> Float[np.ndarray, "T D"]:
    """Return the wave with so many channels: the mean of all for one, copies of one for several.

    Raises:
      JaxherdError: several channels to another number of several.
    """
    own = wave_TC.shape[1]
    check_channels(own, channels)
    if own == channels:
        return wave_TC
    if channels == 1:
        return wave_TC.mean(axis=1, keepdims=True)
    return np.repeat(wave_TC, channels, axis=1)


def resample(
    wave_TC: Float[np.ndarray, "T C"], rate: int, new_rate: int
) -> Float[np.ndarray, "S C"]:
    """Return the wave at another rate, by a polyphase filter."""
    from scipy.signal import resample_poly

    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    return resample_poly(wave_TC, up, down, axis=0).astype(np.float32)


def write_audio(
    path: str | os.PathLike[str], wave_TC: Float[np.ndarray, "T C"], sample_rate: int
) -> pathlib.Path:
    """Write a wave, clipped to [-1, 1], whole or not at all; the suffix says the format.

    Raises:
      JaxherdError: an unknown suffix, or a place that cannot be written.
    """
    return write_audio_pieces(path, [wave_TC], sample_rate, wave_TC.shape[1])


def write_audio_pieces(
    path: str | os.PathLike[str],
    pieces: Iterable[Float[np.ndarray, "_ C"]],
    sample_rate: int,
    channels: int,
) -> pathlib.Path:
    """Write a wave that comes piece by piece as `write_audio` does; one piece is held at a time.

    Args:
      path: its suffix says the format.
      pieces: of one wave, in order, with so many channels.
      sample_rate: Hz.
      channels: of the wave.
    Raises:
      JaxherdError: an unknown suffix, or a place that cannot be written.
    """
    soundfile = _soundfile()
    path = pathlib.Path(path)
    check_output(path)
    kind, subtype = FORMATS[path.suffix.lower()]
    partial = path.with_name(f".{path.name}.partial")
    try:
        with soundfile.SoundFile(
            partial, "w", sample_rate, channels, format=kind, subtype=subtype
        ) as file:
            for wave_TC in pieces:
                # libsndfile's Vorbis encoder overflows its stack on very long writes.
                for start in range(0, len(wave_TC), 1 << 16):
                    file.write(np.clip(wave_TC[start : start + (1 << 16)], -1.0, 1.0))
        os.replace(partial, path)
    except (OSError, soundfile.SoundFileError) as error:
        raise JaxherdError(f"{str(path)!r} cannot be written ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_output(path: pathlib.Path) -> None:
    """Raise a JaxherdError if audio could not be written there; nothing is left behind."""
    if path.suffix.lower() not in FORMATS:
        raise JaxherdError(
            f"{str(path)!r}: the suffix says the format, one of {', '.join(FORMATS)}."
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise JaxherdError(f"the folder of {str(path)!r} does not exist or cannot be written.")
