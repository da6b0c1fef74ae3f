"""Notebooks: the pair is in step, and every cell runs."""

import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
# What must come out of a notebook: pictures, and players of sound.
OUTPUTS = {"llama4": {"image/png": 2}, "melodyflow": {"image/png": 6, "audio/wav": 10}}


def _cells(path: pathlib.Path) -> list[tuple[str, str]]:
    jupytext = pytest.importorskip("jupytext")
    return [(c.cell_type, c.source.strip()) for c in jupytext.read(path).cells if c.source.strip()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_pair_is_in_step(script):
    """`jupytext --to ipynb notebooks/NAME.py` renews the notebook."""
    assert _cells(script) == _cells(script.with_suffix(".ipynb"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_cell_runs(script, tmp_path, monkeypatch):
    """In a kernel of its own, as a user would run it; figures and players must come out."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    client.NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    for kind, least in OUTPUTS[script.stem].items():
        assert outputs.count(kind) >= least, kind
