"""What several verbs need: experiments with overrides, targets, devices."""

import os
from typing import Annotated, Any

import tyro

from jaxherd.core import catalog
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment, Scale
from jaxherd.core.host_memory import keep_freed_memory

# `--set a=1 --set b=2`: given several times, all count.
Overrides = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="path.to.field=value")
]
# Columns of a line that is not shown on a terminal.
_UNWRAPPED = 10_000
Json = Annotated[bool, tyro.conf.arg(name="json")]


def canonical(on: str) -> str:
    """Return the spelling of a target that verbs compare: `CPU` is `cpu`.

    Raises:
      JaxherdError: there is no such target.
    """
    from jaxherd.core.targets import parse_target

    text = on.strip().lower()
    if text != "tpu":
        parse_target(text)
    return text


def scale_for(on: str, scale: Scale | None) -> Scale:
    """Return the scale that goes with a target unless one is given."""
    if scale is not None:
        return scale
    kind = canonical(on).split(":")[0]
    if kind == "cpu":
        return "cpu"
    return "gpu" if kind in ("gpu", "h100", "a100") else "full"


def load_experiment(name: str, scale: Scale, assignments: tuple[str, ...]) -> Experiment:
    """Return an experiment with `--set` overrides applied."""
    return catalog.load(name, scale).with_overrides(assignments)


def use_platform(name: str) -> None:
    """Keep jax to one platform, whatever else is installed; before its first use only."""
    os.environ["JAX_PLATFORMS"] = name
    import jax

    jax.config.update("jax_platforms", name)


def local_devices(on: str) -> tuple[Any, ...]:
    """Return the devices that a run uses, after joining a multi-host group if there is one.

    Raises:
      JaxherdError: the target's platform is not on this machine, or not as many devices of it.
    """
    on = canonical(on)
    platform = {"cpu": "cpu", "gpu": "cuda", "h100": "cuda", "a100": "cuda"}.get(
        on.split(":")[0], "tpu"
    )
    if platform == "cpu":
        keep_freed_memory()
        # With libtpu installed and no TPU, jax would look for one and say so at every start.
        use_platform("cpu")
    import jax

    persistent_cache()
    if os.environ.get("JAXHERD_COORDINATOR"):
        if platform == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address=os.environ["JAXHERD_COORDINATOR"],
            num_processes=int(os.environ["JAXHERD_PROCESSES"]),
            process_id=int(os.environ["JAXHERD_PROCESS"]),
        )
    elif platform == "tpu":
        _join_workers(jax, on)
    try:
        devices = tuple(jax.devices(platform))
    except RuntimeError as error:
        raise JaxherdError(
            f"no {platform} device on this machine for --on {on}: try --on cpu, or see what would "
            f"happen there with `jaxherd plan ... --on {on}`."
        ) from error
    count = on.partition(":")[2]
    if platform != "tpu" and count:
        if int(count) > len(devices):
            hint = (
                f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
                if platform == "cpu"
                else "use fewer"
            )
            raise JaxherdError(
                f"--on {on}: this machine has {len(devices)} {platform} device(s); {hint}."
            )
        return devices[: int(count)]
    if platform == "tpu" and on != "tpu":
        _check_slice(on, devices)
    return devices[:1] if platform == "cpu" and jax.process_count() == 1 else devices


def _join_workers(jax: Any, on: str) -> None:
    """Join the workers of a slice; jax finds them by itself on Cloud TPU VMs and on GKE.

    A lone TPU machine that says nothing of workers (Colab) needs no joining.

    Raises:
      JaxherdError: there is no TPU here, or it is part of a slice whose workers were not found.
    """
    try:
        jax.distributed.initialize()
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    else:
        return
    try:
        devices, workers = jax.devices("tpu"), jax.process_count()
    except RuntimeError as error:
        raise JaxherdError(
            f"there is no TPU on this machine for --on {on} ({reason}): run with --on cpu, or use "
            "`jaxherd launch`."
        ) from error
    if workers > 1 or len(devices) != len(jax.local_devices(backend="tpu")):
        raise JaxherdError(
            f"this machine is one of {workers} workers of a slice and could not join the others "
            f"({reason}): start the same command on all workers, as `jaxherd launch` does."
        )


def _check_slice(on: str, devices: tuple[Any, ...]) -> None:
    """Raise a `JaxherdError` unless the devices are those of the slice that was named."""
    from jaxherd.core.targets import CHIPS, parse_target

    target, kind = parse_target(on), devices[0].device_kind
    # A kind that the chip table does not know may be a newer name of the same chip.
    other = kind in {chip.device_kind for chip in CHIPS.values()} - {target.chip.device_kind}
    if len(devices) != target.devices or other:
        raise JaxherdError(
            f"--on {on} is {target.devices} devices of {target.chip.device_kind!r}, and here are "
            f"{len(devices)} of {kind!r}: name the slice that is here, or write --on tpu."
        )


def console() -> Any:
    """Return rich's console of the standard output: as wide as a terminal, or as a table wants.

    What is piped into a file or another program is not wrapped.
    """
    import sys

    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_UNWRAPPED)


def persistent_cache() -> None:
    """Keep compiled programs between runs, unless the user chose a place or none."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = os.environ.get("JAXHERD_CACHE") or os.path.expanduser("~/.cache/jaxherd")
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def compiler_options(on: str, devices: tuple[Any, ...]) -> dict[str, Any]:
    """Return the XLA options for a run: those that a plan for the same target uses."""
    if devices[0].platform != "tpu":
        return {}
    from jaxherd.core.targets import CHIPS, parse_target
    from jaxherd.planning.flags import DEFAULT_SETS, FLAG_SETS, options_for

    if canonical(on) != "tpu":
        return options_for(parse_target(on))
    kind = devices[0].device_kind
    families = [name for name, chip in CHIPS.items() if chip.device_kind == kind]
    return dict(FLAG_SETS[DEFAULT_SETS[families[0]]].options) if families else {}
