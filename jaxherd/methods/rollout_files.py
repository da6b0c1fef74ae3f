"""Files of online RL's rounds: written before they are used, read by a run that goes on."""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.data.cache import write_atomically
from jaxherd.data.packing import Row


def write_round(path: Path, fingerprint: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of a round, whole or not at all.

    Args:
      path: of the file.
      fingerprint: of everything that decided them.
      arrays: by name.
    """
    file, entries = io.BytesIO(), {"data": np.asarray(fingerprint), **arrays}
    np.savez_compressed(file, allow_pickle=False, **entries)
    write_atomically(path, file.getvalue())


def read_round(path: Path, fingerprint: str) -> Row:
    """Return the arrays of a round.

    Raises:
      JaxherdError: the file is damaged, or of other rollouts.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from error
    check_own(str(arrays.pop("data", "")), fingerprint, path)
    return arrays


def read_filter(path: Path, fingerprint: str) -> np.ndarray:
    """Return the places of the prompts that a filter kept.

    Raises:
      JaxherdError: the file is damaged, or of other rollouts.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, kept = str(record["data"]), np.asarray(record["kept"], np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    check_own(found, fingerprint, path)
    return kept


def _damaged(path: Path, error: Exception) -> JaxherdError:
    return JaxherdError(
        f"{path} is damaged ({type(error).__name__}): bring it back, or start anew in another "
        "--workdir."
    )


def check_own(found: str, fingerprint: str, path: Path) -> None:
    """Raise JaxherdError if a file belongs to other rollouts."""
    if found != fingerprint:
        raise JaxherdError(
            f"{path} belongs to other rollouts: tasks, tokenizer, seed or settings changed since; "
            "use another --workdir."
        )
