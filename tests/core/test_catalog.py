"""Recipes of other folders, such as another checkout's, may import the files beside them."""

import pytest

from jaxherd.core import catalog


def test_a_file_imports_its_neighbour_wherever_it_lies(tmp_path):
    for name, value in (("one", 1), ("two", 2)):
        folder = tmp_path / name / "experiments" / "paper"
        folder.mkdir(parents=True)
        (folder / "recipe.py").write_text(f"VALUE = {value}\n")
        (folder / "claims.py").write_text("from . import recipe\nSEEN = recipe.VALUE\n")
    found = [
        catalog.load_file(tmp_path / name / "experiments" / "paper" / "claims.py").SEEN
        for name in ("one", "two")
    ]
    assert found == [1, 2]


def test_an_error_in_a_recipe_is_its_own(tmp_path):
    (tmp_path / "broken.py").write_text("raise KeyError('mine')\n")
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            catalog.load_file(tmp_path / "broken.py")
