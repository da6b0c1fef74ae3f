"""The notebook melodyflow: the pair is in step, and every cell runs."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import run_notebook


def test_pair_is_in_step():
    run_notebook.check_pair("melodyflow")


def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    run_notebook.run_all_cells("melodyflow", tmp_path, {"image/png": 6, "audio/wav": 10})
