"""Where weights come from, carried from folder to folder."""

import dataclasses
import json
import pathlib

import pytest

from jaxherd.core import provenance
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment
from jaxherd.core.runner import run_experiment
from jaxherd.data.examples import ExampleFile


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    reads: tuple[str, ...] = ()
    origin: str = ""
    data: object = None
    evaluations: tuple = ()

    def run(self, context):
        if self.origin:
            text = context.folder / "LICENSE"
            context.folder.mkdir(parents=True, exist_ok=True)
            text.write_text(f"terms of {self.origin}")
            provenance.record(context.folder, self.origin, {"family": self.origin}, [text])
        return {"seen": [place.name for place, _ in provenance.origins(context.folder)]}


def run(folder, *stages):
    return run_experiment(
        Experiment("tests/x", "cpu", "cpu", stages), folder, target="cpu", devices=(), quiet=True
    )


def test_origins_go_from_stage_to_stage(tmp_path):
    found = run(
        tmp_path,
        Stage("load", origin="a"),
        Stage("teacher", origin="b"),
        Stage("other"),
        Stage("train", ("load",)),
        Stage("distil", ("train", "teacher")),
        Stage("alone", ("other",)),
    )
    assert {name: one["seen"] for name, one in found.items()} == {
        "load": ["a"], "teacher": ["b"], "other": [], "train": ["a"], "distil": ["a", "b"], "alone": [],
    }  # fmt: skip
    assert (tmp_path / "distil" / "provenance" / "b" / "LICENSE").read_text() == "terms of b"


def test_what_stands_beside_data_counts(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "answers.jsonl").write_text("")
    provenance.record(data, "c", {"family": "c"}, [])
    source = ExampleFile(str(data / "answers.jsonl"))
    found = run(
        tmp_path / "run", Stage("train", data=source), Stage("measure", evaluations=(source,))
    )
    assert found["train"]["seen"] == ["c"] and found["measure"]["seen"] == []
    # A path that is not there, or lies in a stage's folder, or elsewhere.
    for other in (
        ExampleFile(str(data / "none")),
        ExampleFile("x", stage="s"),
        ExampleFile("hf://a/b/c"),
    ):
        assert provenance.given_folders(other) == []


def test_what_cannot_be_read_is_not_passed_over(tmp_path):
    provenance.record(tmp_path, "a", {"family": "a"}, [])
    path = pathlib.Path(tmp_path) / "provenance" / "a" / "origin.json"
    for content in ("{", json.dumps([1])):
        path.write_text(content)
        with pytest.raises(JaxherdError, match="restore it"):
            provenance.origins(tmp_path)
