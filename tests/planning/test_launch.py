"""Launching: the commands, the checks, and nothing that a shell could misread."""

import shlex
import subprocess

import pytest

from jaxherd.core import resources
from jaxherd.core.errors import JaxherdError, StorageError
from jaxherd.core.targets import parse_target
from jaxherd.planning import launch
from jaxherd.planning.launch import Command, launch_commands, perform, render_commands

GOOD = dict(
    project="my-project",
    zone="us-east5-a",
    name="scout-1",
    bucket="gs://my-bucket/runs",
    source="git+https://github.com/owner/repository@0123abc",
)


def commands(target="v5p-256", experiment="llama4/scout", **changes):
    return launch_commands(experiment, parse_target(target), **(GOOD | changes))


def test_one_slice():
    steps = commands(spot=True, run_args=("--set", "optimiser.peak=3e-4"))
    create = steps[0].argv
    assert create[:6] == ("gcloud", "compute", "tpus", "queued-resources", "create", "scout-1")
    assert {"--accelerator-type=v5p-256", "--node-id=scout-1", "--spot"} <= set(create)
    assert "--runtime-version=v2-alpha-tpuv5" in create
    assert "--reserved" not in create
    wait = steps[1]
    assert wait.until == "ACTIVE" and "FAILED" in wait.fails_on
    run = next(step for step in steps if "start the run" in step.purpose)
    assert "--worker=all" in run.argv
    assert "--on v5p:4x4x8" in run.argv[-1] and "gcsfuse --implicit-dirs" in run.argv[-1]
    assert "jaxherd-bucket/runs/scout-1" in run.argv[-1]
    assert steps[-1].argv[4] == "delete" and steps[-1].at_end


def test_several_slices_and_unusual_topology():
    steps = commands("2*v5p:4x4x12", reserved=True)
    assert {"--node-count=2", "--node-prefix=scout-1", "--reserved"} <= set(steps[0].argv)
    starts = [s for s in steps if "start the run" in s.purpose]
    assert [s.argv[5] for s in starts] == ["scout-1-0", "scout-1-1"]
    installs = [i for i, s in enumerate(steps) if "install" in s.purpose]
    assert max(installs) < steps.index(starts[0])
    # v5p-1024 stands for 8x8x8; 4x8x16 has to be asked for by topology.
    steps = commands("v5p:4x8x16")
    assert {"--type=v5p", "--topology=4x8x16"} <= set(steps[0].argv)
    assert not any(a.startswith("--accelerator-type") for a in steps[0].argv)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(project="my project; rm -rf /"), "project"),
        (dict(project="--help"), "project"),
        (dict(zone="us-east5-a; reboot"), "zone"),
        (dict(zone="$(reboot)"), "zone"),
        (dict(name="scout_1"), "name"),
        (dict(name="-x"), "name"),
        (dict(name="a" * 60), "name"),
        (dict(name="scout\n1"), "name"),
        (dict(bucket="my-bucket"), "bucket"),
        (dict(bucket="gs://my-bucket/`id`"), "bucket"),
        (dict(bucket="gs://my-bucket/a b"), "bucket"),
        (dict(bucket="gs://my-bucket/../other"), r"\.\."),
        (dict(experiment="llama4/scout;id"), "experiment"),
        (dict(experiment="--help"), "experiment"),
        (dict(runtime_version="v2 alpha"), "runtime version"),
        (dict(source="git+https://host/owner/repo;id"), "git source"),
        (dict(source="git+ssh://host/x"), "git source"),
        (dict(source="git+https://github.com/owner/repository"), "git source"),
        (dict(source="pypi"), "Unknown source"),
        (dict(source="ftp://x"), "source"),
        (dict(source="missing.whl"), "wheel"),
        (dict(source="jaxherd-0.1.0-py3-none-any.whl"), "does not exist"),
        (dict(source="pypi==1; id"), "version"),
        (dict(spot=True, reserved=True), "not both"),
        (dict(target="cpu:8"), "TPU slices"),
        (dict(target="tpu7x:4x4x4"), "Kubernetes"),
        (dict(run_args=("a\nb",)), "control characters"),
    ],
)
def test_bad_input_is_refused(changes, word):
    with pytest.raises(JaxherdError, match=word) as error:
        commands(**changes)
    assert "\n" not in str(error.value)


