"""Print a `Plan` for a person: what fits, what bounds the step, what the links do."""

from typing import Any

from jaxherd.planning.report import Plan


def amount(value: float | int | None, unit: str = "") -> str:
    """Format with a decimal prefix: 4.59e14 and `FLOP` give `459 TFLOP`."""
    if value is None:
        return "unknown"
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def duration(seconds: float | int | None) -> str:
    """Format seconds as s, ms or us."""
    if seconds is None:
        return "unknown"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def percent(share: float | int | None) -> str:
    """Format a share as a percentage."""
    return "unknown" if share is None else f"{100 * share:.1f}%"


def render_plan(plan: Plan, console: Any = None) -> None:
    """Print `plan` with rich."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    console.print(
        f"\n[bold]{plan.experiment}[/] on [bold]{plan.slice}[/] ({plan.chips} chips, "
        f"{plan.mesh or plan.layout}): {verdict}"
    )
    table = Table(show_header=True, header_style="bold", title_justify="left")
    for heading in ("", "per step", "how it is known"):
        table.add_column(heading, overflow="fold")
    table.add_row(
        "HBM per chip",
        f"{plan.hbm_gib_per_chip:.2f} of {plan.hbm_limit_gib:.2f} GiB",
        "compiler's buffer assignment",
    )
    if plan.memory:
        m = plan.memory
        table.add_row("  arguments", f"{m.arguments:.2f} GiB", "train state and batch")
        table.add_row("  temporaries", f"{m.temporaries:.2f} GiB", "activations, gathered weights")
        rest = m.outputs - m.aliased + m.code
        table.add_row("  outputs not donated, code", f"{rest:.2f} GiB", "")
    table.add_row("model FLOPs", amount(plan.flops_per_step, "FLOP"), "counted by the model")
    table.add_row("tokens", f"{plan.tokens_per_step:,.0f}", "batch of all chips")
    if plan.fits:
        dtype = plan.matmul_dtype
        table.add_row("compute at peak", duration(plan.compute_seconds), f"FLOPs / {dtype} peak")
        table.add_row("HBM traffic", duration(plan.hbm_seconds), "bytes / full bandwidth")
        table.add_row("collectives", duration(plan.collective_seconds), "bytes / links they span")
        table.add_row(
            "  not hidden",
            f"{duration(plan.exposed_seconds)} ({percent(plan.exposed_collective_share)})",
            "estimate from the schedule",
        )
        table.add_row("non-matmul time", percent(plan.non_matmul_share), "estimate, of core time")
        table.add_row(
            "[bold]step, estimated[/]",
            f"[bold]{duration(plan.estimated_step_seconds)}[/]",
            f"bound and what nothing hides; largest term: {plan.bottleneck}",
        )
        table.add_row("[bold]MFU, at most[/]", f"[bold]{percent(plan.mfu_bound)}[/]", "bound")
        table.add_row("schedule", duration(plan.schedule_seconds), "compiler's cycle estimates")
    console.print(table)
    if plan.collectives:
        _render_collectives(plan, console, Table)
    if plan.largest_buffers:
        buffers = Table("GiB", "shape", "where", title="Largest values in HBM, per device")
        for buffer in plan.largest_buffers:
            buffers.add_row(f"{buffer.gib:.3f}", buffer.shape, _plain(buffer.where))
        console.print(buffers)
    for line in plan.advice:
        console.print(f"[yellow]change[/] {_plain(line)}")
    for line in plan.notes:
        console.print(f"[dim]note[/] {_plain(line)}")
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    console.print(f"[dim]compiled in {plan.compile_seconds:.1f} s with {versions}[/]")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _render_collectives(plan: Plan, console: Any, table_class: Any) -> None:
    table = table_class(title="Collectives: what crosses the links, and does anything hide it?")
    for heading in ("op", "axis", "n", "times", "bytes/device", "on links", "waiting", "hidden by"):
        table.add_column(heading)
    for row in plan.collectives:
        hidden = f"compute ({row.unit})" if row.asynchronous else "nothing (synchronous)"
        table.add_row(
            row.op,
            _plain(row.axes),
            str(row.group_size),
            f"{row.count:g}",
            amount(row.bytes, "B"),
            duration(row.seconds),
            duration(row.exposed_seconds),
            hidden,
        )
    console.print(table)


def table_row(name: str, plan: Plan) -> str:
    """Return a committed plan's row of the table in `tpu/README.md`.

    Args:
        name: of its file under `plans/`, without the ending.
        plan: what the file holds.
    """
    shown = ["-"] * 3
    if plan.fits:
        shares = (plan.exposed_collective_share, plan.non_matmul_share)
        step = duration(plan.estimated_step_seconds)
        shown = [step, *("-" if share is None else f"{share:.0%}" for share in shares)]
    cells = (
        f"[`{name}`](plans/{name}.json)",
        str(plan.chips),
        "yes" if plan.fits else "no",
        f"{plan.hbm_gib_per_chip:.1f}",
        f"{plan.hbm_limit_gib:.4g}",
        *shown,
    )
    return "| " + " | ".join(cells) + " |"
