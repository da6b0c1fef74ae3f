"""Compile a step for a slice that is not here, and report what came out.

The step is the one that trains: the caller hands over the jitted function and its arguments as
`jax.ShapeDtypeStruct` with shardings over a mesh of the target's abstract devices
(`core.targets.abstract_devices`).
"""

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError
from jaxherd.core.targets import Target, parse_target
from jaxherd.planning import misfit
from jaxherd.planning.costs import PEAK, SHARES, CostModel
from jaxherd.planning.flags import UNTIMED_GPU
from jaxherd.planning.hlo import Module, parse_hlo
from jaxherd.planning.links import Fabric
from jaxherd.planning.memory import compile_measured
from jaxherd.planning.report import GIB, Buffer, CollectiveRow, MemoryUse, Plan
from jaxherd.planning.timeline import Timeline, build_timeline

Rebuild = Callable[[Target], tuple[Any, Sequence[Any], Any]]


def compile_plan(
    fn_jitted: Any,
    abstract_args: Sequence[Any],
    *,
    target: Target,
    mesh: Any,
    flops_per_step: float | int,
    tokens_per_step: float | int,
    experiment: str,
    layout_name: str = "",
    compiler_options: Mapping[str, Any] | None = None,
    matmul_dtype: str = "bf16",
    rebuild: Rebuild | None = None,
) -> Plan:
    """Lower and compile `fn_jitted(*abstract_args)` for `target` and return its plan.

    Args:
        fn_jitted: the step, from `jax.jit`, with the train state donated.
        abstract_args: positional arguments; array leaves are `jax.ShapeDtypeStruct` with sharding.
        target: where it is to run.
        mesh: the `jax.sharding.Mesh` of the target's abstract devices that the shardings use.
        flops_per_step: model FLOPs over all chips, counted by the model (the compiler would count
            a scanned layer once).
        tokens_per_step: tokens over all chips.
        experiment: name for the report.
        layout_name: name for the report.
        compiler_options: XLA options, such as `planning.flags.options_for(target)`; for GPUs they
            are added to `planning.flags.UNTIMED_GPU`.
        matmul_dtype: operand type of the peak rate: `bf16`, `int8`, `fp8` or `f32`.
        rebuild: `(target) -> (fn_jitted, abstract_args, mesh)` for another target.  On a misfit the
            compiler names no buffers; with `rebuild` the same step is compiled for as many devices
            of a chip with more memory, and the largest values are read there.

    Returns:
        A plan; one with `fits=False` and advice where memory does not suffice.

    Raises:
        JaxherdError: no argument is sharded over the target's devices (JAX would silently compile
            for the CPU), or the compiler refuses the program for another reason than memory.
    """
    _check_devices(abstract_args, target, mesh)
    options = dict(UNTIMED_GPU if target.kind == "gpu" else {}) | dict(compiler_options or {})
    common: dict[str, Any] = dict(
        experiment=experiment,
        slice=target.name,
        chips=target.chips,
        hbm_limit_gib=target.chip.hbm_gib,
        flops_per_step=float(flops_per_step),
        tokens_per_step=float(tokens_per_step),
        layout=layout_name,
        mesh=" ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1),
        matmul_dtype=matmul_dtype,
        compiler_options=options,
        versions=versions(target),
    )
    start = time.perf_counter()
    state = misfit.argument_gib(list(abstract_args)) * target.chip.devices_per_chip
    if target.kind == "tpu" and state > target.chip.hbm_gib:
        return Plan(
            **common,
            fits=False,
            hbm_gib_per_chip=state,
            compile_seconds=time.perf_counter() - start,
            bottleneck="memory",
            largest_buffers=misfit.argument_buffers(list(abstract_args)),
            notes=(
                "The train state and the batch alone exceed the memory, so nothing was compiled: "
                "the step needs more than this.",
            ),
            advice=misfit.advise(target, state, state, dict(mesh.shape)),
        )
    try:
        lowered, held = fn_jitted.lower(*abstract_args), None
        if target.kind == "tpu":
            compiled, held = compile_measured(lowered, options)
        else:
            compiled = lowered.compile(compiler_options=options or None)
    except Exception as error:
        seconds = time.perf_counter() - start
        if misfit.is_out_of_memory(error):
            return _misfit_plan(str(error), seconds, common, abstract_args, target, mesh, rebuild)
        if "No such compile option" in str(error):
            raise JaxherdError(f"The compiler for {target.name} says: {error}.") from error
        raise
    seconds = time.perf_counter() - start
    memory = memory_use(compiled.memory_analysis(), target, held)
    module = parse_hlo(compiled.as_text())
    needed = memory.arguments + memory.outputs - memory.aliased + memory.temporaries + memory.code
    # CPU and GPU compilers accept any size; there the table's figure decides.
    fits = target.kind == "tpu" or needed <= target.chip.hbm_gib
    plan: dict[str, Any] = dict(
        common,
        fits=fits,
        hbm_gib_per_chip=needed,
        memory=memory,
        compile_seconds=seconds,
        largest_buffers=largest_buffers(module),
    )
    plan.update(roofline(module, target, mesh, flops_per_step, matmul_dtype))
    notes = list(plan["notes"])
    if memory.outputs > 0.1 and memory.aliased < 0.5 * memory.outputs:
        notes.append("Most outputs are not donated: arguments and outputs count twice.")
    if not fits:
        arguments = memory.arguments
        plan["advice"] = misfit.advise(target, needed, arguments, dict(mesh.shape))
        plan["bottleneck"] = "memory"
    plan["notes"] = tuple(notes)
    return Plan(**plan)