@pytest.fixture
def worker(tmp_path):
    """Return a function that runs a remote text in a real shell, with programs made of text."""
    binaries = tmp_path / "jaxherd-env" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')

    def act(command: Command, **programs: str) -> int:
        for name, script in programs.items():
            (binaries / name).write_text(f"#!/bin/bash\n{script}\n")
            (binaries / name).chmod(0o755)
        # In the foreground, so that the test need not wait for a file.
        text = command.argv[-1].removeprefix("--command=").replace(" & echo started", "")
        environment = {"HOME": str(tmp_path), "PATH": f"{binaries}:/usr/bin:/bin"}
        done = subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, env=environment, check=False, timeout=20
        )
        return done.returncode

    return act


MOUNT = 'printf "%s\\n" "$@" > ~/mounted'


def started(**changes) -> Command:
    return next(s for s in commands(**changes) if "start the run" in s.purpose)


@pytest.mark.parametrize(
    "argument", ["$(touch HIT)", "`touch HIT`", "'; touch HIT; '", 'a"b', "a b"]
)
def test_arguments_reach_the_program_unchanged(argument, tmp_path, worker):
    program = 'printf "%s\\n" "$@" > ~/arguments'
    assert worker(started(run_args=(argument,)), jaxherd=program, gcsfuse=MOUNT) == 0
    assert (tmp_path / "arguments").read_text().splitlines()[-1] == argument
    assert f"{tmp_path}/jaxherd-bucket/runs/scout-1" in (tmp_path / "arguments").read_text()
    assert not (tmp_path / "HIT").exists()


def test_the_bucket_is_mounted_so_that_folders_can_be_renamed(tmp_path, worker):
    """Orbax commits by a rename, which gcsfuse refuses by default."""
    assert worker(started(), jaxherd="exit 0", gcsfuse=MOUNT) == 0
    *options, bucket, folder = (tmp_path / "mounted").read_text().splitlines()
    assert (bucket, folder) == ("my-bucket", f"{tmp_path}/jaxherd-bucket")
    limits = [o.partition("=")[2] for o in options if o.startswith("--rename-dir-limit=")]
    assert len(limits) == 1 and int(limits[0]) >= 100_000


@pytest.mark.parametrize(
    ("statuses", "ends", "pauses"),
    [
        ((2,), 2, []),
        ((130,), 130, []),
        ((143,), 143, []),
        ((1, 0), 0, [15]),
        # A disk that could not be written: again, but later.
        ((StorageError.exit_status, 0), 0, [300]),
        ((StorageError.exit_status, 137, 2), 2, [300, 15]),
    ],
)
def test_what_starts_a_run_again(statuses, ends, pauses, tmp_path, worker):
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    program = "read -r status < ~/statuses; sed -i 1d ~/statuses; exit $status"
    status = worker(
        started(), jaxherd=program, gcsfuse=MOUNT, sleep='echo "$@" >> ~/pauses; exit 0'
    )
    # `nohup bash -c ... &` in the foreground gives the loop's own status.
    assert status == ends
    found = tmp_path / "pauses"
    assert ([int(p) for p in found.read_text().split()] if found.exists() else []) == pauses


def test_gcsfuse_comes_from_googles_archive(tmp_path, worker):
    install = next(s for s in commands() if "install jaxherd" in s.purpose)
    # gcsfuse is looked for first; nothing else of the text may touch this machine.
    programs = dict(
        sudo='echo "sudo $*" >> ~/done; [ "$1" = tee ] && cat > ~/$(basename "$2"); exit 0',
        curl='echo "curl $*" >> ~/done; echo KEY',
        lsb_release="echo jammy",
        python3="exit 0",
    )
    (tmp_path / ".local" / "bin").mkdir(parents=True)
    uv = tmp_path / ".local" / "bin" / "uv"
    uv.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > ~/uv\n')
    uv.chmod(0o755)
    assert worker(install, **programs) == 0
    lines = (tmp_path / "gcsfuse.list").read_text().splitlines()
    assert lines == [
        "deb [signed-by=/usr/share/keyrings/cloud.google.asc] "
        "https://packages.cloud.google.com/apt gcsfuse-jammy main"
    ]
    assert (tmp_path / "cloud.google.asc").read_text() == "KEY\n"
    steps = (tmp_path / "done").read_text().splitlines()
    assert steps[-2:] == ["sudo apt-get -q update", "sudo apt-get -y -q install gcsfuse"]
    assert (tmp_path / "uv").read_text().splitlines()[-1].endswith("repository@0123abc")
    # A worker that has it already is left alone.
    (tmp_path / "done").unlink()
    assert worker(install, gcsfuse="exit 0", **programs) == 0
    assert not (tmp_path / "done").exists()


