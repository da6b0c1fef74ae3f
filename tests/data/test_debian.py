"""Debian packages as data: pins, cache, refusals."""

import subprocess

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data import debian
from jaxherd.data.sources import resolve

PIN = "0" * 64


def test_parse():
    source = debian.parse(f"deb://some-music==1:2.0-3/usr/share/x.ogg?sha256={PIN}")
    assert (source.name, source.version, source.path) == (
        "some-music",
        "1:2.0-3",
        "usr/share/x.ogg",
    )
    assert debian.parse("deb://singularity-music==007-2").sha256.startswith("139ba1e4")


@pytest.mark.parametrize(
    "source, told",
    [
        ("deb://some-music", "write deb://NAME==VERSION"),
        ("deb://some-music==1", "no pin for"),
        (f"deb://some-music==1?md5={PIN}", "unknown option 'md5'"),
        ("deb://some-music==1?sha256=12", "no pin for"),
        ("deb://Some_Music==1?sha256=" + PIN, "write deb://NAME==VERSION"),
    ],
)
def test_what_cannot_be_read_is_told(source, told):
    with pytest.raises(JaxherdError, match=told):
        debian.parse(source)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package made here, which `download` hands out; returns (its pin, downloads so far)."""
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: xx\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.example>\nDescription: x\n"
    )
    (tree / "usr").mkdir()
    (tree / "usr" / "a.txt").write_text("sound")
    built = tmp_path / "x.deb"
    try:
        subprocess.run(["dpkg-deb", "-b", str(tree), str(built)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("dpkg-deb is not on this machine")
    calls = []

    def download(source, folder):
        calls.append(source.name)
        target = folder / "x.deb"
        target.write_bytes(built.read_bytes())
        return target

    monkeypatch.setattr(debian, "download", download)
    import hashlib

    return hashlib.sha256(built.read_bytes()).hexdigest(), calls


def test_fetched_once_and_only_with_the_right_hash(package, tmp_path):
    pin, calls = package
    cache = tmp_path / "cache"
    with pytest.raises(JaxherdError, match="not the pinned"):
        resolve(f"deb://xx==1/usr/a.txt?sha256={PIN}", cache_dir=cache)
    assert not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]
    told: list[tuple[str, int, int]] = []
    for _ in range(2):
        path = resolve(
            f"deb://xx==1/usr/a.txt?sha256={pin}",
            cache_dir=cache,
            report=lambda *count: told.append(count),
        )
        assert path.read_text() == "sound"
    assert calls == ["xx", "xx"]
    assert told == [("fetching xx", 0, 1), ("fetching xx", 1, 1)]
    for inside in ("usr/none", "../../x"):
        with pytest.raises(JaxherdError, match="has no file or folder"):
            resolve(f"deb://xx==1/{inside}?sha256={pin}", cache_dir=cache)
