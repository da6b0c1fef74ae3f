"""`jaxherd launch`: rent a TPU slice, run an experiment on all of its workers, give it back."""

import tyro

from jaxherd.cli import common


def main(
    experiment: tyro.conf.Positional[str],
    /,
    on: str,
    project: str,
    zone: str,
    bucket: str,
    source: str,
    name: str = "jaxherd",
    runtime_version: str | None = None,
    spot: bool = False,
    reserved: bool = False,
    set: common.Overrides = (),
    seed: int = 0,
    dry_run: bool = False,
) -> int:
    """Ask for a slice as a queued resource, install jaxherd on every worker, and start the run.

    Example: jaxherd launch llama4/scout --on v5p-256 --project p --zone us-east5-a
             --bucket gs://my-bucket/runs --source dist/jaxherd-0.1.0-py3-none-any.whl --dry-run

    Args:
        experiment: `<paper>/<file>`.
        on: the slice, such as v5p-256, v5p:4x4x8 or 2*v6e:16x16.
        project: Google Cloud project.
        zone: such as us-east5-a.
        bucket: gs://... for checkpoints and logs; every worker must see it.
        source: what to install: a wheel's path, git+https://...@COMMIT, or pypi==VERSION.
        name: of the queued resource and its nodes.
        runtime_version: TPU VM software; the generation's default if not given.
        spot: capacity that may be taken away at any time.
        reserved: capacity from a reservation.
        set: overrides of the experiment, checked here before anything is rented.
        seed: of the run.
        dry_run: print the commands and do nothing.
    """
    from jaxherd.core.targets import parse_target
    from jaxherd.planning.launch import launch_commands, perform

    target = parse_target(on)
    common.load_experiment(experiment, "full", set)
    arguments = ["--seed", str(seed)]
    for assignment in set:
        arguments += ["--set", assignment]
    commands = launch_commands(
        experiment,
        target,
        project=project,
        zone=zone,
        name=name,
        bucket=bucket,
        runtime_version=runtime_version,
        spot=spot,
        reserved=reserved,
        source=source,
        run_args=arguments,
    )
    perform(commands, dry_run=dry_run)
    return 0
