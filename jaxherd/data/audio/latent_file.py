"""One recording's latents as an .npz file, with what tells which model can decode them.

Axis letters: F frames, L latent width.
"""

import dataclasses
import hashlib
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError, StorageError

# What numpy raises for files that are damaged or something else.
_DAMAGED = (OSError, EOFError, KeyError, TypeError, ValueError, OverflowError, zlib.error)


@dataclasses.dataclass(frozen=True, eq=False)
class LatentFile:
    """Standardised latents.

    Attributes:
      latents_FL: float32.
      samples: of the recording, in each channel.
      sample_rate: Hz; None in a file that does not say.
      statistics: `statistics_digest` of the model; None in files of before it was kept.
    """

    latents_FL: np.ndarray
    samples: int
    sample_rate: int | None = None
    statistics: str | None = None

    def write(self, path: pathlib.Path) -> None:
        """Write it, whole or not at all.

        Raises:
          StorageError: the disk could not be written; nothing is left of it.
        """
        fields = {
            "latents": self.latents_FL,
            "samples": self.samples,
            "sample_rate": self.sample_rate,
            "statistics": self.statistics,
        }
        told: dict[str, Any] = {name: x for name, x in fields.items() if x is not None}
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **told)
            partial.replace(path)
        except OSError as error:
            raise StorageError(
                f"{str(path)!r} could not be written ({error.strerror or error}): make room or "
                "choose another folder."
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def check(self, path: pathlib.Path, sample_rate: int, statistics: str) -> None:
        """Raise a JaxherdError if a model of this rate and these statistics did not encode it."""
        wrong = []
        if self.sample_rate is not None and self.sample_rate != sample_rate:
            wrong.append(f"at {self.sample_rate} Hz, not the model's {sample_rate} Hz")
        if self.statistics is not None and self.statistics != statistics:
            wrong.append("by a model with other statistics of its latents")
        if wrong:
            raise JaxherdError(
                f"{str(path)!r} was encoded {' and '.join(wrong)}: decode it with the model that "
                "encoded it."
            )


def read_latent_file(path: pathlib.Path) -> LatentFile:
    """Return what `LatentFile.write` wrote.

    Raises:
      JaxherdError: no such file, a damaged one, or something else in it.
    """
    where = repr(str(path))
    if not path.is_file():
        raise JaxherdError(f"there is no file {where}.")
    try:
        if not zipfile.is_zipfile(path):
            raise TypeError("it is no .npz file, or was cut off")
        with np.load(path, allow_pickle=False) as data:
            found, words = data["latents"], {name: data[name] for name in data if name != "latents"}
        several = [name for name, value in words.items() if value.ndim]
        if several:
            raise TypeError(f"{several[0]} is no single value")
        if found.dtype.kind not in "fiu":
            raise TypeError(f"latents of type {found.dtype}")
        file = LatentFile(
            found.astype(np.float32),
            int(words["samples"]),
            int(words["sample_rate"]) if "sample_rate" in words else None,
            str(words["statistics"]) if "statistics" in words else None,
        )
    except (*_DAMAGED, zipfile.BadZipFile) as error:
        raise JaxherdError(
            f"{where} holds no latents of ours ({' '.join(str(error).split())}): give the .npz file "
            "that `jaxherd music encode` wrote."
        ) from error
    if found.ndim != 2 or file.samples < 1:
        raise JaxherdError(
            f"{where} holds latents of shape {found.shape} for {file.samples} samples, not [F, L] "
            "for at least one."
        )
    return file


def statistics_digest(mean_L: Float[np.ndarray, " L"], std_L: Float[np.ndarray, " L"]) -> str:
    """Return a hash of the mean and deviation by which latents are standardised, as float32."""
    both = np.stack([mean_L, std_L]).astype("<f4")
    return hashlib.sha256(both.tobytes()).hexdigest()[:32]
