"""Torch zip files: what torch wrote is read, and nothing in them runs."""

import collections
import io
import os
import pathlib
import pickle
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.weights import torch_zip
from jaxherd.weights.torch_zip import read_torch_zip

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FILE = GOLDEN / "melodyflow" / "state_dict.bin"


def rewrite(path, change=None, description=None, compress=zipfile.ZIP_STORED):
    """Copy the committed file with some entries changed."""
    with zipfile.ZipFile(FILE) as source, zipfile.ZipFile(path, "w", compress) as out:
        for name in source.namelist():
            data = source.read(name)
            if description is not None and name.endswith("data.pkl"):
                data = description
            for target, value in (change or {}).items():
                data = value if name.endswith(target) else data
            out.writestr(name, data)
    return path


def test_what_torch_wrote():
    package = read_torch_zip(FILE)
    state = package["best_state"]
    base = state["weight"]
    assert package["xp.cfg"] == "transformer_lm:\n  dim: 16\n"
    assert package["list"] == [1, 2.5, None, True, -7, 2**40] and package["pair"] == (1, "a")
    assert base.shape == (4, 6) and base.dtype == np.float32
    from_name = np.random.RandomState(zlib.crc32(b"base")).normal(0, 0.3, (4, 6))
    np.testing.assert_array_equal(base, from_name.astype(np.float32))
    np.testing.assert_array_equal(state["transposed"], base.T)
    np.testing.assert_array_equal(state["part"], base[1:3, ::2])
    np.testing.assert_array_equal(state["half"], base.astype(np.float16))
    np.testing.assert_array_equal(state["bfloat"], base.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(state["double"], base.astype(np.float64))
    np.testing.assert_array_equal(state["parameter"], base[0])
    np.testing.assert_array_equal(state["integers"], np.arange(5))
    np.testing.assert_array_equal(state["flags"], [True, False])
    assert state["empty"].shape == (0, 3) and state["scalar"] == 2.5
    assert isinstance(state, collections.OrderedDict) and len(state) == 11


class Runs:
    """Pickles itself as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "value, found",
    [
        (Runs(os.system, "touch ran"), "system"),
        (Runs(eval, "1"), "eval"),
        (Runs(pathlib.PurePosixPath, "a"), "PurePosixPath"),
        ({"a": Runs(getattr, "a", "upper")}, "getattr"),
        (Runs(io.BytesIO, b"a"), "BytesIO"),
        (np.zeros(3), "numpy"),
        (complex(1, 2), "complex"),
        (collections.Counter("a"), "Counter"),
    ],
)
def test_nothing_but_plain_values(tmp_path, monkeypatch, value, found, protocol):
    monkeypatch.chdir(tmp_path)
    description = pickle.dumps(value, protocol=protocol)
    with pytest.raises(JaxherdError, match="only plain tensors") as error:
        read_torch_zip(rewrite(tmp_path / "bad.bin", description=description))
    assert found in str(error.value) or "instruction" in str(error.value)
    assert not (tmp_path / "ran").exists()


def put(text: bytes) -> bytes:
    return b"\x80\x02" + text + b"."


@pytest.mark.parametrize(
    "description, message",
    [
        (put(b"cposix\nsystem\nX\x01\x00\x00\x00a\x85R"), "'posix.system'"),
        (put(b"ctorch\nFloatStorage\n)R"), "a call of 'torch.FloatStorage'"),
        (put(b"ccollections\nOrderedDict\n]\x85R"), "a call of 'collections.OrderedDict'"),
        (put(b"(ccollections\nOrderedDict\no"), "instruction OBJ"),
        (put(b"(lp0\n"), "instruction LIST"),
        (put(b"ccollections\nOrderedDict\n)\x81"), "instruction NEWOBJ"),
        (put(b"\x82\x01"), "instruction EXT1"),
        (put(b"}(]K\x01u"), "key of type list"),
        (put(b"K\x01Q"), "no tensor storage"),
        (put(b"}}b"), "damaged"),
        (put(b"R"), "damaged"),
        (put(b"h\x07"), "damaged"),
        (put(b"K\x01K\x02"), "damaged"),
        (put(b"ccollections\nOrderedDict\n"), "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
    ],
)
def test_bad_descriptions(tmp_path, description, message):
    with pytest.raises(JaxherdError, match=message):
        read_torch_zip(rewrite(tmp_path / "bad.bin", description=description))


def tensor(offset=0, shape=(2, 3), strides=(3, 1), key="0", count=24):
    """The description of one float tensor, in torch's own opcodes."""

    def number(n):
        return b"J" + int(n).to_bytes(4, "little", signed=True)

    def text(s):
        return b"X" + len(s).to_bytes(4, "little") + s.encode()

    def many(numbers):
        return b"(" + b"".join(map(number, numbers)) + b"t"

    record = text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count)
    arguments = b"(" + record + b"tQ" + number(offset) + many(shape) + many(strides)
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return put(rebuild + arguments + b"\x89ccollections\nOrderedDict\n)RtR")


