"""`jaxherd plan`: compile an experiment's step, or one of decoding, for a slice that is not here."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment, Scale


def main(
    experiment: tyro.conf.Positional[str | None] = None,
    /,
    on: str | None = None,
    json: common.Json = False,
    set: common.Overrides = (),
    scale: Scale | None = None,
    stage: str | None = None,
    flags: str | None = None,
    save: Path | None = None,
    readme: bool = False,
    decode: int | None = None,
    context: int = 8192,
    quantise: str | None = None,
) -> int:
    """Compile the training step for a slice or GPUs; say whether it fits and what bounds it.

    With --decode, one step of decoding in its place, with weights in few bits if --quantise says so:
    jaxherd plan llama4/scout --on v5e:4x4 --decode 64 --quantise int4_mixed
        --set pretrain.layout.fsdp=1 --set pretrain.layout.expert=16

    Nothing runs and no accelerator is needed; the compiler is the real one.
    Example: jaxherd plan llama4/scout --on v5p:4x4x8

    Args:
        experiment: `<paper>/<file>`, or the path of your own file; only --readme does without.
        on: v5p:8x8x8, v5e:4x4, v5p-1024, 2*v6e:16x16, h100:8 ...; the experiment's own by default.
        json: print the plan as JSON.
        set: override any field of the experiment, by path; `jaxherd inspect EXPERIMENT --fields`
            lists them.
        scale: cpu, gpu or full; follows from --on if not given.
        stage: plan only this stage.
        flags: named set of compiler options; see tpu/flags.md.
        save: also write the JSON to this file; several stages make a list.
        readme: bring the table of tpu/README.md up to date with the files in tpu/plans; of no
            experiment nothing is compiled.
        decode: plan decoding of so many sequences at once, a token each.
        context: tokens that the cache of each sequence has room for.
        quantise: of the weights that decode: int8, int8_group32, int4, int4_group32; of Llama 4
            int4_mixed, int4_mixed_offline, fp8_mixed.
    """
    if quantise is not None and decode is None:
        raise JaxherdError("--quantise is for decoding: add --decode with a number of sequences.")
    folder = _readme_folder() if readme else None
    fits = True
    if experiment is not None:
        decoding = None if decode is None else Decoding(decode, context, quantise)
        fits = _plan(experiment, on, json, set, scale, stage, flags, save, decoding)
    elif folder is None:
        raise JaxherdError("name the experiment to plan, such as llama4/scout (`jaxherd list`).")
    if folder is not None:
        from jaxherd.planning.readme import write_readme

        changed = write_readme(folder)
        told = "brought up to date" if changed else "is up to date"
        print(f"{folder / 'README.md'}: {told}", file=sys.stderr)
    return 0 if fits else 1


def _readme_folder() -> Path:
    from jaxherd.core import resources

    folder = resources.in_checkout("tpu")
    if folder is None:
        raise JaxherdError("--readme writes into a checkout of jaxherd: start it in one.")
    return folder


def _plan(
    experiment: str,
    on: str | None,
    json: bool,
    set: tuple[str, ...],
    scale: Scale | None,
    stage: str | None,
    flags: str | None,
    save: Path | None,
    decoding: "Decoding | None" = None,
) -> bool:
    """Compile, print and save; returns whether all stages fit."""
    from jaxherd.core.targets import parse_target, prepare_environment
    from jaxherd.planning.report import check_plan_file, plans_json, save_plans

    if save is not None:
        check_plan_file(save)
    prepare_environment()
    chosen = scale or ("full" if on is None else common.scale_for(on, None))
    loaded = common.load_experiment(experiment, chosen, set)
    target = parse_target(on or loaded.target)
    # Planning needs no accelerator, and must not take one that is there.
    common.use_platform("cpu")
    stages = _stages(loaded, stage)
    if decoding is None:
        plans = [plan_stage(loaded, item, target, flags) for item in stages]
    else:
        plans = [plan_decoding(loaded, item, target, decoding, flags) for item in stages]
    for plan in plans:
        if not json:
            plan.render(common.console())
    if json:
        print(plans_json(plans), end="")
    if save is not None:
        save_plans(plans, save)
    return all(plan.fits for plan in plans)


def _stages(experiment: Experiment, name: str | None) -> list[Any]:
    if name is not None:
        return [experiment.stage(name)]
    stages = [item for item in experiment.stages if hasattr(item, "program")]
    if not stages:
        raise JaxherdError(f"{experiment.name} has no stage that trains: there is nothing to plan.")
    return stages


def plan_stage(experiment: Experiment, stage: Any, target: Any, flags: str | None = None) -> Any:
    """Return the plan of one stage: the very step that `jaxherd run` would compile there."""
    from jaxherd.core.targets import abstract_devices
    from jaxherd.planning.compile import compile_plan
    from jaxherd.planning.flags import options_for

    def build(on: Any) -> tuple[Any, Any, Any]:
        program = stage.program(abstract_devices(on))
        return program.step, stage.abstract_inputs(program), program.partitioner.mesh

    step, arguments, mesh = build(target)
    return compile_plan(
        step,
        arguments,
        target=target,
        mesh=mesh,
        flops_per_step=stage.flops_per_step(),
        tokens_per_step=stage.units_per_step(),
        experiment=f"{experiment.name} ({experiment.scale}, {stage.name})",
        layout_name=stage.layout.name,
        compiler_options=options_for(target, flags),
        matmul_dtype={"bfloat16": "bf16"}.get(stage.step.compute_dtype, "f32"),
        rebuild=build,
    )


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is planned in the place of training.

    Attributes:
      rows: sequences that decode together.
      context: tokens that the cache of each has room for.
      quantise: the recipe of the weights, or None.
    """

    rows: int
    context: int
    quantise: str | None = None


def plan_decoding(
    experiment: Experiment, stage: Any, target: Any, decoding: Decoding, flags: str | None = None
) -> Any:
    """Return the plan of one decoding step of a stage's model, in the stage's layout."""
    from jaxherd.core.sharding import Partitioner
    from jaxherd.core.targets import abstract_devices
    from jaxherd.inference.decode_program import decode_flops, decode_program
    from jaxherd.models.quantise import recipe_of
    from jaxherd.planning.compile import compile_plan
    from jaxherd.planning.flags import options_for

    model, dtype = stage.model, stage.step.compute_dtype
    if decoding.quantise is not None:
        model = recipe_of(decoding.quantise).apply(model)

    def build(on: Any) -> tuple[Any, Any, Any]:
        partitioner = Partitioner.create(stage.layout, abstract_devices(on))
        step, arguments = decode_program(
            model, partitioner, rows=decoding.rows, length=decoding.context, dtype=dtype
        )
        return step, arguments, partitioner.mesh

    step, arguments, mesh = build(target)
    kept = f", {decoding.quantise}" if decoding.quantise else ""
    return compile_plan(
        step,
        arguments,
        target=target,
        mesh=mesh,
        flops_per_step=decode_flops(model, decoding.rows, decoding.context),
        tokens_per_step=decoding.rows,
        experiment=f"{experiment.name} ({experiment.scale}, {stage.name}, decoding{kept})",
        layout_name=stage.layout.name,
        compiler_options=options_for(target, flags),
        matmul_dtype={"bfloat16": "bf16"}.get(dtype, "f32"),
        rebuild=build,
    )
