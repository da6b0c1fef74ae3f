"""Read and write WAV, FLAC and OGG files; needs the extra `audio`.

Axis letters: T samples, C channels.
"""

import math
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError, missing_extra

FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS")}

# What a file may claim to hold before it is decoded.
MAX_SECONDS, MAX_CHANNELS, MAX_RATE = 4 * 3600, 16, 384_000


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is absent
        raise missing_extra("soundfile", "audio", "reading and writing audio") from error
    return soundfile


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
      JaxherdError: no such file, no audio, damaged, empty, too long, or not convertible.
    """
    soundfile = _soundfile()
    if not pathlib.Path(path).is_file():
        raise JaxherdError(f"There is no audio file {os.fspath(path)!r}: check the path.")
    try:
        with soundfile.SoundFile(path) as file:
            rate, frames, own = file.samplerate, file.frames, file.channels
            if not (0 < rate <= MAX_RATE and 0 < own <= MAX_CHANNELS):
                raise JaxherdError(f"{os.fspath(path)!r} claims {own} channels at {rate} Hz.")
            if frames > max_seconds * rate:
                raise JaxherdError(
                    f"{os.fspath(path)!r} is {frames / rate:.0f} s long, more than the "
                    f"{max_seconds:.0f} s that are read: cut it."
                )
            wave_TC = file.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise JaxherdError(
            f"{os.fspath(path)!r} cannot be decoded as audio ({str(error).rstrip('.')})."
        ) from error
    if not len(wave_TC) or not np.isfinite(wave_TC).all():
        raise JaxherdError(f"{os.fspath(path)!r} holds no sound, or values that are no numbers.")
    if channels is not None:
        wave_TC = with_channels(wave_TC, channels)
    if sample_rate is not None and sample_rate != rate:
        wave_TC, rate = resample(wave_TC, rate, sample_rate), sample_rate
    return wave_TC, rate


def with_channels(wave_TC: Float[np.ndarray, "T C"], channels: int) -> Float[np.ndarray, "T D"]:
    """Return the wave with so many channels: the mean of all for one, copies of one for several.

    Raises:
      JaxherdError: several channels to another number of several.
    """
    own = wave_TC.shape[1]
    if own == channels:
        return wave_TC
    if channels == 1:
        return wave_TC.mean(axis=1, keepdims=True)
    if own == 1:
        return np.repeat(wave_TC, channels, axis=1)
    raise JaxherdError(f"{own} channels cannot be made {channels}: mix them down first.")


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
    soundfile = _soundfile()
    path = pathlib.Path(path)
    check_output(path)
    kind, subtype = FORMATS[path.suffix.lower()]
    partial = path.with_name(f".{path.name}.partial")
    try:
        # libsndfile's Vorbis encoder overflows its stack on very long writes.
        with soundfile.SoundFile(
            partial, "w", sample_rate, wave_TC.shape[1], format=kind, subtype=subtype
        ) as file:
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
