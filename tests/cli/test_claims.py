"""The verb `jaxherd claims`."""

import json
import sys
import textwrap

import pytest

from jaxherd.claims import ledger, table
from jaxherd.cli import claims_
from jaxherd.cli.main import main
from jaxherd.core import resources

SOURCE = """
    from jaxherd.claims.claim import Claim, Decision

    CLAIMS = (
        Claim(
            "paper/effect", "Ours wins.", "2.0 [TAG]", "Add up.", "score", (), (), {"a": 1.0},
            (0, 1, 2), ("ours",), lambda seed, arm, folder, say: {"score": seed + 1.0},
            lambda results, threshold: Decision("holds", ("met",), "1.0 to 3.0"),
        ),
    )
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / "experiments"
    (folder / "paper").mkdir(parents=True)
    (folder / "paper" / "claims.py").write_text(textwrap.dedent(SOURCE))
    (folder / "paper" / "README.md").write_text(f"{table.BEGIN}\n{table.END}\n")
    monkeypatch.setattr(resources, "folder", lambda name: folder)
    monkeypatch.chdir(tmp_path)
    # The verb gives tests' jax to nobody else.
    monkeypatch.setattr(claims_.common, "local_devices", lambda on: ())
    return folder


def shown(capsys):
    return json.loads(capsys.readouterr().out)


def test_table_before_and_after_a_run(root, capsys):
    assert main(["claims", "--json"]) == 0
    assert [row["verdict"] for row in shown(capsys)] == ["not run"]
    assert main(["claims", "paper/effect", "--run", "--json"]) == 0
    (row,) = shown(capsys)
    assert (row["verdict"], row["ours"], row["seeds"]) == ("holds", "1.0 to 3.0", 3)
    assert "| holds |" in (root / "paper" / "README.md").read_text()
    assert main(["claims"]) == 0
    text = capsys.readouterr().out
    assert "paper/effect" in text and "[TAG]" in text and "holds" in text


def test_stale_is_explained_and_nothing_is_wrapped(root, capsys):
    assert main(["claims", "paper/effect", "--run"]) == 0
    assert "stale" not in capsys.readouterr().out
    source = root / "paper" / "claims.py"
    long = "Ours wins" + ", and again" * 40 + "."
    source.write_text(source.read_text().replace("Ours wins.", long))
    for name in [name for name in sys.modules if name.endswith("paper.claims")]:
        del sys.modules[name]
    assert main(["claims", "--readme"]) == 0
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "paper/effect" in line]
    assert row.rstrip().endswith("stale") and "1.0 to 3.0" in row
    assert any(line.rstrip() == f" {long}".strip() or long in line for line in out.splitlines())
    assert f"stale: {ledger.STALE}" in out
    assert f"stale: {ledger.STALE}" in (root / "paper" / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["claims", "--help"])
    assert "stale" in capsys.readouterr().out


def test_an_installed_package_is_not_written_to(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resources, "installed", lambda: True)
    before = sorted(root.rglob("*"))
    assert main(["claims", "paper/effect", "--run", "--json"]) == 0
    captured = capsys.readouterr()
    assert "records are written to runs/claims/records" in captured.err
    assert [row["verdict"] for row in json.loads(captured.out)] == ["holds"]
    assert (tmp_path / "runs/claims/records/paper/records/effect.json").is_file()
    assert [p for p in sorted(root.rglob("*")) if "__pycache__" not in p.parts] == before
    assert main(["claims", "--readme"]) == 2
    assert "checkout" in capsys.readouterr().err
    # From a checkout, however deep in it, the record goes where it is committed.
    (tmp_path / "jaxherd" / "core").mkdir(parents=True)
    (tmp_path / "jaxherd" / "core" / "resources.py").write_text("")
    monkeypatch.chdir(root / "paper")
    assert main(["claims", "paper/effect", "--run"]) == 0
    assert (root / "paper" / "records" / "effect.json").is_file()
    assert "| holds |" in (root / "paper" / "README.md").read_text()


def test_where_a_checkout_is(tmp_path, monkeypatch):
    assert not resources.installed() or "site-packages" in str(resources.folder("experiments"))
    monkeypatch.chdir(tmp_path)
    assert resources.checkout() is None


def test_readme_is_written_from_records(root, capsys):
    assert main(["claims", "--readme"]) == 0
    assert "| not run |" in (root / "paper" / "README.md").read_text()


def test_mistakes_are_one_sentence(root, capsys):
    assert main(["claims", "paper/efect"]) == 2
    assert "did you mean 'paper/effect'" in capsys.readouterr().err
    assert main(["claims", "--run"]) == 2
    assert "name the claims to run" in capsys.readouterr().err
