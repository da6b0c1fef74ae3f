"""`jaxherd inspect`: what an experiment is, before anything trains."""

import dataclasses
import json as json_lib
from typing import Any

import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Scale, describe


def main(
    experiment: tyro.conf.Positional[str],
    /,
    on: str | None = None,
    json: common.Json = False,
    set: common.Overrides = (),
    scale: Scale | None = None,
    batch: bool = True,
) -> int:
    """Show parameters, FLOPs, memory of the state per device, the layout, and one decoded batch.

    Example: jaxherd inspect llama4/scout --on cpu

    Args:
        experiment: `<paper>/<file>`, or the path of your own file.
        on: a target such as cpu, gpu:8 or v5p:4x4x8; the experiment's own by default.
        json: print JSON, with every field that --set can change.
        set: override any field of the experiment.
        scale: cpu, gpu or full; follows from --on if not given.
        batch: read and decode one batch of data (only at the cpu scale, where the data is small).
    """
    from jaxherd.core.targets import parse_target

    common.use_platform("cpu")
    chosen = scale or ("full" if on is None else common.scale_for(on, None))
    loaded = common.load_experiment(experiment, chosen, set)
    target = parse_target(on or loaded.target)
    stages = [_stage(stage, target, batch and chosen == "cpu") for stage in loaded.stages]
    record = {
        "experiment": loaded.name,
        "scale": loaded.scale,
        "target": target.name,
        "stages": stages,
    }
    if json:
        record["config"] = describe(loaded)
        print(json_lib.dumps(record, indent=2, default=str))
        return 0
    _print(record)
    return 0


def _stage(stage: Any, target: Any, read_batch: bool) -> dict[str, Any]:
    if not hasattr(stage, "optimizer"):
        return {"name": stage.name}
    model, spec = stage.model, stage.data.batch_spec()
    partitioner = _partitioner(stage, target)
    about = {
        "name": stage.name,
        "parameters": model.num_params(),
        "active_parameters": getattr(model, "active_params", model.num_params)(),
        "steps": stage.run_config.steps,
        "units_per_step": stage.units_per_step(),
        "flops_per_step": stage.flops_per_step(),
        "flops_per_token": stage.flops_per_step() / stage.units_per_step(),
        "total_flops": stage.flops_per_step() * stage.run_config.steps,
        "layout": {k: v for k, v in partitioner.mesh.shape.items() if v > 1} or {"devices": 1},
        "state_gib_per_device": _state_bytes(stage, partitioner) / 2**30,
        "hbm_gib_per_device": target.chip.hbm_gib / target.chip.devices_per_chip,
        "batch": {name: [list(f.shape), str(f.dtype), list(f.axes)] for name, f in spec.items()},
    }
    problem = _problem(spec, partitioner)
    if problem:
        about["problem"] = problem
    if hasattr(model, "segments"):
        about["layers"] = [
            f"{s.count} x (" + " + ".join(f"{r.length} {_kind(r.layer)}" for r in s.runs) + ")"
            for s in model.segments()
        ]
    if read_batch and not getattr(stage.data, "needs_artifacts", False):
        data = stage.data.build(split="train", seed=0)
        # Batches that the model makes while it trains are not there to be read.
        if hasattr(stage.data, "preview") and not hasattr(data, "attach"):
            about["preview"] = stage.data.preview(next(data))
    return about


def _kind(layer: Any) -> str:
    attention = layer.attention
    span = f"{attention.kind} {attention.size}" if attention.size else attention.kind
    rope = "RoPE" if attention.rope is not None else "NoPE"
    experts = getattr(layer.feed_forward, "num_experts", None)
    return f"[{span}, {rope}, {f'{experts} experts' if experts else 'dense'}]"


@dataclasses.dataclass(frozen=True)
class _StandIn:
    """A device as far as shapes of shards depend on it: no compiler need be installed."""

    id: int
    slice_index: int
    platform: str = "cpu"
    process_index: int = 0


def _partitioner(stage: Any, target: Any) -> Any:
    """Return the mesh and rules that a run on the target would have."""
    from jaxherd.core.sharding import Partitioner

    per_slice = target.devices // target.num_slices
    return Partitioner.create(
        stage.layout, [_StandIn(i, i // per_slice) for i in range(target.devices)]
    )


def _state_bytes(stage: Any, partitioner: Any) -> int:
    """Return the bytes of the train state (parameters, moments, averages) on one device."""
    import math

    import jax

    from jaxherd.training.step import Program

    # The batch takes no part in it, so that it may be one that does not fit the devices.
    program = Program(
        stage.model,
        stage.objective,
        stage.optimizer,
        partitioner,
        total_steps=stage.run_config.steps,
        config=stage.step,
        guards=stage.guards,
        batch_shardings={},
    )
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(program.abstract_state())
    )


def _problem(spec: Any, partitioner: Any) -> str | None:
    """Return why the batch does not fit the devices, or None."""
    try:
        for name, field in spec.items():
            partitioner.sharding(field.axes, field.shape, f"batch field {name!r}")
    except JaxherdError as error:
        return str(error)
    return None


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{record['experiment']}[/bold] ({record['scale']}) on {record['target']}")
    for stage in record["stages"]:
        table = Table(
            title=f"stage {stage['name']}", box=None, show_header=False, title_justify="left"
        )
        for name, value in stage.items():
            if name in ("name", "batch", "preview"):
                continue
            table.add_row(name.replace("_", " "), escape(_shown(value)))
        for name, (shape, dtype, axes) in stage.get("batch", {}).items():
            table.add_row(f"batch: {name}", escape(f"{dtype} {shape} {axes}"))
        console.print(table)
        if stage.get("preview"):
            console.print("[bold]one batch, decoded[/bold]")
            console.print(stage["preview"], markup=False, highlight=False)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
