"""What the tests of notebooks share; a file for each, so that they can run side by side."""

import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"


def _cells(path: pathlib.Path) -> list[tuple[str, str]]:
    jupytext = pytest.importorskip("jupytext")
    return [(c.cell_type, c.source.strip()) for c in jupytext.read(path).cells if c.source.strip()]


def check_pair(name: str) -> None:
    """Assert that script and notebook are in step; `jupytext --to ipynb notebooks/NAME.py` renews."""
    script = FOLDER / f"{name}.py"
    assert _cells(script) == _cells(script.with_suffix(".ipynb"))


def run_all_cells(name: str, folder: pathlib.Path, outputs: dict[str, int]) -> None:
    """Run it in a kernel of its own, as a user would; at least so many outputs must come out."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client.NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    found = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    for kind, least in outputs.items():
        assert found.count(kind) >= least, kind