def _check_devices(arguments: Sequence[Any], target: Target, mesh: Any) -> None:
    import jax

    count = mesh.devices.size
    if count != target.devices:
        raise JaxherdError(
            f"{target.name} has {target.devices} devices and the mesh has {count}: "
            "build the mesh from abstract_devices(target)."
        )
    wanted = set(mesh.devices.flat)
    for leaf in jax.tree.leaves(list(arguments)):
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None and set(sharding.device_set) <= wanted:
            return
    raise JaxherdError(
        f"No argument is sharded over the devices of {target.name}, so JAX would compile for the "
        "CPU: give the arguments as jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
    )


def versions(target: Target) -> dict[str, str]:
    """Return the versions that decide the figures."""
    import jax

    found = {"jax": jax.__version__}
    package = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin"}.get(target.kind, "jaxlib")
    try:
        found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found[package] = "unknown"
    return found


def memory_use(stats: Any, target: Target, held: int | None = None) -> MemoryUse:
    """Turn `compiled.memory_analysis()` (bytes per device) into GiB per chip.

    `held`, where it is known, are the bytes of all buffers; the temporaries are what it leaves.
    """
    scale = target.chip.devices_per_chip / GIB
    resident = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = stats.temp_size_in_bytes if held is None else max(0, held - resident)
    return MemoryUse(
        arguments=stats.argument_size_in_bytes * scale,
        outputs=stats.output_size_in_bytes * scale,
        aliased=stats.alias_size_in_bytes * scale,
        temporaries=temporaries * scale,
        code=stats.generated_code_size_in_bytes * scale,
    )


