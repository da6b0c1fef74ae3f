"""`jaxherd run`: run an experiment's stages, or go on where an earlier run stopped."""

import sys
import time
from pathlib import Path

import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Scale


def main(
    experiment: tyro.conf.Positional[str],
    /,
    on: str = "cpu",
    workdir: Path | None = None,
    seed: int = 0,
    set: common.Overrides = (),
    scale: Scale | None = None,
    quiet: bool = False,
) -> int:
    """Run an experiment, or go on with it: the same command resumes at the last checkpoint.

    Ctrl-C or SIGTERM stops it after the step that it is at, with a checkpoint; a second Ctrl-C at
    once.  The exit status is then 130 or 143.
    Example: jaxherd run llama4/scout --on cpu --set pretrain.run_config.steps=50

    Args:
        experiment: `<paper>/<file>` as shown by `jaxherd list`, or the path of your own file.
        on: where to run: cpu, cpu:8 (fake devices), gpu, gpu:8, tpu, or a slice's name.
        workdir: all output goes here; runs/<experiment>-<scale> by default.
        seed: of parameters, data order and sampling.
        set: override any field of the experiment, by path; `jaxherd inspect EXPERIMENT --fields`
            with the same --on lists them all.
        scale: cpu, gpu or full; follows from --on if not given.
        quiet: print no progress.
    """
    from jaxherd.core.runner import run_experiment
    from jaxherd.training.stopping import Interrupted

    on = common.canonical(on)
    if workdir is not None and "://" in str(workdir).replace(":/", "://", 1):
        raise JaxherdError(
            f"workdir {workdir} is no local folder: mount the bucket (gcsfuse) and give its path."
        )
    chosen = common.scale_for(on, scale)
    loaded = common.load_experiment(experiment, chosen, set)
    if workdir is None:
        workdir = Path("runs") / f"{loaded.name.replace('/', '-')}-{chosen}"
    devices = common.local_devices(on)
    import jax

    main_process = jax.process_index() == 0
    say = _say if main_process else _ignore
    started = time.monotonic()
    if not quiet:
        say(
            f"{loaded.name} ({chosen}) on {len(devices)} {devices[0].platform}; output in {workdir}"
        )
    try:
        run_experiment(
            loaded,
            workdir,
            target=on,
            devices=devices,
            seed=seed,
            say=say,
            quiet=quiet,
            is_main=main_process,
            compiler_options=common.compiler_options(on, devices),
        )
    except Interrupted as stopped:
        say(str(stopped))
        return stopped.exit_status
    if not quiet:
        say(f"done in {time.monotonic() - started:.0f} s; see {workdir / 'report.md'}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _ignore(text: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
