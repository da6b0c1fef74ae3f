"""Where metrics go: a JSONL file (the record), TensorBoard, optionally W&B, and the terminal."""

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxherd.core.errors import JaxherdError, missing_extra

LOGGERS = ("jsonl", "tensorboard", "wandb")


@runtime_checkable
class Logger(Protocol):
    """Takes one record of numbers a call."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Record `values` of this step; `kind` is "train" or "eval"."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class JsonLines:
    """One JSON object a line: `{"kind", "step", name: value, ...}`; arrays become lists.

    On opening, records after `resume_step` and a line cut short by a kill are removed, so that
    the file always tells one uninterrupted run.  A record that is already there is not repeated:
    a run that was killed after its last checkpoint evaluates again, to the same numbers.
    """

    def __init__(self, path: Path, *, resume_step: int = 0):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_records(path) if record["step"] <= resume_step]
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        os.replace(partial, path)
        self._written = {(record["kind"], record["step"]) for record in kept}
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the run's length)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one record."""
        if (kind, step) in self._written:
            return
        record = {"kind": kind, "step": step, **{k: _plain(v) for k, v in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars as TensorBoard events; needs the extra `report`.

    What is not finite (a mean over nothing, such as the loss of a batch without weight) is left out.
    Events after `resume_step` of an earlier run are hidden; those of that very step are written
    once more by a run that evaluates there again, to the same numbers.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboardX", "report", "writing TensorBoard events") from error
        self._writer = SummaryWriter(
            str(folder), purge_step=resume_step + 1 if resume_step else None
        )

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write every scalar."""
        for name, value in values.items():
            plain = np.ndim(value) == 0 and isinstance(value, int | float | np.number)
            if plain and math.isfinite(value):
                self._writer.add_scalar(f"{kind}/{name}", float(value), step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """Weights & Biases; needs the extra `wandb`."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise missing_extra("wandb", "wandb", "logging to Weights & Biases") from error
        # A resumed run goes on in the same W&B run.
        kept = folder / "wandb_id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project="jaxherd",
            name=name,
            dir=str(folder),
            config=dict(config),
            id=kept.read_text().strip(),
            resume="allow",
        )

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Log every scalar."""
        scalars = {f"{kind}/{k}": float(v) for k, v in values.items() if np.ndim(v) == 0}
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def check_loggers(kinds: tuple[str, ...]) -> None:
    """Raise `MissingExtraError` for a logger that was asked for and cannot be had."""
    if "wandb" in kinds and importlib.util.find_spec("wandb") is None:
        raise missing_extra("wandb", "wandb", "logging to Weights & Biases")


def open_loggers(
    kinds: tuple[str, ...],
    folder: Path,
    *,
    name: str,
    config: Mapping[str, Any],
    resume_step: int,
    say: Callable[[str], None] = print,
) -> list[Logger]:
    """Return the loggers of a run.

    "tensorboard" stands in the default of every run, so it is left out, and that is said, where
    its package is not installed.

    Raises:
      JaxherdError: an unknown kind.
    """
    loggers: list[Logger] = []
    for kind in kinds:
        if kind == "jsonl":
            loggers.append(JsonLines(folder / "metrics.jsonl", resume_step=resume_step))
        elif kind == "tensorboard":
            if importlib.util.find_spec("tensorboardX") is not None:
                loggers.append(TensorBoard(folder / "tensorboard", resume_step=resume_step))
            else:
                say("no TensorBoard events: they need `pip install 'jaxherd[report]'`.")
        elif kind == "wandb":
            loggers.append(WandB(name, folder, config))
        else:
            raise JaxherdError(f"no logger {kind!r}: choose among jsonl, tensorboard, wandb.")
    return loggers


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL log, up to a line that was cut short."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                return
            if isinstance(record, dict) and "step" in record:
                yield record


def _plain(value: Any) -> Any:
    array = np.asarray(value)
    if array.ndim:
        return [_plain(item) for item in array]
    item = array.item()
    # JSON has no NaN: null marks what is no number, such as the loss of a step that went wrong.
    return None if isinstance(item, float) and not math.isfinite(item) else item