def test_tensors_stay_inside_their_storage(tmp_path):
    whole = read_torch_zip(rewrite(tmp_path / "good.bin", description=tensor()))
    np.testing.assert_array_equal(
        whole, read_torch_zip(FILE)["best_state"]["weight"].ravel()[:6].reshape(2, 3)
    )
    for number, arguments in enumerate(
        [
            dict(offset=-1),
            dict(offset=19),
            dict(shape=(10**6, 10**6), strides=(0, 0)),
            dict(strides=(-3, 1)),
            dict(shape=(2, 3, 4)),
            dict(count=25),
            dict(key="../data.pkl"),
            dict(key="99"),
            dict(shape=(5, 5), strides=(1, 1)),
        ]
    ):
        bad = rewrite(tmp_path / f"{number}.bin", description=tensor(**arguments))
        with pytest.raises(JaxherdError, match="damaged"):
            read_torch_zip(bad)
    many = tensor(shape=(1,) * 40, strides=(1,) * 40)
    with pytest.raises(JaxherdError, match="40 dimensions"):
        read_torch_zip(rewrite(tmp_path / "many.bin", description=many))


def test_archives_that_torch_would_not_write(tmp_path, monkeypatch):
    with pytest.raises(JaxherdError, match="compressed"):
        read_torch_zip(rewrite(tmp_path / "bomb.bin", compress=zipfile.ZIP_DEFLATED))
    for name in ("../evil", "/evil", "other/evil", "state_dict\\evil"):
        path = rewrite(tmp_path / "path.bin")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"x")
        with pytest.raises(JaxherdError, match="evil"):
            read_torch_zip(path)
    with pytest.raises(JaxherdError, match="little-endian"):
        read_torch_zip(rewrite(tmp_path / "big.bin", {"byteorder": b"big"}))
    whole = FILE.read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    for name in ("cut.bin", "old.bin"):
        with pytest.raises(JaxherdError, match="no torch zip"):
            read_torch_zip(tmp_path / name)
    broken = bytearray(whole)
    at = whole.index(b"dim: 16")
    broken[at : at + 3] = b"DIM"  # the archive's checksum tells
    (tmp_path / "crc.bin").write_bytes(bytes(broken))
    with pytest.raises(JaxherdError, match="damaged"):
        read_torch_zip(tmp_path / "crc.bin")
    with pytest.raises(JaxherdError, match="no file"):
        read_torch_zip(tmp_path / "absent.bin")
    monkeypatch.setattr(torch_zip, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(JaxherdError, match="larger than 10"):
        read_torch_zip(FILE)
    monkeypatch.setattr(torch_zip, "MAX_ENTRIES", 2)
    with pytest.raises(JaxherdError, match="at most 2"):
        read_torch_zip(FILE)
