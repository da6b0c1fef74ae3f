"""What a training stage tells afterwards: a Markdown section with plots, from its own log."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxherd.training import plots
from jaxherd.training.loggers import read_records

# Metrics of routing and guards have plots of their own, or say little in a table.
_HIDDEN = ("expert_load", "guard/", "balance", "router_z")
_SAMPLED = "sampled for training"


def stage_report(stage: Any, folder: Path) -> str:
    """Return the section of `report.md` for a stage whose `metrics.jsonl` is in `folder`."""
    records = list(read_records(folder / "metrics.jsonl"))
    train = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "eval"]
    lines = [f"## {stage.name}", ""]
    lines += [f"- parameters: {stage.model.num_params():,}"]
    lines += [f"- steps: {train[-1]['step'] if train else 0:,} of {stage.run_config.steps:,}"]
    lines += [f"- {stage.run_config.unit} a step: {stage.units_per_step():,}", ""]
    lines += _table(train, held_out)
    if not train:
        return "\n".join(lines)
    if importlib.util.find_spec("matplotlib") is None:
        return "\n".join([*lines, "Plots need `pip install 'jaxherd[report]'`.", ""])
    # Objectives need not tell where tokens went.
    told = "expert_load/0" in train[-1] and hasattr(stage.model, "routed_layers")
    layers = stage.model.routed_layers() if told else []
    for title, name in _draw(train, held_out, folder, layers):
        lines += [f"![{title}]({folder.name}/plots/{name})", ""]
    return "\n".join([*lines, *_samples(folder)])


def _table(train: list[dict], held_out: list[dict]) -> list[str]:
    rows = ["| metric | first | last |", "|---|---|---|"]
    for records in (train, held_out):
        if not records:
            continue
        # Each metric's own first and last record: in some there was nothing of it to count.
        firsts: dict[str, Any] = {}
        lasts: dict[str, Any] = {}
        for record in records:
            firsts, lasts = record | firsts, lasts | record
        for name in [name for name in lasts if name not in ("kind", "step")]:
            if any(part in name for part in _HIDDEN):
                continue
            first, last = firsts[name], lasts[name]
            if isinstance(last, int | float) and isinstance(first, int | float):
                rows.append(f"| {name} | {first:.4g} | {last:.4g} |")
    return [*rows, ""]


def _draw(
    train: list[dict], held_out: list[dict], folder: Path, layers: list[list[int]]
) -> list[tuple[str, str]]:
    steps = [r["step"] for r in train]
    window = max(1, len(steps) // 50)
    drawn = []
    series: dict[str, Any] = {"train": (steps, [_number(r.get("loss")) for r in train])}
    marked = []
    for name in [k for k in (held_out[-1] if held_out else {}) if k.endswith("/loss")]:
        points = [(r["step"], _number(r[name])) for r in held_out if name in r]
        series[name.removesuffix("/loss")] = tuple(map(list, zip(*points)))
        marked.append(name.removesuffix("/loss"))
    plots.curves(
        folder / "plots" / "loss.png",
        series,
        x_label="step",
        y_label="loss (nats)",
        title="Loss",
        window=window,
        marked=marked,
    )
    drawn.append(("Loss", "loss.png"))
    plots.curves(
        folder / "plots" / "grad_norm.png",
        {"gradient norm": (steps, [_number(r["grad_norm"]) for r in train])},
        x_label="step",
        y_label="global norm before clipping",
        title="Gradient norm",
        log_y=True,
        window=window,
    )
    drawn.append(("Gradient norm", "grad_norm.png"))
    rewards = _rewards(train, held_out)
    if rewards:
        plots.curves(
            folder / "plots" / "reward.png",
            rewards,
            x_label="step",
            y_label="mean reward",
            title="Reward",
            window=window,
            marked=[name for name in rewards if name != _SAMPLED],
        )
        drawn.append(("Reward", "reward.png"))
    if layers:
        _draw_load(train, folder, layers)
        drawn += [("Expert load", "expert_load.png"), ("Load over time", "expert_load_time.png")]
    return drawn


def _rewards(train: list[dict], held_out: list[dict]) -> dict[str, Any]:
    """Return the curves of rewards: of what was trained on, and of what evaluations measured."""
    names = [k for k in (held_out[-1] if held_out else {}) if k.endswith("/reward")]
    wanted = [(_SAMPLED, train, "reward")] if "reward" in train[-1] else []
    wanted += [(name.removesuffix("/reward"), held_out, name) for name in names]
    found: dict[str, Any] = {}
    for label, records, name in wanted:
        points = [(r["step"], _number(r[name])) for r in records if name in r]
        found[label] = tuple(map(list, zip(*points)))
    return found


def _layer_loads(record: dict, layers: list[list[int]]) -> np.ndarray:
    """Return the share of rows of each expert, [layer, expert], layers in the model's order."""
    blocks = [np.asarray(record[f"expert_load/{index}"], float) for index in range(len(layers))]
    return np.concatenate(blocks)[np.argsort(np.concatenate(layers), kind="stable")]


def _draw_load(train: list[dict], folder: Path, order: list[list[int]]) -> None:
    last = np.mean([_layer_loads(r, order) for r in train[-20:]], axis=0)
    layers, experts = last.shape
    names = [str(layer) for layer in sorted(sum(order, []))]
    plots.heat_map(
        folder / "plots" / "expert_load.png",
        last,
        x_label="expert",
        y_label="routed layer",
        title=f"Share of tokens per expert, last {min(20, len(train))} steps",
        value_label=f"share (uniform {1 / experts:.3f})",
        x_ticks=[str(i) for i in range(experts)],
        y_ticks=names,
        limits=(0.0, float(last.max())),
    )
    steps = [r["step"] for r in train]
    busiest = np.array([_layer_loads(r, order).max(axis=1) * experts for r in train])
    plots.curves(
        folder / "plots" / "expert_load_time.png",
        {f"layer {names[i]}": (steps, busiest[:, i].tolist()) for i in range(min(layers, 6))},
        x_label="step",
        y_label="busiest expert / uniform",
        title="Load of the busiest expert",
        window=max(1, len(steps) // 50),
    )


def _samples(folder: Path) -> list[str]:
    path = folder / "samples.jsonl"
    if not path.exists():
        return []
    lines = ["### Samples", ""]
    for text in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(text)
        fence = "````"
        lines += [f"Step {sample['step']}:", "", fence, sample["text"], fence, ""]
    return lines


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
