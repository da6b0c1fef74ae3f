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

    A verdict is holds, does not hold or inconclusive; "not run" without a record; and stale where
    the claim's protocol (text, threshold, seeds, any value of a config) has changed since its record
    was made, so that the figures shown are those of the older protocol.
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

    root, records = _places(workdir, run, readme)
    claims = ledger.discover(root)
    chosen = ledger.choose(claims, ids)
    if run and not ids:
        raise JaxherdError(f"--run: name the claims to run, among {', '.join(claims)}.")
    if run:
        from jaxherd.training.stopping import Interrupted

        try:
            for claim in chosen:
                ledger.run_claim(claim, workdir, root=records, say=_log)
        except Interrupted as stopped:
            _log(str(stopped))
            return stopped.exit_status
    if (run or readme) and records == root:
        for paper in dict.fromkeys(claim.paper for claim in chosen):
            table.write_readme(paper, claims.values(), root)
    shown = table.rows(chosen, records)
    if json:
        print(json_lib.dumps(shown, indent=2))
        return 0
    _print(shown)
    return 0


def _places(workdir: Path, run: bool, readme: bool) -> tuple[Path, Path]:
    """Return where the claims are and where their records are, or will be written.

    Both are a checkout's `experiments`, where there is one: an installed package is not written to.

    Raises:
      JaxherdError: a README is to be written and there is no checkout.
    """
    from jaxherd.core import resources

    root, place = resources.folder("experiments"), resources.in_checkout("experiments")
    if place is not None:
        return place, place
    if not run:
        if readme:
            raise JaxherdError("--readme writes into a checkout of jaxherd: start it in one.")
        return root, root
    _log(f"no checkout of jaxherd here: records are written to {workdir / 'records'}")
    return root, workdir / "records"


def _log(text: str) -> None:
    import sys

    # Standard output carries the table, or JSON, alone.
    print(text, file=sys.stderr, flush=True)


def _print(rows) -> None:
    from rich.table import Table

    from jaxherd.claims import ledger

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
    common.console().print(table)
    if any(row["verdict"] == "stale" for row in rows):
        print(f"stale: {ledger.STALE}")


if __name__ == "__main__":
    import sys

    sys.exit(tyro.cli(main))
