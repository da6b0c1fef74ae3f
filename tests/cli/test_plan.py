"""`jaxherd plan --save` and `--json`: checked before the compile, whole afterwards."""

import dataclasses
import json

import pytest

from jaxherd.cli import plan_
from jaxherd.cli.main import main
from jaxherd.core import resources
from jaxherd.core.experiment import Experiment
from jaxherd.planning.readme import BEGIN, END
from jaxherd.planning.render import table_row
from jaxherd.planning.report import Plan


@pytest.fixture
def stages(monkeypatch):
    """Return a function that gives the verb an experiment with so many stages, quickly planned."""
    compiled = []
    load = plan_.common.load_experiment

    def install(count: int) -> list[str]:
        def loaded(name, scale, assignments) -> Experiment:
            found = load(name, "cpu", assignments)
            one = found.stages[0]
            several = tuple(dataclasses.replace(one, name=f"stage{i}") for i in range(count))
            return dataclasses.replace(found, stages=several)

        def planned(experiment, stage, target, flags=None) -> Plan:
            compiled.append(stage.name)
            return Plan(stage.name, target.name, 4, True, 1.0, 2.0, 3.0, 4.0)

        monkeypatch.setattr(plan_.common, "load_experiment", loaded)
        monkeypatch.setattr(plan_, "plan_stage", planned)
        return compiled

    return install


PLAN = ("plan", "llama4/scout", "--on", "v5e:2x2")


def test_one_stage_is_one_object(stages, tmp_path, capsys):
    stages(1)
    path = tmp_path / "plan.json"
    assert main([*PLAN, "--json", "--save", str(path)]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert Plan.from_json(path.read_text()).experiment == "stage0"
    assert list(tmp_path.iterdir()) == [path]


def test_several_stages_are_one_list(stages, tmp_path, capsys):
    stages(3)
    path = tmp_path / "plan.json"
    assert main([*PLAN, "--json", "--save", str(path)]) == 0
    names = ["stage0", "stage1", "stage2"]
    assert [p["experiment"] for p in json.loads(path.read_text())] == names
    assert [p["experiment"] for p in json.loads(capsys.readouterr().out)] == names
    # One of them is one object again.
    assert main([*PLAN, "--stage", "stage1", "--save", str(path)]) == 0
    assert Plan.from_json(path.read_text()).experiment == "stage1"


@pytest.mark.parametrize("place", ["absent/plan.json", "folder", "file/plan.json"])
def test_a_bad_path_is_told_before_the_compile(stages, tmp_path, capsys, place):
    compiled = stages(1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert main([*PLAN, "--save", str(tmp_path / place)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxherd: --save") and err.count("\n") == 1
    assert not compiled


def test_the_table_of_plans_is_written(tmp_path, monkeypatch, capsys, stages):
    (tmp_path / "plans").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(resources, "in_checkout", lambda name: tmp_path)
    stages(1)
    path = tmp_path / "plans" / "small-v5e-2x2.json"
    assert main([*PLAN, "--save", str(path), "--readme"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert table_row(path.stem, Plan.from_json(path.read_text())) in text.splitlines()
    capsys.readouterr()
    # Of no experiment nothing is planned.
    assert main(["plan", "--readme"]) == 0 and readme.read_text() == text
    captured = capsys.readouterr()
    assert captured.out == "" and "is up to date" in captured.err
    path.unlink()
    assert main(["plan", "--readme"]) == 0 and "small-v5e" not in readme.read_text()


def test_the_table_of_plans_needs_a_checkout(monkeypatch, capsys):
    monkeypatch.setattr(resources, "in_checkout", lambda name: None)
    assert main(["plan", "--readme"]) == 2
    assert "start it in one" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "name the experiment to plan" in capsys.readouterr().err
