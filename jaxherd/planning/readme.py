"""The table of committed plans in `tpu/README.md`, between two markers."""

from pathlib import Path

from jaxherd.core import marked_text
from jaxherd.planning.render import table_row
from jaxherd.planning.report import Plan

BEGIN = "<!-- plans: begin (written by `jaxherd plan --readme`) -->"
END = "<!-- plans: end -->"
HEADER = (
    "| plan | chips | fits | HBM GiB a chip | of | step (estimate) "
    "| exposed / ideal collective time | non-matmul share |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table(plans: Path) -> str:
    """Return the table of the plans in a folder, a row each, by name.

    Raises:
        JaxherdError: a file that is no plan.
    """
    files = sorted(plans.glob("*.json"))
    rows = [table_row(f.stem, Plan.from_json(f.read_text(encoding="utf-8"))) for f in files]
    return "\n".join([HEADER, *rows])


def write_readme(folder: Path, *, check: bool = False) -> bool:
    """Bring the table in `<folder>/README.md` up to date; returns whether it had to change.

    Args:
        folder: `tpu` of a checkout, with the plans in `plans/`.
        check: only look.
    Raises:
        JaxherdError: a file that is no plan, or a README without the markers.
    """
    inside = table(folder / "plans")
    return marked_text.update(folder / "README.md", BEGIN, END, inside, check=check)