def roofline(
    module: Module,
    target: Target,
    mesh: Any,
    flops_per_step: float | int,
    matmul_dtype: str = "bf16",
) -> dict[str, Any]:
    """Return the plan's timing fields for a compiled module.

    estimated_step_seconds = max(FLOPs / peak, HBM bytes / bandwidth) + exposed collectives, whose
    exposure is an estimate; mfu_bound = compute / max(compute, HBM) leaves it out.  Off
    TPU the text has no cycle estimates, so nothing says what hides a collective; there the bound
    is the largest of the three terms.
    """
    chip = target.chip
    fabric = Fabric(target, mesh, module.num_partitions)
    timeline = build_timeline(module, fabric, CostModel(module, chip, matmul_dtype))
    compute = flops_per_step / (target.chips * chip.peak(matmul_dtype))
    hbm = timeline.hbm_bytes * chip.devices_per_chip / chip.hbm_bytes_per_s
    on_links = sum((use.seconds * use.count for use in timeline.collectives), 0.0)
    exposed = sum((use.exposed_seconds * use.count for use in timeline.collectives), 0.0)
    sent = sum((use.wire_bytes * use.count for use in timeline.collectives), 0.0)
    modelled = target.kind == "tpu"
    if modelled:
        terms = {"compute": compute, "hbm": hbm, "collectives": exposed}
        seconds = max(compute, hbm) + exposed
    else:
        terms = {"compute": compute, "hbm": hbm, "collectives": on_links}
        seconds = max(terms.values())
    core = timeline.compute_seconds
    return {
        "collective_bytes": sent * chip.devices_per_chip,
        "estimated_step_seconds": seconds,
        "bottleneck": max(terms, key=lambda name: terms[name]),
        "mfu_bound": compute / max(compute, hbm) if compute else None,
        "compute_seconds": compute,
        "hbm_seconds": hbm,
        "collective_seconds": on_links,
        "exposed_seconds": exposed if modelled else None,
        "exposed_collective_share": exposed / on_links if modelled and on_links else None,
        "non_matmul_share": 1 - timeline.matmul_seconds / core if modelled and core else None,
        "schedule_seconds": timeline.total_seconds if modelled else None,
        "collectives": collective_rows(timeline),
        "notes": _notes(timeline, target),
    }


def _notes(timeline: Timeline, target: Target) -> tuple[str, ...]:
    notes = []
    if target.kind != "tpu":
        notes.append(
            "This compiler states no cycle estimates: what hides the collectives is not known."
        )
    if timeline.kernels:
        shares = SHARES.get(target.chip.name, PEAK)
        notes.append(
            f"{len(timeline.kernels)} Pallas kernel calls are priced by the FLOPs they state at "
            f"{shares.matmul:.0%} of peak, as the compiler prices its own large products; attention "
            f"at {shares.attention:.0%}, its gradient at {shares.attention_gradient:.0%}."
        )
    if timeline.unpriced_kernels:
        names = ", ".join(timeline.unpriced_kernels[:5])
        notes.append(f"Kernels without a FLOP count are priced by their bytes alone: {names}.")
    if any(use.unit == "network" for use in timeline.collectives):
        notes.append(
            "Between slices: time on the network is bytes over its data-sheet rate, and the copies "
            "between chip and host are left out."
        )
    if timeline.unknown_loops:
        names = ", ".join(timeline.unknown_loops[:5])
        notes.append(f"Loops without a constant trip count are counted once: {names}.")
    if timeline.conditionals:
        notes.append(
            f"{len(timeline.conditionals)} conditionals count as their false branch: routed rows "
            "are taken to travel in one round."
        )
    return tuple(notes)


def collective_rows(timeline: Timeline) -> tuple[CollectiveRow, ...]:
    """Sum collectives of one kind, axis, size and asynchrony; the most exposed first."""
    grouped: dict[tuple[Any, ...], list[Any]] = {}
    for use in timeline.collectives:
        key = (use.op, use.axes, use.group_size, use.asynchronous, use.unit, use.wire_bytes)
        grouped.setdefault(key, []).append(use)
    rows = [
        CollectiveRow(
            op=op,
            axes=axes,
            group_size=size,
            count=sum(use.count for use in uses),
            bytes=sum(use.wire_bytes * use.count for use in uses),
            seconds=sum(use.seconds * use.count for use in uses),
            exposed_seconds=sum(use.exposed_seconds * use.count for use in uses),
            asynchronous=asynchronous,
            unit=unit,
            where=uses[0].op_name,
        )
        for (op, axes, size, asynchronous, unit, _), uses in grouped.items()
        if size > 1
    ]
    return tuple(sorted(rows, key=lambda row: (-row.exposed_seconds, -row.seconds)))


