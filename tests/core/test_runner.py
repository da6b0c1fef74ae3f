"""Stages, their order, resuming, overrides, and folders that belong to another run."""

import dataclasses
import enum
import errno
import json
import pathlib
from typing import Any, Literal

import pytest

from jaxherd.core import catalog, overrides
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment
from jaxherd.core.runner import run_experiment

CALLS: list[str] = []


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["cosine", "linear"] = "cosine"
    clip: float | None = 1.0
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    flag: bool = False
    least: float = 0.0
    colour: Colour = Colour.RED
    anything: Any = None

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("rate must not be negative")
        if self.rate < self.least:
            raise ValueError("rate must not be below least")


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    reads: tuple[str, ...] = ()
    inner: Inner = Inner()
    layers: tuple[Inner, ...] = (Inner(), Inner())
    count: int = 3
    fails: str = ""

    def run(self, context):
        CALLS.append(self.name)
        if self.fails == "bad":
            raise JaxherdError("the tokenizer is missing.")
        if self.fails == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.fails:
            raise KeyboardInterrupt
        context.folder.mkdir(parents=True, exist_ok=True)
        assert context.folder.is_absolute()
        for name, folder in context.artifacts.items():
            assert folder.is_absolute() and (folder / "out").read_text() == name
        (context.folder / "out").write_text(self.name)
        return {"count": self.count}


def experiment(**changes) -> Experiment:
    second = Step("tune", ("train",), **changes)
    return Experiment("tests/steps", "cpu", "cpu", (Step("train"), second, Step("end", ("tune",))))


def run(thing: Experiment, workdir: pathlib.Path, **options):
    CALLS.clear()
    return run_experiment(thing, workdir, target="cpu", devices=(), say=lambda _: None, **options)


def test_stages_run_in_order_and_once(tmp_path):
    assert run(experiment(), tmp_path)["tune"] == {"count": 3}
    assert CALLS == ["train", "tune", "end"]
    assert run(experiment(), tmp_path)["end"] == {"count": 3}
    assert CALLS == []
    assert (tmp_path / "report.md").exists()


def test_stages_are_given_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(experiment(), pathlib.Path("here"))["end"] == {"count": 3}
    assert (tmp_path / "here" / "end" / "out").read_text() == "end"


def test_goes_on_at_the_first_unfinished_stage(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(experiment(fails="stopped"), tmp_path)
    assert CALLS == ["train", "tune"]
    # The same settings, in a world where nothing interrupts.
    monkeypatch.setattr(Step, "__getattribute__", _never_fails)
    run(experiment(fails="stopped"), tmp_path)
    assert CALLS == ["tune", "end"]


def _never_fails(step, name):
    return "" if name == "fails" and CALLS[-1:] == ["tune"] else object.__getattribute__(step, name)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["tune.count=4"], "tune.count was 3 and is now 4"),
        (["inner.rate=0.5"], "inner.rate was 0.1 and is now 0.5"),
    ],
)
def test_other_settings_in_the_same_folder(tmp_path, change, sentence):
    run(experiment(), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(JaxherdError, match=f"belongs to another run: .*{sentence}"):
        run(experiment().with_overrides(change), tmp_path)
    with pytest.raises(JaxherdError, match="seed was 0 and is now 1"):
        run(experiment(), tmp_path, seed=1)
    assert CALLS == [] and sorted(tmp_path.rglob("*")) == before


def test_a_failed_start_leaves_nothing(tmp_path):
    workdir = tmp_path / "some" / "where"
    alone = Experiment("tests/bad", "cpu", "cpu", (Step("train", fails="bad"),))
    with pytest.raises(JaxherdError, match="tokenizer is missing"):
        run(alone, workdir)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(JaxherdError, match="is full: make room and run the same command"):
        run(experiment(fails="full"), tmp_path)
    assert (tmp_path / "train" / "done.json").exists()


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxherdError, match="workdir .* cannot be written .*--workdir"):
        run(experiment(), tmp_path / "file" / "inside")
    with pytest.raises(JaxherdError, match="cannot be written"):
        run(experiment(), pathlib.Path("/proc/jaxherd"))
    assert CALLS == []


def test_unreadable_record(tmp_path):
    run(experiment(), tmp_path)
    (tmp_path / "run.json").write_text('{"experiment": ')
    with pytest.raises(JaxherdError, match="run.json cannot be read"):
        run(experiment(), tmp_path)


@pytest.mark.parametrize(
    "stages, sentence",
    [
        ((), "at least one stage"),
        ((Step("a"), Step("a")), "two stages are called 'a'"),
        ((Step("a", ("b",)), Step("b")), "'a' reads 'b', which is no earlier stage"),
        ((3,), "3 is not a stage"),
    ],
)
def test_bad_stages(stages, sentence):
    with pytest.raises(JaxherdError, match=sentence):
        Experiment("tests/x", "cpu", "cpu", stages)


@pytest.mark.parametrize(
    "text, path, value",
    [
        ("train.inner.rate=2e-3", ("inner", "rate"), 2e-3),
        ("train.inner.kind=linear", ("inner", "kind"), "linear"),
        ("train.inner.clip=none", ("inner", "clip"), None),
        ("train.inner.clip=3", ("inner", "clip"), 3.0),
        ("train.inner.sizes=(4, 5,6)", ("inner", "sizes"), (4, 5, 6)),
        ("train.inner.sizes=", ("inner", "sizes"), ()),
        ("train.inner.pair=7,b", ("inner", "pair"), (7, "b")),
        ("train.inner.flag=true", ("inner", "flag"), True),
        ("train.inner.colour=BLUE", ("inner", "colour"), Colour.BLUE),
        ('train.inner.anything={"a": 1}', ("inner", "anything"), {"a": 1}),
        ("train.count=1_000", ("count",), 1000),
        ("train.count=1e3", ("count",), 1000),
        ("count=12345678901234567891", ("count",), 12345678901234567891),
    ],
)
def test_overrides_are_typed(text, path, value):
    found = experiment().with_overrides([text]).stage("train")
    for name in path:
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_overrides_inside_tuples_and_of_all_stages():
    changed = experiment().with_overrides(["train.layers.1.rate=5", "inner.flag=yes"])
    assert [x.rate for x in changed.stage("train").layers] == [0.1, 5.0]
    assert all(stage.inner.flag for stage in changed.stages)
    assert experiment().stage("train").layers[1].rate == 0.1


