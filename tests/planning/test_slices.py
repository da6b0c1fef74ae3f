"""The committed table of slices is the one the chip table gives."""

from pathlib import Path

from jaxherd.planning.slices import slices_markdown


def test_committed_table_is_current():
    committed = Path(__file__).parents[2] / "tpu" / "slices.md"
    assert committed.read_text() == slices_markdown()
