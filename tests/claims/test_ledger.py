"""The ledger with claims that train nothing."""

import dataclasses
import json
import textwrap

import pytest

from jaxherd.claims import ledger, table
from jaxherd.claims.claim import Claim, Decision
from jaxherd.core.errors import JaxherdError


def decide(results, threshold):
    margins = [
        results["ours"][seed]["score"] - results["base"][seed]["score"] for seed in results["ours"]
    ]
    verdict = "holds" if min(margins) > threshold["margin"] else "does not hold"
    return Decision(verdict, (f"least margin {min(margins):.2f}",), f"{min(margins):.2f}")


class Runs:
    """Records what was run; may be told to stop."""

    def __init__(self):
        self.done, self.stop_at = [], None

    def __call__(self, seed, arm, folder, say):
        if (arm, seed) == self.stop_at:
            raise KeyboardInterrupt
        self.done.append((arm, seed))
        return {"score": seed + (2.5 if arm == "ours" else 0.0)}


def make(run=None, **changes):
    fields = dict(
        id="paper/effect",
        statement="Ours | beats the baseline.",
        paper_figure="2.0 [TAG]",
        protocol="Add up.",
        metric="score",
        baselines=("base",),
        controls=(),
        threshold={"margin": 2.0},
        seeds=(0, 1, 2),
        arms=("ours", "base"),
        run=run or Runs(),
        decide=decide,
    )
    return Claim(**(fields | changes))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "experiments"
    (folder / "paper").mkdir(parents=True)
    return folder


def run(claim, root, **options):
    return ledger.run_claim(
        claim, root.parent / "work", root=root, say=lambda text: None, **options
    )


def test_record_holds_numbers_spread_and_verdict(root):
    claim = make()
    record = run(claim, root)
    assert record["verdict"] == "holds"
    assert record["spread"]["ours"]["score"] == {"mean": 3.5, "min": 2.5, "max": 4.5}
    assert record["results"]["base"]["2"] == {"score": 2.0}
    assert record == ledger.read_record(claim, root)
    assert ledger.status(claim, record) == "holds"
    for field in ("versions", "date", "command", "threshold", "protocol_hash", "seconds"):
        assert record[field] or field == "seconds"


def test_interrupted_run_goes_on_with_what_is_missing(root):
    runs = Runs()
    runs.stop_at = ("base", 1)
    with pytest.raises(KeyboardInterrupt):
        run(make(runs), root)
    assert runs.done == [("ours", 0), ("base", 0), ("ours", 1)]
    assert ledger.read_record(make(runs), root) is None
    runs.done, runs.stop_at = [], None
    run(make(runs), root)
    assert runs.done == [("base", 1), ("ours", 2), ("base", 2)]
    runs.done = []
    run(make(runs), root)
    assert runs.done == []


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": {"margin": 1.0}},
        {"protocol": "Add up twice."},
        {"seeds": (0, 1, 3)},
        {"settings": {"steps": 3}},
    ],
)
def test_changed_protocol_makes_a_record_stale_and_runs_anew(root, change):
    claim = make()
    record = run(claim, root)
    runs = Runs()
    changed = make(runs, **change)
    assert ledger.status(changed, record) == "stale"
    run(changed, root)
    assert len(runs.done) == 6
    assert ledger.status(changed, ledger.read_record(changed, root)) != "stale"


def config(default: int, *more) -> type:
    fields = [("steps", int), ("rows", int, default), *more]
    return dataclasses.make_dataclass("Config", fields, frozen=True)


NOW = config(8)(3)


@pytest.mark.parametrize(
    ("later", "current"),
    [
        (config(8)(3), True),
        (config(8, ("option", bool, False))(3), True),
        (config(8, ("option", bool, False))(3, 8, True), False),
        (config(8)(4), False),
        # The same words in the recipe, another value in the run.
        (config(16)(3), False),
        (dataclasses.make_dataclass("Config", [("steps", int)])(3), False),
        (dataclasses.make_dataclass("Other", [("steps", int), ("rows", int, 8)])(3), False),
    ],
)
def test_every_value_counts(root, later, current):
    record = run(make(settings={"arm": NOW}), root)
    claim = make(settings={"arm": later})
    assert (ledger.status(claim, record) != "stale") == current
    same = vars(later) == vars(NOW) and type(later).__name__ == "Config"
    assert (claim.protocol_hash() == record["protocol_hash"]) == same