def test_dry_run_is_copyable_shell_and_starts_nothing(monkeypatch):
    monkeypatch.setattr(launch.subprocess, "run", lambda *a, **k: pytest.fail("ran something"))
    shown = []
    perform(commands(), dry_run=True, say=shown.append)
    text = "\n".join(shown)
    for step in commands():
        assert step.shell in text
    assert shlex.split(commands()[0].shell) == list(commands()[0].argv)
    checked = subprocess.Popen(["bash", "-n"], stdin=subprocess.PIPE, text=True)
    checked.communicate(text)
    assert checked.returncode == 0


def test_missing_gcloud(monkeypatch):
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    with pytest.raises(JaxherdError, match="gcloud"):
        perform(commands(), dry_run=False)


@pytest.fixture
def fake_gcloud(tmp_path, monkeypatch):
    """Put a `gcloud` on the path that logs its calls and goes through the given states."""

    def install(states, fails=False):
        (tmp_path / "states").write_text("\n".join(states) + "\n")
        script = tmp_path / "gcloud"
        script.write_text(
            f'#!/bin/bash\ncd {shlex.quote(str(tmp_path))}\necho "$4 $5" >> calls\n'
            'if [ "$4" = describe ]; then head -1 states; '
            '[ "$(wc -l < states)" -gt 1 ] && sed -i 1d states; exit 0; fi\n'
            f"exit {int(fails)}\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "calls"

    return install


def test_performs_in_order_and_waits(fake_gcloud):
    calls = fake_gcloud(["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    naps, shown = [], []
    perform(commands(), dry_run=False, say=shown.append, sleep=naps.append)
    assert len(naps) == 2
    lines = calls.read_text().splitlines()
    assert lines[0].startswith("create") and lines[-1].startswith("ssh")
    assert not any(line.startswith("delete") for line in lines)
    assert "give the slice back" in shown[-1]


def test_failed_request_and_failed_command(fake_gcloud):
    fake_gcloud(["FAILED"])
    with pytest.raises(JaxherdError, match="FAILED"):
        perform(commands(), dry_run=False, say=lambda text: None, sleep=lambda s: None)
    fake_gcloud(["ACTIVE"], fails=True)
    with pytest.raises(JaxherdError, match="Could not ask for v5p:4x4x8"):
        perform(commands(), dry_run=False, say=lambda text: None)


def test_gives_up_waiting(fake_gcloud):
    fake_gcloud(["WAITING_FOR_RESOURCES"])
    with pytest.raises(JaxherdError, match="Gave up"):
        perform(
            commands()[:2], dry_run=False, say=lambda t: None, sleep=lambda s: None, wait_seconds=60
        )


def test_sources(tmp_path):
    wheel = tmp_path / "jaxherd-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    steps = commands(source=str(wheel))
    copy = next(step for step in steps if "copy the wheel" in step.purpose)
    assert copy.argv[3:7] == ("tpu-vm", "scp", str(wheel), f"scout-1:/tmp/{wheel.name}")
    text = render_commands(commands(source="git+https://github.com/owner/repo@v1"))
    assert "git+https://github.com/owner/repo@v1" in text
    assert "jaxherd[tpu,demo,remote]==0.1.0" in render_commands(commands(source="pypi==0.1.0"))


def test_wait_loop_is_shell():
    line = Command("wait", ("echo", "ACTIVE"), until="ACTIVE", fails_on=("FAILED",)).shell
    assert subprocess.run(["bash", "-c", line], timeout=20, check=False).returncode == 0


@pytest.mark.parametrize(
    ("source", "requirement"),
    [
        ("git+https://host/o/r@abc", "jaxherd[tpu,demo,remote] @ git+https://host/o/r@abc"),
        ("pypi==0.1.0", "jaxherd[tpu,demo,remote]==0.1.0"),
        ("pypi", None),
        ("git+https://host/o/r", None),
    ],
)
def test_startup_script(tmp_path, source, requirement):
    script = resources.folder("tpu") / "startup.sh"
    programs = tmp_path / "bin"
    python = tmp_path / "jaxherd-env" / "bin" / "python"
    uv = tmp_path / ".local" / "bin" / "uv"
    for path, text in (
        (programs / "python3", "exit 0"),
        (python, "exit 0"),
        (uv, 'printf "%s\\n" "$@" > ~/uv'),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", str(script), source],
        env={"HOME": str(tmp_path), "PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    if requirement is None:
        assert done.returncode == 2 and "say what to install" in done.stderr
        assert not (tmp_path / "uv").exists()
    else:
        assert done.returncode == 0
        assert (tmp_path / "uv").read_text().splitlines()[-1] == requirement
