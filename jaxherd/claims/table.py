"""The table of claims, for the terminal and between two markers of a paper's README."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxherd.claims import ledger
from jaxherd.claims.claim import Claim
from jaxherd.core import marked_text, resources

BEGIN = "<!-- claims: begin (written by `jaxherd claims --readme`) -->"
END = "<!-- claims: end -->"
COLUMNS = ("claim", "paper", "ours", "seeds", "verdict")


def rows(claims: Iterable[Claim], root: Path | None = None) -> list[dict[str, Any]]:
    """Return one row a claim, from its record if there is one."""
    return [_row(claim, ledger.read_record(claim, root)) for claim in claims]


def _row(claim: Claim, record: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "id": claim.id,
        "claim": claim.statement,
        "paper": claim.paper_figure,
        "ours": record["ours"] if record else "",
        "seeds": len(record["seeds"]) if record else len(claim.seeds),
        "verdict": ledger.status(claim, record),
        "reasons": record["reasons"] if record else [],
        "figure": record.get("figure") if record else None,
        "date": record["date"] if record else None,
    }


def markdown(table: Iterable[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table, followed by reasons and figures."""
    table = list(table)
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for row in table:
        cells = [f"`{row['id']}`: {row['claim']}", *(str(row[name]) for name in COLUMNS[1:])]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    if any(row["verdict"] == "stale" for row in table):
        lines += ["", f"stale: {ledger.STALE}"]
    for row in table:
        if row["reasons"]:
            lines += ["", f"`{row['id']}`, {row['date']}, condition by condition:", ""]
            lines += [f"- {reason}" for reason in row["reasons"]]
        if row["figure"]:
            lines += ["", f"![{row['id']}]({ledger.RECORDS}/{row['figure']})"]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def with_table(text: str, table: str, *, name: str = "README.md") -> str:
    """Return the text with what is between the markers replaced.

    Raises:
      JaxherdError: the markers are not there, once each and in order.
    """
    return marked_text.replaced(text, BEGIN, END, table, name=name)


def write_readme(
    paper: str, claims: Iterable[Claim], root: Path | None = None, *, check: bool = False
) -> bool:
    """Bring the table in `<paper>/README.md` up to date; returns whether it had to change.

    Args:
      paper: the folder's name.
      claims: of any papers; those of this one count.
      root: see `ledger.discover`.
      check: only look.
    """
    root = resources.folder("experiments") if root is None else root
    chosen = [claim for claim in claims if claim.paper == paper]
    path, inside = root / paper / "README.md", markdown(rows(chosen, root))
    return marked_text.update(path, BEGIN, END, inside, check=check)
