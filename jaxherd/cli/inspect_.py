"""`jaxherd inspect`: what an experiment is, before anything trains."""

import dataclasses
import inspect
import json as json_lib
from typing import Any

import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import SCALES, Scale, describe


def main(
    experiment: tyro.conf.Positional[str],
    /,
    on: str | None = None,
    json: common.Json = False,
    set: common.Overrides = (),
    scale: Scale | None = None,
    batch: bool = True,
    fields: bool = False,
    quantise: str | None = None,
) -> int:
    """Show each stage: what it reads and writes, and of those that train parameters, FLOPs, memory of
    the state per device, the layout, and one decoded batch.

    Example: jaxherd inspect llama4/scout --on cpu

    Args:
        experiment: `<paper>/<file>`, or the path of your own file.
        on: a target such as cpu, gpu:8 or v5p:4x4x8; that of the full scale by default.
        json: print JSON, with the whole config.
        set: override any field of the experiment, by path; --fields lists them.
        scale: cpu, gpu or full; follows from --on if not given, and is full without both.
        batch: read and decode one batch of data (only at the cpu scale, where the data is small).
        quantise: also show the bytes of the weights by dtype as they are served with this recipe: int8,
            int8_group32, int4, int4_group32; of Llama 4 int4_mixed, int4_mixed_offline, fp8_mixed.
        fields: print only the fields that --set can change, as path=value with the values of now.
    """
    from jaxherd.core.targets import parse_target

    common.use_platform("cpu")
    chosen = scale or ("full" if on is None else common.scale_for(on, None))
    loaded = common.load_experiment(experiment, chosen, set)
    if fields:
        found = loaded.fields()
        print(
            json_lib.dumps(found, indent=2)
            if json
            else "\n".join(f"{path}={value}" for path, value in found.items())
        )
        return 0
    target = parse_target(on or loaded.target)
    read = batch and chosen == "cpu"
    stages = [_stage(stage, target, read, quantise) for stage in loaded.stages]
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


def _stage(
    stage: Any, target: Any, read_batch: bool, quantise: str | None = None
) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": stage.name,
        "does": _first_sentence(stage),
        "reads": list(stage.reads),
        "writes": getattr(stage, "writes", ""),
    }
    if not hasattr(stage, "optimizer"):
        return about
    model, spec = stage.model, stage.data.batch_spec()
    partitioner = _partitioner(stage, target)
    about |= {
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
    if quantise is not None:
        from jaxherd.models.quantise import stored_bytes

        # Weights are served in the dtype that the step computes in.
        kept = stored_bytes(model, stage.step.compute_dtype, quantise)
        about["served_bytes"] = {**kept, "total": sum(kept.values())}
    problem = _problem(spec, partitioner)
    if problem:
        about["problem"] = problem
    if hasattr(model, "segments"):
        about["layers"] = [
            f"{s.count} x (" + " + ".join(f"{r.length} {_kind(r.layer)}" for r in s.runs) + ")"
            for s in model.segments()
        ]
    if read_batch and not getattr(stage.data, "needs_artifacts", False):
        about["preview"] = _preview(stage)
    return about


def _first_sentence(stage: Any) -> str:
    """Return the first line of the docstring of the stage's class; a dataclass may have none."""
    line = (inspect.getdoc(type(stage)) or "").partition("\n")[0]
    return "" if line.startswith(f"{type(stage).__name__}(") else line


def _preview(stage: Any) -> str:
    from jaxherd.training.progress import Counts
    from jaxherd.training.stage import open_data

    with Counts(stage.name) as report:
        data = open_data(stage.data, "train", 0, {}, report)
    # Batches that the model makes while it trains are not there to be read.
    if not hasattr(stage.data, "preview") or hasattr(data, "attach"):
        return ""
    return stage.data.preview(next(data))


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
    from rich.markup import escape
    from rich.table import Table

    console = common.console()
    console.print(f"[bold]{record['experiment']}[/bold] ({record['scale']}) on {record['target']}")
    others = " or ".join(f"--scale {scale}" for scale in SCALES if scale != record["scale"])
    console.print(f"This is the scale {record['scale']!r}; {others} shows another.")
    for stage in record["stages"]:
        table = Table(
            title=f"stage {stage['name']}", box=None, show_header=False, title_justify="left"
        )
        for name, value in stage.items():
            if name in ("name", "batch", "preview") or value in ("", []):
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
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(item)}" for name, item in value.items())
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return str(value)
