"""Answers of a model that are kept in a file, so that a stopped evaluation goes on where it was."""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.errors import JaxherdError, StorageError
from jaxherd.core.modules import flatten, split


class ResponseCache:
    """Answers by what was asked of which model: a line of JSON each.

    A line that a killed run left unfinished is passed over; a damaged one elsewhere is an error.
    """

    def __init__(self, path: pathlib.Path | None, model: str):
        """Read what is there.

        Args:
          path: of the file; None keeps nothing beyond this process.
          model: what tells it from others, see `model_fingerprint`.
        Raises:
          JaxherdError: the file is no such cache.
        """
        self._path, self._model = path, model
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            self._known = _read(path)

    def key(self, method: str, arguments: Any) -> str:
        """Return the key of one question."""
        text = json.dumps([self._model, method, arguments], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep answers; they are in the file before this returns."""
        new = [(key, answer) for key, answer in answers if key not in self._known]
        self._known.update(new)
        if self._path is None or not new:
            return
        lines = "".join(json.dumps({"key": k, "answer": a}) + "\n" for k, a in new)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise StorageError(f"{self._path} could not be written ({error.strerror}).") from error


def _read(path: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JaxherdError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            found[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise JaxherdError(
                f"line {number} of {str(path)!r} is no kept answer: name another file, or delete it."
            ) from error
    if len(whole) < len(data):
        # What is added next must begin on a line of its own.
        path.write_bytes(whole)
    return found


def model_fingerprint(module: Any) -> str:
    """Return what tells a model from others: its config, and sums over every parameter."""
    _, params, _ = split(module)
    flat = flatten(params)
    sums = jax.device_get(_sums(flat))
    digest = hashlib.sha256(repr(module.config).encode())
    for name in sorted(flat):
        digest.update(f"{name}{flat[name].shape}{flat[name].dtype}".encode())
        digest.update(np.asarray(sums[name], np.float32).tobytes())
    return digest.hexdigest()[:32]


@jax.jit
def _sums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        # The second sum tells the order of the columns too.
        places = jnp.arange(x.shape[-1] if x.ndim else 1, dtype=jnp.float32)
        return jnp.stack([wide.sum(), jnp.abs(wide).sum(), (wide * jnp.cos(places)).sum()])

    return {name: one(x) for name, x in flat.items()}