def test_a_record_whose_protocol_was_edited_is_stale(root):
    claim = make(settings={"arm": NOW})
    record = run(claim, root)
    changed = make(settings={"arm": config(16)(3)})
    record["settings"]["arm"]["rows"] = 16
    assert ledger.status(changed, record) == "stale"


def test_threshold_decides(root):
    assert run(make(threshold={"margin": 2.6}), root)["verdict"] == "does not hold"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "Effect"}, "<paper>/<name>"),
        ({"seeds": (0, 1, 1)}, "three different seeds"),
        ({"controls": ("nothing",)}, "none of its arms"),
        ({"threshold": {}}, "no threshold"),
    ],
)
def test_bad_claims_are_refused(change, message):
    with pytest.raises(JaxherdError, match=message):
        make(**change)


def test_result_that_is_no_number_is_refused_and_not_kept(root):
    claim = make(lambda *_: {"score": "high"})
    with pytest.raises(JaxherdError, match="no number"):
        run(claim, root)
    assert not list(root.parent.rglob("result.json"))
    with pytest.raises(JaxherdError, match="no number"):
        run(make(lambda *_: {"score": float("nan")}), root)


def test_damaged_record_is_one_clear_error(root):
    path = ledger.record_path(make(), root)
    path.parent.mkdir()
    for text in ("{", json.dumps({"claim": "paper/other", "verdict": "holds"})):
        path.write_text(text)
        with pytest.raises(JaxherdError, match="effect.json"):
            ledger.read_record(make(), root)


def test_choose_answers_a_mistyped_name():
    claims = {"paper/effect": make()}
    assert ledger.choose(claims, ()) == [claims["paper/effect"]]
    with pytest.raises(JaxherdError, match="did you mean 'paper/effect'"):
        ledger.choose(claims, ("paper/efect",))


SOURCE = """
    from jaxherd.claims.claim import Claim, Decision
    CLAIMS = (Claim("{id}", "s", "p", "t", "m", (), (), {{"a": 1.0}}, (0, 1, 2), ("x",),
        lambda *_: {{"v": 1.0}}, lambda r, t: Decision("holds", (), "1")),)
"""


def test_discover_finds_claims_and_refuses_a_foreign_one(root, tmp_path):
    path = root / "paper" / "claims.py"
    path.write_text(textwrap.dedent(SOURCE.format(id="paper/one")))
    assert list(ledger.discover(root)) == ["paper/one"]
    other = tmp_path / "other"
    (other / "paper").mkdir(parents=True)
    (other / "paper" / "claims.py").write_text("CLAIMS = ()\n")
    with pytest.raises(JaxherdError, match="CLAIMS"):
        ledger.discover(other)
    foreign = tmp_path / "foreign" / "paper"
    foreign.mkdir(parents=True)
    (foreign / "claims.py").write_text(textwrap.dedent(SOURCE.format(id="elsewhere/one")))
    with pytest.raises(JaxherdError, match="another paper"):
        ledger.discover(foreign.parent)


def test_readme_table_is_replaced_between_its_markers(root):
    claim = make()
    readme = root / "paper" / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.write_readme("paper", [claim], root)
    assert "not run" in readme.read_text() and "old" not in readme.read_text()
    run(claim, root)
    assert table.write_readme("paper", [claim], root, check=True)
    assert "not run" in readme.read_text()
    table.write_readme("paper", [claim], root)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| `paper/effect`: Ours \\| beats the baseline. | 2.0 [TAG] | 2.50 | 3 | holds |" in text
    assert not table.write_readme("paper", [claim], root)
    assert "stale" in table.markdown(
        table.rows([dataclasses.replace(claim, protocol="other")], root)
    )


def test_readme_without_markers_is_refused():
    with pytest.raises(JaxherdError, match="once each"):
        table.with_table("no markers", "table")