def largest_buffers(module: Module, limit: int = 8) -> tuple[Buffer, ...]:
    """Return the largest values in HBM on one device: arguments and results of scheduled lines.

    They need not all live at the same time.
    """
    found: dict[tuple[str, str], float] = {}
    skip = ("tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "send", "recv")
    for line, computation, _ in module.schedule():
        if line.opcode in skip or line.opcode.endswith(("-start", "-done")):
            continue
        if line.opcode == "parameter" and computation.name != module.entry:
            continue
        for shape in line.shapes:
            if shape.memory_space == 0 and shape.bytes:
                kind = "argument " if line.opcode == "parameter" else ""
                key = (shape.text, kind + (line.op_name or line.name))
                found[key] = shape.bytes / GIB
    largest = sorted(found.items(), key=lambda item: -item[1])[:limit]
    return tuple(Buffer(gib, text, where) for (text, where), gib in largest)


def _misfit_plan(
    message: str,
    seconds: float,
    common: dict[str, Any],
    arguments: Sequence[Any],
    target: Target,
    mesh: Any,
    rebuild: Rebuild | None,
) -> Plan:
    per_chip = target.chip.devices_per_chip
    told = misfit.parse_out_of_memory(message)
    state = misfit.argument_gib(list(arguments)) * per_chip
    needed = (told.needed_bytes or 0.0) / GIB * per_chip
    notes, buffers, memory = [], told.buffers, None
    if told.space == "vmem":
        notes.append(
            f"The compiler says: {told.kernel or 'a kernel'} needs "
            f"{(told.needed_bytes or 0) / 2**20:.0f} MiB of VMEM and a core has "
            f"{(told.available_bytes or 0) / 2**20:.0f} MiB."
        )
        needed = state
    elif not told.needed_bytes:
        notes.append(f"The compiler says: {message.splitlines()[0]}")
    if not buffers and rebuild is not None and told.space == "hbm":
        stand_in = _compile_elsewhere(target, rebuild)
        if stand_in is not None:
            name, memory, buffers = stand_in
            notes.append(
                f"This compiler names no buffers when it refuses early: the breakdown and the "
                f"largest values are those of the same step compiled for {name}."
            )
    if not buffers:
        buffers = misfit.argument_buffers(list(arguments))
        if told.space == "hbm":
            notes.append("The compiler named no buffers: the largest arguments are listed.")
    return Plan(
        **common,
        fits=False,
        hbm_gib_per_chip=needed,
        compile_seconds=seconds,
        bottleneck="memory",
        memory=memory,
        largest_buffers=tuple(buffers),
        notes=tuple(notes),
        advice=misfit.advise(
            target, needed, state, dict(mesh.shape), told.kernel if told.space == "vmem" else ""
        ),
    )


def _compile_elsewhere(
    target: Target, rebuild: Rebuild
) -> tuple[str, MemoryUse, tuple[Buffer, ...]] | None:
    """Compile for as many devices of a chip with more memory; None where that fails as well."""
    if target.chip.hbm_gib_per_device >= 90 or target.num_slices > 1:
        return None
    try:
        # v5p has the most memory per device; its accelerator types count two cores to a chip.
        other = parse_target(f"v5p-{2 * target.devices}")
        fn_jitted, arguments, mesh = rebuild(other)
        _check_devices(arguments, other, mesh)
        compiled = fn_jitted.lower(*arguments).compile()
    except JaxherdError:
        return None
    except Exception as error:
        if misfit.is_out_of_memory(error):
            return None
        raise
    memory = memory_use(compiled.memory_analysis(), other)
    return other.name, memory, largest_buffers(parse_hlo(compiled.as_text()))
