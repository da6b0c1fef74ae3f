import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data.tfds_source import TfdsName, parse_tfds

# In a process of its own, since what else the tests import must not decide the outcome.
_SCRIPT = """
import json, pathlib, sys
import numpy as np
import tensorflow_datasets as tfds

class TinyText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    pkg_dir_path = pathlib.Path(sys.argv[1])
    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64}))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 25)}
    def _generate_examples(self, start, stop):
        for n in range(start, stop):
            yield n, {"text": f"document {n} is here", "n": n}

root = pathlib.Path(sys.argv[1])
TinyText(data_dir=root, file_format="array_record").download_and_prepare()

from jaxherd.data.tfds_source import TfdsSource
from jaxherd.data.sources import resolve
from jaxherd.data.corpus import load_corpus
folder = resolve("tfds://tiny_text:1.2.0/train")
source = TfdsSource(folder, "train")
import pickle
again = pickle.loads(pickle.dumps(source))
corpus = load_corpus("tfds://tiny_text")
heldout = load_corpus("tfds://tiny_text", split="heldout")
by_folder = load_corpus(str(folder), text_field="text")
try:
    TfdsSource(folder, "tain"); error = ""
except ValueError as caught:
    error = str(caught)
try:
    load_corpus("tfds://tiny_text", text_field="txt")[0]; field_error = ""
except ValueError as caught:
    field_error = str(caught)
from jaxherd.data.packed_text import Bytes, PackedText
data = PackedText("tfds://tiny_text", Bytes(), sequence_length=16, batch_size=2, tokenize="stream")
batch = next(data.build(split="train", seed=0))
evaluation = data.build(split="heldout", seed=0)
print(json.dumps({
    "folder": folder.name,
    "numbers": sorted(int(source[i]["n"]) for i in range(len(source))),
    "same": [int(again[i]["n"]) for i in range(20)] == [int(source[i]["n"]) for i in range(20)],
    "texts": sorted(corpus[i].text for i in range(len(corpus))),
    "heldout": len(heldout), "by_folder": len(by_folder),
    "prints": [corpus.fingerprint(), heldout.fingerprint()],
    "error": error, "field_error": field_error, "shape": batch["tokens"].shape,
    "targets": float(sum(b["loss_weights"].sum() for b in evaluation)),
    "tensorflow": "tensorflow" in sys.modules}))
"""


def test_read_without_tensorflow(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TFDS_DATA_DIR": str(tmp_path),
            "JAXHERD_CACHE": str(tmp_path / "cache"),
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tensorflow"] is False
    assert result["folder"] == "1.2.0"
    assert result["numbers"] == list(range(20))
    assert result["same"]
    assert result["texts"] == sorted(f"document {n} is here" for n in range(20))
    assert result["heldout"] == 5 and result["by_folder"] == 20
    assert len(set(result["prints"])) == 2
    assert "did you mean 'train'" in result["error"]
    assert "did you mean 'text'" in result["field_error"]
    assert result["shape"] == [2, 16]
    # Five documents of 19 bytes between beginning and end tokens: 20 targets each.
    assert result["targets"] == 5 * 20


@pytest.mark.parametrize(
    "source, expected",
    [
        ("tfds://mnist", TfdsName("mnist")),
        ("tfds://mnist/train", TfdsName("mnist", split="train")),
        ("tfds://mnist:3.0.1/test", TfdsName("mnist", version="3.0.1", split="test")),
        ("tfds://c4/en:3.0.1", TfdsName("c4", "en", "3.0.1")),
        ("tfds://c4/en:3.0.1/train[:1%]", TfdsName("c4", "en", "3.0.1", "train[:1%]")),
        ("tfds://c4/en/validation", TfdsName("c4", "en", None, "validation")),
    ],
)
def test_names(source, expected):
    assert parse_tfds(source) == expected


def test_unprepared(tmp_path, monkeypatch):
    from jaxherd.data.sources import resolve

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(JaxherdError, match="tfds build c4/en:3.0.1"):
        resolve("tfds://c4/en:3.0.1/train")


def test_highest_version_counts_as_a_number(tmp_path, monkeypatch):
    from jaxherd.data.sources import resolve

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for version in ("9.0.0", "10.0.0"):
        folder = tmp_path / "demo" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
    assert resolve("tfds://demo").name == "10.0.0"


def write_records(folder, texts):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()


def test_array_record_fingerprint_is_of_the_content(tmp_path, cache):
    from jaxherd.data.corpus import load_corpus

    def fingerprint(folder):
        return load_corpus(str(folder), heldout_fraction=0.1).fingerprint()

    first, copy, other = (tmp_path / name for name in ("first", "copy", "other"))
    first.mkdir()
    write_records(first, [f"text {n}" for n in range(50)])
    shutil.copytree(first, copy, copy_function=shutil.copyfile)
    os.utime(copy / "a.array_record", (0, 0))
    assert fingerprint(copy) == fingerprint(first)
    # As many bytes, another text.
    other.mkdir()
    write_records(other, [f"text {n}" for n in reversed(range(50))])
    assert (other / "a.array_record").stat().st_size == (first / "a.array_record").stat().st_size
    assert fingerprint(other) != fingerprint(first)


def test_array_record_folder(tmp_path, cache):
    from jaxherd.data.corpus import load_corpus

    write_records(tmp_path, [f"text {n}" for n in range(50)])
    train = load_corpus(str(tmp_path), heldout_fraction=0.1)
    heldout = load_corpus(str(tmp_path), split="heldout", heldout_fraction=0.1)
    texts = [train[i].text for i in range(len(train))] + [heldout[i].text for i in range(5)]
    assert len(heldout) == 5
    np.testing.assert_array_equal(texts, [f"text {n}" for n in range(50)])
