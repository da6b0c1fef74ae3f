"""Needle in a haystack: whether a model finds one sentence in a long text, by length and depth.

Every cell of the grid (length, depth) is asked with several needles; a needle is found where its answer
stands in what the model says, as a word of its own.  Results are a line of JSON each and kept as they come,
so that a stopped run goes on.  Lengths are checked before anything runs: the cache of one prompt must fit
into memory.
"""

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import write_json
from jaxherd.core.host_memory import available_bytes
from jaxherd.core.modules import abstract
from jaxherd.core.platform import platform
from jaxherd.core.reports import Report
from jaxherd.data.haystack import Haystack, HaystackPrompts, magic_number
from jaxherd.inference.generate import Generator
from jaxherd.inference.requests import Request, bucket

LINES, TABLE, SUMMARY, PLOT = "answers.jsonl", "needle.csv", "needle.json", "needle.png"
# Of the memory that is free: activations and copies need some as well.
_SHARE = 0.7


@dataclasses.dataclass(frozen=True)
class NeedleGrid:
    """What is asked.

    Attributes:
      lengths: tokens of a prompt and its answer.
      depths: places of the needle in the text, from 0 to 1.
      needles: different ones for every cell.
      haystack: the text.
      chat: ask in the tokenizer's chat format.
      max_new_tokens: of an answer.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needles: int = 3
    haystack: Haystack = Haystack()
    chat: bool = False
    max_new_tokens: int = 16

    def __post_init__(self):
        if not self.lengths or not self.depths or self.needles < 1 or self.max_new_tokens < 1:
            raise JaxherdError(
                "a grid needs lengths, depths, needles and new tokens, one at least."
            )
        if len(set(self.lengths)) < len(self.lengths) or len(set(self.depths)) < len(self.depths):
            raise JaxherdError("a length or a depth is named twice: name each once.")
        if min(self.lengths) <= self.max_new_tokens:
            raise JaxherdError(
                f"a length of {min(self.lengths)} tokens leaves nothing beside an answer of "
                f"{self.max_new_tokens}."
            )
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise JaxherdError(f"a depth must lie from 0 to 1, got {depth}.")


@dataclasses.dataclass(frozen=True)
class Found:
    """One answer: its cell, the number of its needle, what the model said, whether that is right."""

    length: int
    depth: float
    needle: int
    said: str
    right: bool


def is_found(said: str, answer: str) -> bool:
    """Return whether an answer stands in a text as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said) is not None


def cache_bytes(module: Any, length: int) -> int:
    """Return the bytes of the cache that generation to `length` tokens holds."""
    config = module.config
    capacity = min(bucket(length, 128), config.max_length)
    leaves = abstract(lambda m: jax.tree.leaves(m.init_cache(1, capacity)), module)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def check_lengths(module: Any, lengths: Sequence[int], free: int | None = None) -> None:
    """Raise a JaxherdError if the model does not reach so far, or the memory does not.

    Args:
      module: a decoder.
      lengths: tokens of prompts and answers.
      free: bytes that there are; those that are free now when None, where that can be told.
    """
    longest, reach = max(lengths), module.config.max_length
    if longest > reach:
        raise JaxherdError(f"a length of {longest} is more than the model's {reach}: lower it.")
    free = _free_bytes() if free is None else free
    needed = cache_bytes(module, longest)
    if free is None or needed <= _SHARE * free:
        return
    fitting = [n for n in (2**k for k in range(7, 30)) if n < longest]
    fitting = [n for n in fitting if cache_bytes(module, n) <= _SHARE * free]
    hint = f"{fitting[-1]} would fit" if fitting else "no length would fit"
    raise JaxherdError(
        f"the cache of {longest} tokens takes {needed / 2**30:.2f} GiB and {free / 2**30:.2f} are free: "
        f"{hint}."
    )


def _free_bytes() -> int | None:
    if platform() == "cpu":
        return available_bytes()
    stats = jax.local_devices()[0].memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use")
    return None if limit is None or used is None else limit - used


