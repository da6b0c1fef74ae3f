"""`jaxherd list`: experiments by paper, with scales and targets."""

import json as json_lib
from typing import Any

from jaxherd.cli import common
from jaxherd.core import catalog
from jaxherd.core.experiment import SCALES


def main(json: common.Json = False) -> int:
    """List the experiments that come with jaxherd.

    Args:
        json: print JSON instead of a table.
    """
    rows = [_row(entry) for entry in catalog.entries()]
    if json:
        print(json_lib.dumps(rows, indent=2))
        return 0
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for title in ("experiment", *SCALES, "what"):
        table.add_column(title, overflow="fold")
    for row in rows:
        cells = [
            f"{row['scales'][scale]['target']}\n{_short(row['scales'][scale]['parameters'])}"
            for scale in SCALES
        ]
        table.add_row(row["experiment"], *cells, row["summary"])
    common.console().print(table)
    return 0


def _row(entry: catalog.Entry) -> dict[str, Any]:
    scales = {}
    for scale in SCALES:
        experiment = catalog.load(entry.name, scale)
        models = [s.model.num_params() for s in experiment.stages if hasattr(s, "model")]
        scales[scale] = {
            "target": experiment.target,
            "stages": [stage.name for stage in experiment.stages],
            "parameters": max(models, default=0),
        }
    return {"experiment": entry.name, "summary": entry.summary, "scales": scales}


def _short(count: int) -> str:
    for limit, suffix in ((1e9, "B"), (1e6, "M")):
        if count >= limit:
            return f"{count / limit:.1f}{suffix}"
    return str(count)