@pytest.mark.parametrize(
    "assignments, rates",
    [
        (("train.inner.rate=2", "train.inner.rate=3"), (3.0, 0.1)),
        # The first value is only possible after the second assignment, and yet it is the older one.
        (("inner.least=5", "train.inner.rate=5", "inner.rate=6"), (6.0, 6.0)),
        (("inner.least=5", "inner.rate=6", "train.inner.rate=5"), (5.0, 6.0)),
        (("train.inner.least=5", "train.inner.rate=7", "train.inner.rate=6"), (6.0, 0.1)),
        # What is given up is not looked at.
        (("train.inner.rate=fast", "inner.rate=2"), (2.0, 2.0)),
    ],
)
def test_the_last_of_several_values_wins_in_any_order(assignments, rates):
    for order in {assignments, tuple(sorted(assignments, key=lambda a: ".least" not in a))}:
        changed = experiment().with_overrides(order)
        assert tuple(changed.stage(name).inner.rate for name in ("train", "tune")) == rates


def test_an_early_value_that_waits_does_not_undo_a_later_one():
    """`layers.1.rate=9` is refused as long as nothing lowers `least`; the later 4 must stay."""
    start = experiment().with_overrides(["train.layers.1.rate=8", "train.layers.1.least=7"])
    changed = start.with_overrides(
        ["train.layers.1.rate=3", "train.layers.-1.rate=4", "train.layers.1.least=1"]
    )
    assert changed.stage("train").layers[1].rate == 4.0


def test_fields_are_what_can_be_set():
    fields = experiment().fields()
    assert fields["train.inner.rate"] == "0.1" and fields["tune.layers.1.clip"] == "1.0"
    assert fields["end.inner.sizes"] == "1,2" and fields["end.inner.colour"] == "RED"
    assert "train.inner.anything" not in fields and "train.inner" not in fields
    changed = experiment().with_overrides(["inner.rate=7", "inner.clip=none", "inner.sizes=4"])
    again = experiment().with_overrides([f"{k}={v}" for k, v in changed.fields().items()])
    assert again == changed != experiment()


@pytest.mark.parametrize("name", [entry.name for entry in catalog.entries()])
@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_the_fields_of_every_recipe_set_it_to_what_it_is(name, scale):
    thing = catalog.load(name, scale)
    fields = thing.fields()
    assert len(fields) > 50
    assert thing.with_overrides([f"{path}={value}" for path, value in fields.items()]) == thing


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("train.inner.rat=1", "Inner has no field 'rat'; did you mean 'rate'"),
        ("trian.inner.rate=1", "no stage or field 'trian'; did you mean 'train'"),
        ("train.inner.rate=fast", "wants a number"),
        ("train.count=1.5", "wants a whole number"),
        ("train.count=inf", "wants a whole number"),
        ("train.inner.kind=cosin", "did you mean 'cosine'"),
        ("train.inner.flag=maybe", "wants true or false"),
        ("train.inner.pair=1", "wants 2 values, got 1"),
        ("train.inner.colour=GREEN", "not a choice"),
        ("train.inner=3", "Inner cannot be given as text; set one of its fields"),
        ("train.layers.2.rate=1", "'2' is not an index below 2"),
        ("train.count.x=1", "'x' has no place inside a value of type int"),
        ("train.inner.rate=-1", "rate must not be negative"),
        ("train.inner.rate", "write path.to.field=value"),
        ("=3", "write path.to.field=value"),
    ],
)
def test_wrong_overrides(text, sentence):
    with pytest.raises(JaxherdError, match=sentence):
        experiment().with_overrides([text])


def test_parse_assignment_keeps_later_equals_signs():
    assert overrides.parse_assignment("a.b=c=d") == (("a", "b"), "c=d")


FILE = '''"""{}"""
from jaxherd.core.experiment import Experiment
class Stage:
    name, reads = "only", ()
    def run(self, context):
        return {{}}
def experiment(scale):
    return Experiment("{}", scale, "cpu", (Stage(),))
'''


def test_two_files_of_one_name_are_two_experiments(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(FILE.format(folder, folder))
    names = [catalog.load(str(tmp_path / f / "mine.py"), "cpu").name for f in ("a", "b")]
    assert names == ["a", "b"]


def test_catalog_answers_with_the_nearest_name(tmp_path):
    assert "llama4/scout" in {entry.name for entry in catalog.entries()}
    with pytest.raises(JaxherdError, match="did you mean 'llama4/scout'"):
        catalog.load("llama4/scuot", "cpu")
    with pytest.raises(JaxherdError, match="no experiment file"):
        catalog.load("nowhere.py", "cpu")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(JaxherdError, match=r"defines no experiment\(scale\)"):
        catalog.load(str(empty), "cpu")


def test_records_are_whole_or_old(tmp_path):
    from jaxherd.core.experiment import write_json

    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    class Bad:
        def __str__(self):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_json(path, {"a": Bad()})
    assert json.loads(path.read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1