def run_grid(
    module: Any,
    tokenizer: Any,
    grid: NeedleGrid,
    folder: Path,
    *,
    about: str = "",
    stop_ids: Sequence[int] | None = None,
    report: Report | None = None,
    make_generator: Callable[..., Any] = Generator,
) -> list[Found]:
    """Ask every needle of a grid and write lines, table, summary and heat map into a folder.

    Args:
      module, tokenizer: the model.
      grid: what is asked.
      folder: of the results; one with results of the same grid and model goes on.
      about: the model's name, for the title and against mixing models.
      stop_ids: end an answer; the tokenizer's when None.
      report: is told how far the work is.
      make_generator: for tests.
    Raises:
      JaxherdError: a length that does not fit, or a folder of another grid or model.
      MissingExtraError: matplotlib is not installed (before anything runs).
    """
    from jaxherd.training.plots import new_figure

    new_figure()
    check_lengths(module, grid.lengths)
    settings = {"model": about, "grid": _plain(grid), "haystack": grid.haystack.fingerprint()}
    done = _begun(folder, settings)
    prompts = HaystackPrompts(grid.haystack, tokenizer, chat=grid.chat)
    cells = [
        (length, depth, number)
        for length in sorted(grid.lengths)
        for depth in grid.depths
        for number in range(grid.needles)
    ]
    # All prompts are made before the first is asked: a length without room is told now.
    made = {
        cell: prompts.prompt(cell[0] - grid.max_new_tokens, cell[1], _needle(cell))
        for cell in cells
        if cell not in done
    }
    generator = make_generator(module, tokenizer, stop_ids=stop_ids) if made else None
    with (folder / LINES).open("a", encoding="utf-8") as file:
        for count, cell in enumerate(cells, 1):
            if cell not in done:
                assert generator is not None
                request = Request(tuple(made[cell]), grid.max_new_tokens)
                said = generator.run([request])[0].text or ""
                done[cell] = Found(*cell, said, is_found(said, _needle(cell).answer))
                file.write(json.dumps(dataclasses.asdict(done[cell])) + "\n")
                file.flush()
            if report is not None:
                report("needles asked", count, len(cells))
    found = [done[cell] for cell in cells]
    _write(folder, grid, found, settings)
    return found


def _needle(cell: tuple[int, float, int]):
    length, depth, number = cell
    return magic_number(hash_cell(length, depth, number))


def hash_cell(length: int, depth: float, number: int) -> int:
    """Return the seed of a cell's needle: no two cells share one, so that no answer can be guessed."""
    return (length * 1_000_003 + round(depth * 10_000)) * 1009 + number


def shares(grid: NeedleGrid, found: Sequence[Found]) -> Float[np.ndarray, "D L"]:
    """Return the share of needles found, by depth and length in the grid's order."""
    table = np.zeros((len(grid.depths), len(grid.lengths)))
    for one in found:
        table[grid.depths.index(one.depth), grid.lengths.index(one.length)] += one.right
    return table / grid.needles


def _plain(grid: NeedleGrid) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(grid)))


def _begun(folder: Path, settings: dict[str, Any]) -> dict[tuple[int, float, int], Found]:
    """Return the answers that are there; raises JaxherdError if they belong to something else."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != settings:
            raise JaxherdError(
                f"{str(folder)!r} has the results of another grid or model: name another folder."
            )
    elif (folder / LINES).exists():
        raise JaxherdError(
            f"{str(folder)!r} has answers and no settings.json: name another folder."
        )
    else:
        write_json(path, settings)
    done = {}
    lines = folder / LINES
    if lines.exists():
        data = lines.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a killed run may leave half a line
        for line in whole.splitlines():
            one = Found(**json.loads(line))
            done[one.length, one.depth, one.needle] = one
        if len(whole) < len(data):
            lines.write_bytes(whole)
    return done


def _write(
    folder: Path, grid: NeedleGrid, found: Sequence[Found], settings: dict[str, Any]
) -> None:
    table = shares(grid, found)
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["depth", *grid.lengths])
        writer.writerows([depth, *row] for depth, row in zip(grid.depths, table.tolist()))
    write_json(
        folder / SUMMARY,
        {**settings, "found": float(table.mean()), "by_length": dict(
            zip(map(str, grid.lengths), table.mean(axis=0).tolist())
        ), "by_depth": dict(zip(map(str, grid.depths), table.mean(axis=1).tolist()))},
    )  # fmt: skip
    draw(folder / PLOT, grid, table, str(settings["model"]))


def draw(path: Path, grid: NeedleGrid, table: Float[np.ndarray, "D L"], model: str) -> None:
    """Draw the heat map: lengths from left to right, depths downwards, shares as colour and number."""
    from jaxherd.training.plots import new_figure

    order = np.argsort(grid.lengths), np.argsort(grid.depths)
    table = table[order[1]][:, order[0]]
    figure, axes = new_figure(
        max(4.2, 1.6 + 0.9 * len(grid.lengths)), max(2.6, 1.6 + 0.45 * len(grid.depths))
    )
    axes.grid(False)
    image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (row, column), share in np.ndenumerate(table):
        # The scale is dark at both of its ends.
        ink = "black" if 0.2 < share < 0.8 else "white"
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(grid.lengths)), [f"{grid.lengths[i]:,}" for i in order[0]])
    axes.set_yticks(range(len(grid.depths)), [f"{grid.depths[i]:.0%}" for i in order[1]])
    axes.set(xlabel="tokens", ylabel="depth of the needle", title=f"needles found\n{model}")
    figure.colorbar(image, ax=axes, label=f"share of {grid.needles}")
    figure.savefig(path)
