"""Run an experiment on a TPU slice: the gcloud commands, shown or performed.

Steps: ask for the slice as a queued resource, wait until it is active, install jaxherd on every
worker, start the same `jaxherd run` on every worker, follow the log; later, delete.  The run is
started detached and is started again when it fails, so it resumes from the bucket's last
checkpoint; a dropped connection does not stop it.

Facts from Google Cloud's reference of `gcloud compute tpus queued-resources` and `tpu-vm`:
one node takes `--node-id`, several `--node-count` and `--node-prefix` (nodes are then called
PREFIX-0, PREFIX-1, ...); a shape other than the type's usual one takes `--type` and `--topology`.
TPU7x is offered through Google Kubernetes Engine only.

No shell is involved here: commands are argument lists.  The one text a remote shell reads is
quoted piece by piece, and every name is checked against the form Google Cloud allows.
"""

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxherd.core.errors import JaxherdError, StorageError
from jaxherd.core.targets import Target

# Google Cloud's TPU software versions for JAX (Cloud TPU, "TPU VM runtime versions").
RUNTIME_VERSIONS = {
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_TYPES = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_FORMS = {
    "project": (r"(?:[a-z][a-z0-9.\-]{0,60}:)?[a-z][a-z0-9\-]{4,28}[a-z0-9]", "my-project-1"),
    "zone": (r"[a-z]+-[a-z]+\d{1,2}-[a-z]", "us-east5-a"),
    "name": (r"[a-z](?:[a-z0-9\-]{0,38}[a-z0-9])?", "scout-1"),
    "runtime version": (r"[a-z0-9][a-z0-9.\-]{1,60}", "v2-alpha-tpuv5"),
    "bucket": (
        r"gs://[a-z0-9][a-z0-9._\-]{1,61}[a-z0-9](?:/[A-Za-z0-9._\-]+)*/?",
        "gs://my-bucket",
    ),
    "git source": (
        r"git\+https://[A-Za-z0-9.\-]+(?:/[A-Za-z0-9._\-]+)+@[A-Za-z0-9._/\-]+",
        "git+https://github.com/owner/repository@COMMIT",
    ),
    "version": (r"[0-9][0-9A-Za-z.+!]{0,40}", "0.1.0"),
    "experiment": (
        r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*",
        "llama4/scout",
    ),
}
_WAIT_SECONDS = 30
_PYTHON = "3.12"

# Google's package archive for gcsfuse, which Ubuntu's own does not hold (Cloud Storage FUSE, "Install").
_GCSFUSE = (
    "command -v gcsfuse > /dev/null || { "
    "curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg "
    "| sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null; "
    'echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] '
    'https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" '
    "| sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null; "
    "sudo apt-get -q update; sudo apt-get -y -q install gcsfuse; }; "
)
# Orbax commits a checkpoint by renaming its folder.  A bucket without a hierarchical namespace
# knows no folders, and gcsfuse refuses to rename one with this many files or more; its default, 0,
# refuses all.
_RENAME_LIMIT = 1_000_000
# Seconds before a run is started again; a full or unreachable disk wants some time.
_PAUSE, _STORAGE_PAUSE = 15, 300


@dataclass(frozen=True)
class Command:
    """One step of a launch."""

    purpose: str
    argv: tuple[str, ...]
    until: str | None = None
    """Repeat until the output is this word, as for a queued resource's state."""
    fails_on: tuple[str, ...] = ()
    """Words of the output that end the wait."""
    at_end: bool = False
    """Not part of the launch: printed for later (following the log, deleting)."""

    @property
    def shell(self) -> str:
        """The command as one copyable line of shell."""
        line = shlex.join(self.argv)
        if self.until is None:
            return line
        failed = " ".join(
            f'[ "$state" = {shlex.quote(word)} ] && exit 1;' for word in self.fails_on
        )
        return (
            f'until state="$({line})"; [ "$state" = {shlex.quote(self.until)} ]; '
            f"do {failed} sleep {_WAIT_SECONDS}; done"
        )


def _check(kind: str, value: str) -> str:
    form, example = _FORMS[kind]
    if not re.fullmatch(form, value):
        raise JaxherdError(f"{value!r} is not a valid {kind}; one looks like {example!r}.")
    return value


def _install(source: str, name: str, copy: Callable[[Path], Command]) -> tuple[list[Command], str]:
    """Return the copies needed first and the requirement that pip is given on the worker."""
    if source.startswith("pypi=="):
        version = _check("version", source.removeprefix("pypi=="))
        return [], f"jaxherd[tpu,demo,remote]=={version}"
    if source.startswith("git+"):
        return [], f"jaxherd[tpu,demo,remote] @ {_check('git source', source)}"
    wheel = Path(source)
    if wheel.suffix == ".whl":
        if not re.fullmatch(r"jaxherd-[A-Za-z0-9.+!]+-py3-none-any\.whl", wheel.name):
            raise JaxherdError(
                f"{source!r} is not a jaxherd wheel: build one with `python -m build`."
            )
        if not wheel.is_file():
            raise JaxherdError(f"The wheel {source!r} does not exist: build it first.")
        return [copy(wheel)], f"jaxherd[tpu,demo,remote] @ file:///tmp/{wheel.name}"
    raise JaxherdError(
        f"Unknown source {source!r}: give the path of a wheel, "
        "'git+https://host/owner/repository@COMMIT', or 'pypi==VERSION'."
    )


def _remote_run(experiment: str, target: Target, workdir: str, run_args: Sequence[str]) -> str:
    """Return the shell text that starts the run on a worker, detached, restarted on failure.

    The bucket is mounted with gcsfuse, so that checkpoints and logs are ordinary files.

    Exit status 2 is bad input, which no restart mends; 130 and 143 are a stop that was asked for; 74
    a disk that could not be written, which gets more time.
    """
    run = ["jaxherd", "run", experiment, "--on", target.name]
    bucket, _, folder = workdir.removeprefix("gs://").partition("/")
    mounted = f'"$HOME"/jaxherd-bucket/{shlex.quote(folder)}'
    loop = (
        ". ~/jaxherd-env/bin/activate; mkdir -p ~/jaxherd-bucket; "
        "mountpoint -q ~/jaxherd-bucket || gcsfuse --implicit-dirs "
        f"--rename-dir-limit={_RENAME_LIMIT} {shlex.quote(bucket)} ~/jaxherd-bucket || exit 2; "
        "for attempt in $(seq 1 100); do "
        f"{shlex.join(run)} --workdir {mounted} {shlex.join(run_args)}; status=$?; "
        f'case "$status" in 0|2|130|143) exit "$status";; {StorageError.exit_status}) '
        f"pause={_STORAGE_PAUSE};; *) pause={_PAUSE};; esac; "
        'echo "jaxherd launch: attempt $attempt ended with $status, resuming in $pause s"; '
        'sleep "$pause"; done'
    )
    return f"nohup bash -c {shlex.quote(loop)} >> ~/jaxherd.log 2>&1 < /dev/null & echo started"


def launch_commands(
    experiment: str,
    target: Target,
    *,
    project: str,
    zone: str,
    name: str,
    bucket: str,
    source: str,
    runtime_version: str | None = None,
    spot: bool = False,
    reserved: bool = False,
    run_args: Sequence[str] = (),
) -> list[Command]:
    """Return the commands that rent `target` and run `experiment` on all its workers.

    Args:
        experiment: `<paper>/<file>`.
        target: a TPU slice or several.
        project: Google Cloud project.
        zone: such as `us-east5-a`.
        name: of the queued resource and its nodes.
        bucket: `gs://...`, where the run keeps checkpoints and logs (all workers must see it).
        runtime_version: TPU VM software; default by generation.
        spot: ask for capacity that may be taken away at any time.
        reserved: take it from a reservation.
        source: what the workers install: the path of a local wheel, `git+https://...@COMMIT`, or
            `pypi==VERSION`.
        run_args: further arguments of `jaxherd run`.

    Raises:
        JaxherdError: something has not the form that Google Cloud allows, or the target cannot be
            had this way.
    """
    if target.kind != "tpu":
        raise JaxherdError(
            f"launch rents TPU slices, and {target.name!r} is none: use jaxherd run."
        )
    if target.family == "tpu7x":
        raise JaxherdError(
            f"{target.name!r} is offered through Google Kubernetes Engine only: "
            "create the node pool there and start `jaxherd run` in its pods."
        )
    if spot and reserved:
        raise JaxherdError("Choose either spot or reserved capacity, not both.")
    for kind, value in (("project", project), ("zone", zone), ("name", name), ("bucket", bucket)):
        _check(kind, value)
    _check("experiment", experiment)
    if ".." in bucket or ".." in experiment:
        raise JaxherdError(f"{bucket if '..' in bucket else experiment!r} must not contain '..'.")
    runtime = _check("runtime version", runtime_version or RUNTIME_VERSIONS[target.family])
    for argument in run_args:
        if not argument.isprintable():
            raise JaxherdError(f"The run argument {argument!r} holds control characters.")

    place = (f"--project={project}", f"--zone={zone}")
    tpus = ("gcloud", "compute", "tpus")
    queued = (*tpus, "queued-resources")
    if target.default_topology:
        shape = (f"--accelerator-type={target.accelerator_type}",)
    else:
        topology = "x".join(map(str, target.topology))
        shape = (f"--type={_TYPES[target.family]}", f"--topology={topology}")
    if target.num_slices == 1:
        nodes, node_flags = [name], (f"--node-id={name}",)
    else:
        nodes = [f"{name}-{index}" for index in range(target.num_slices)]
        node_flags = (f"--node-count={target.num_slices}", f"--node-prefix={name}")
    tier = ("--spot",) * spot + ("--reserved",) * reserved
    commands = [
        Command(
            f"ask for {target.name} ({target.chips} chips, {target.hosts} workers)",
            (*queued, "create", name, *place, *shape, *node_flags, f"--runtime-version={runtime}")
            + tier,
        ),
        Command(
            "wait until the slice is there",
            (*queued, "describe", name, *place, "--format=value(state.state)"),
            until="ACTIVE",
            fails_on=("FAILED", "SUSPENDED", "SUSPENDING"),
        ),
    ]

    def on_all(node: str, purpose: str, text: str, at_end: bool = False) -> Command:
        argv = (*tpus, "tpu-vm", "ssh", node, *place, "--worker=all", f"--command={text}")
        return Command(purpose, argv, at_end=at_end)

    workdir = f"{bucket.rstrip('/')}/{name}"
    for node in nodes:

        def copy(wheel: Path, node: str = node) -> Command:
            files = (str(wheel), f"{node}:/tmp/{wheel.name}")
            argv = (*tpus, "tpu-vm", "scp", *files, *place, "--worker=all")
            return Command(f"copy the wheel to {node}", argv)

        copies, requirement = _install(source, name, copy)
        commands += copies
        # The image's own Python (3.10 on Ubuntu 22.04) is older than jaxherd needs; uv brings one.
        install = (
            f"set -e; {_GCSFUSE}"
            "python3 -m pip install -q --user uv; "
            "[ -x ~/jaxherd-env/bin/python ] || "
            f"~/.local/bin/uv venv -q --python {_PYTHON} ~/jaxherd-env; "
            "~/.local/bin/uv pip install -q --python ~/jaxherd-env/bin/python "
            f"{shlex.quote(requirement)}"
        )
        commands.append(on_all(node, f"install jaxherd on all workers of {node}", install))
    # All slices are ready before the first one starts: workers wait for each other.
    run = _remote_run(experiment, target, workdir, run_args)
    commands += [on_all(node, f"start the run on all workers of {node}", run) for node in nodes]
    first = nodes[0]
    follow = (*tpus, "tpu-vm", "ssh", first, *place, "--worker=0")
    follow += ("--command=tail -n 200 -f ~/jaxherd.log",)
    stop = "pkill -INT -f 'jaxherd-env/bin/[j]axherd run' || true"
    commands.append(Command("follow the log", follow, at_end=True))
    commands += [on_all(node, f"stop the run on {node}", stop, at_end=True) for node in nodes]
    delete = (*queued, "delete", name, *place, "--force", "--quiet")
    commands.append(Command("give the slice back", delete, at_end=True))
    return commands


def render_commands(commands: Sequence[Command]) -> str:
    """Return all commands as copyable shell, those for later commented out."""
    lines = []
    for command in commands:
        lines.append(f"# {'later: ' if command.at_end else ''}{command.purpose}")
        lines.append(f"{'# ' if command.at_end else ''}{command.shell}")
        lines.append("")
    return "\n".join(lines)


def perform(
    commands: Sequence[Command],
    dry_run: bool,
    *,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
    wait_seconds: float | int = 24 * 3600,
) -> None:
    """Run the commands one after the other, or print them all.

    Raises:
        JaxherdError: gcloud is missing, a command failed, or the slice did not come in time.
    """
    if dry_run:
        say(render_commands(commands))
        return
    if shutil.which("gcloud") is None:
        raise JaxherdError(
            "launch needs the gcloud command of the Google Cloud SDK, which is not installed: see "
            "https://cloud.google.com/sdk/docs/install, or use --dry-run to see the commands."
        )
    for command in commands:
        if command.at_end:
            continue
        say(f"{command.purpose}: {command.shell}")
        if command.until is None:
            if subprocess.run(command.argv, check=False).returncode != 0:
                raise JaxherdError(
                    f"Could not {command.purpose}: gcloud's message is above; "
                    "give the slice back with the last command of --dry-run."
                )
            continue
        _wait(command, say, sleep, wait_seconds)
    later = [command for command in commands if command.at_end]
    if later:
        say(render_commands(later))


def _wait(
    command: Command,
    say: Callable[[str], None],
    sleep: Callable[[float], None],
    wait_seconds: float | int,
) -> None:
    waited, state = 0.0, ""
    while True:
        result = subprocess.run(command.argv, capture_output=True, text=True, check=False)
        # gcloud's errors may pass (network, sign-in renewal): show the last line and keep waiting.
        lines = (result.stdout.strip() or result.stderr.strip() or "unknown").splitlines()
        latest = lines[-1]
        if latest != state:
            state = latest
            say(f"  {state}")
        if state == command.until:
            return
        if state in command.fails_on:
            raise JaxherdError(f"Could not {command.purpose}: the queued resource is {state}.")
        if waited >= wait_seconds:
            raise JaxherdError(
                f"Gave up after {waited / 3600:.1f} h: the queued resource is {state}; "
                "it stays in the queue until it is deleted."
            )
        sleep(_WAIT_SECONDS)
        waited += _WAIT_SECONDS
