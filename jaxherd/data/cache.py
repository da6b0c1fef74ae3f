"""The local cache of fetched and derived data, written whole or not at all."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from jaxherd.core.errors import JaxherdError


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Return the cache folder: the argument, else `$JAXHERD_CACHE`, else `~/.cache/jaxherd`."""
    chosen = cache_dir or os.environ.get("JAXHERD_CACHE") or "~/.cache/jaxherd"
    return pathlib.Path(chosen).expanduser().absolute()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold an advisory lock on `<path>.lock`, so that one process at a time makes `path`."""
    lock = path.with_name(path.name + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise JaxherdError(
            f"Cannot write to the cache folder {str(lock.parent)!r} ({error.strerror}): "
            "set JAXHERD_CACHE to a writable folder."
        ) from error
    with handle:
        # The lock file stays: removing it would let two processes lock two different inodes.
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def atomic_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a scratch folder that becomes `target` by one rename if the body succeeds.

    On any exception the scratch folder is removed and `target` stays absent.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            # Somebody without our lock (another host on a shared disk) was first: theirs is whole.
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomically(target: pathlib.Path, content: str | bytes) -> None:
    """Write a file by rename, so that a reader sees the old content or the new, never a part.

    The content is on the disk before the name is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    scratch = pathlib.Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
