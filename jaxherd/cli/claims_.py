"""`jaxherd claims`: the papers' claims, what was tried and what came out."""

import json as json_lib
from pathlib import Path

import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError


def main(
    ids: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    run: bool = False,
    json: common.Json = False,
    readme: bool = False,
    workdir: Path = Path("runs/claims"),
) -> int:
    """Show the ledger of claims, or run the named ones.

    Example: jaxherd claims llama4/irope-length --run

    Args:
        ids: `<paper>/<name>`; all claims if none is named.
        run: train every arm and seed that has no result yet, decide and write the record, its
            figure and the paper's README table; the same command resumes.
        json: print JSON instead of a table.
        readme: write the README tables from the records.
        workdir: results of finished arms and seeds are kept here.
    """
    if run:
        # With libtpu installed and no TPU, jax would look for one; protocols are for CPU.
        common.local_devices("cpu")
    from jaxherd.claims import ledger, table

    claims = ledger.discover()
    chosen = ledger.choose(claims, ids)
    if run and not ids:
        raise JaxherdError(f"--run: name the claims to run, among {', '.join(claims)}.")
    if run:
        from jaxherd.training.stage import Interrupted

        try:
            for claim in chosen:
                ledger.run_claim(claim, workdir, say=_log)
        except Interrupted as stopped:
            _log(str(stopped))
            return 143
    if run or readme:
        for paper in dict.fromkeys(claim.paper for claim in chosen):
            table.write_readme(paper, claims.values())
    shown = table.rows(chosen)
    if json:
        print(json_lib.dumps(shown, indent=2))
        return 0
    _print(shown)
    return 0


def _log(text: str) -> None:
    import sys

    # Standard output carries the table, or JSON, alone.
    print(text, file=sys.stderr, flush=True)


def _print(rows) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 1, 0))
    for title in ("claim", "paper's figure", "ours", "seeds", "verdict"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(
            f"[bold]{row['id']}[/bold]\n{row['claim']}",
            row["paper"].replace("[", "\\["),
            row["ours"],
            str(row["seeds"]),
            row["verdict"],
        )
    Console().print(table)


if __name__ == "__main__":
    import sys

    sys.exit(tyro.cli(main))
