"""The command line as a user meets it: help that teaches, one sentence for what is wrong."""

import errno
import inspect
import json
import os
import shlex
import signal

import pytest
import tyro

from jaxherd.cli import run_
from jaxherd.cli.main import VERBS, main
from jaxherd.core import catalog, runner
from jaxherd.training.stage import TrainStage


def call(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_usage_names_every_verb(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_every_verb_has_an_explanation(capsys, verb):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"jaxherd {verb}" in capsys.readouterr().out


def test_unknown_verb_is_answered_with_the_nearest(capsys):
    status, _, err = call(capsys, "rnu")
    assert status == 2 and "did you mean 'run'" in err


WRONG = {
    "experiment": (["run", "llama4/scuot"], "did you mean 'llama4/scout'"),
    "override name": (
        ["run", "llama4/scout", "--set", "pretrain.optimizer.schedule.paek=1"],
        "did you mean 'peak'",
    ),
    "override value": (
        ["run", "llama4/scout", "--set", "pretrain.run_config.steps=many"],
        "wants a whole number",
    ),
    "slice": (["plan", "llama4/scout", "--on", "v5p:3x5x7"], "v5p"),
    "generation": (["plan", "llama4/scout", "--on", "v9x:4x4"], "v9x:4x4"),
    "heads that do not divide": (
        ["run", "llama4/scout", "--on", "cpu:8", "--set", "pretrain.layout.tensor=8"],
        "does not divide by 8",
    ),
    "devices": (["run", "llama4/scout", "--on", "cpu:64"], "XLA_FLAGS"),
    "model": (["generate", "no-such-model", "--prompt", "x"], "no-such-model"),
    "recipe": (
        ["inspect", "llama4/scout", "--no-batch", "--quantise", "int4_mixd"],
        "did you mean 'int4_mixed'? Choices: fp8_mixed, int4, ",
    ),
    "recipe without decoding": (["plan", "llama4/scout", "--quantise", "int8"], "add --decode"),
    "tokenizer": (
        ["run", "llama4/scout", "--set", "pretrain.data.tokenizer_config.vocab_size=12"],
        "vocab",
    ),  # fmt: skip
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_wrong_input_gives_one_sentence_and_writes_nothing(what, capsys, tmp_path, monkeypatch):
    arguments, told = WRONG[what]
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert told in err
    assert err.startswith("jaxherd: ") and err.count("\n") == 1
    assert not list(tmp_path.rglob("*"))


def test_list_is_json(capsys):
    status, out, _ = call(capsys, "list", "--json")
    rows = {row["experiment"]: row for row in json.loads(out)}
    assert status == 0
    assert rows["llama4/scout"]["scales"]["full"]["parameters"] == 107_769_861_120
    assert rows["llama4/scout"]["scales"]["full"]["target"] == "v5p:4x4x8"


def test_inspect_counts_without_data(capsys):
    status, out, _ = call(capsys, "inspect", "llama4/scout", "--on", "v5p:4x4x8", "--json")
    stage = json.loads(out)["stages"][0]
    assert status == 0
    assert stage["parameters"] == 107_769_861_120
    assert stage["active_parameters"] == 17_172_894_720
    # 12 bytes a parameter over 128 chips, as the optimiser keeps two float32 moments.
    assert stage["state_gib_per_device"] == pytest.approx(107.77e9 * 12 / 128 / 2**30, rel=0.02)
    # Six FLOPs per active weight and token, and the attention scores.
    assert stage["flops_per_token"] == pytest.approx(6 * 16.1e9, rel=0.15)


def test_inspect_counts_the_bytes_that_serve(capsys):
    stage = inspected(capsys, "--on", "v5p:4x4x8", "--quantise", "int4_mixed")
    found = stage["served_bytes"]
    assert found["int8"] * 2 == 102_676_561_920  # two experts' weights a byte
    assert found["total"] == found["int8"] + found["float32"] + found["bfloat16"]
    assert found["total"] < 65e9


def inspected(capsys, *arguments):
    status, out, err = call(capsys, "inspect", "llama4/scout", "--json", "--no-batch", *arguments)
    assert status == 0, err
    return json.loads(out)["stages"][0]


def test_inspect_counts_slices(capsys):
    one = inspected(capsys, "--on", "v5p:4x4x8")
    two = inspected(capsys, "--on", "2*v5p:4x4x8")
    assert one["layout"] == {"fsdp": 8, "expert": 16} and "problem" not in one
    assert two["layout"] == {"slice": 2, "fsdp": 8, "expert": 16}
    # Slices hold copies of the state.
    assert two["state_gib_per_device"] == one["state_gib_per_device"]
    assert "does not divide by 256" in two["problem"]
    fitting = ("--on", "2*v5p:4x4x8", "--set", "pretrain.data.batch_size=256")
    assert "problem" not in inspected(capsys, *fitting)


def test_inspect_counts_the_state_as_it_is_stored(capsys):
    whole = inspected(capsys, "--on", "cpu")
    half = inspected(capsys, "--on", "cpu", "--set", "pretrain.step.param_dtype=bfloat16")
    average = inspected(capsys, "--on", "cpu", "--set", "pretrain.step.average_decay=0.99")
    parameters = whole["parameters"] / 2**30
    assert whole["state_gib_per_device"] == pytest.approx(12 * parameters, rel=1e-3)
    # Moments follow the parameters' dtype.
    assert half["state_gib_per_device"] == pytest.approx(6 * parameters, rel=1e-3)
    assert average["state_gib_per_device"] == pytest.approx(16 * parameters, rel=1e-3)


def test_inspect_decodes_a_batch(capsys):
    status, out, _ = call(capsys, "inspect", "llama4/scout", "--on", "cpu")
    assert status == 0 and "one batch, decoded" in out and "NoPE" in out and "16 experts" in out


def test_inspect_lists_every_stage_and_says_the_scale(capsys):
    arguments = ("inspect", "melodyflow/text_to_music", "--on", "cpu", "--no-batch")
    status, out, _ = call(capsys, *arguments, "--json")
    stages = json.loads(out)["stages"]
    assert status == 0
    assert [stage["name"] for stage in stages] == ["codec", "latents", "flow", "samples"]
    assert [stage["reads"] for stage in stages] == [
        [], ["codec"], ["latents"], ["codec", "latents", "flow"]
    ]  # fmt: skip
    assert all(stage["does"] and stage["writes"] for stage in stages)
    assert "parameters" in stages[2] and "parameters" not in stages[1]
    _, out, _ = call(capsys, *arguments)
    assert "This is the scale 'cpu'; --scale gpu or --scale full shows another." in out
    assert "stage latents" in out and "codec, latents, flow" in out and "index.json" in out


def test_inspect_prints_the_fields_that_can_be_set(capsys):
    arguments = ("inspect", "melodyflow/text_to_music", "--on", "cpu", "--fields")
    status, out, _ = call(capsys, *arguments, "--set", "codec.objective.stereo=separate")
    lines = out.splitlines()
    assert status == 0 and all("=" in line for line in lines)
    assert "codec.objective.stereo=separate" in lines and "samples.plan.cfg_coef=4.0" in lines
    fields = json.loads(call(capsys, *arguments, "--json")[1])
    assert [f"{k}={v}" for k, v in fields.items() if k != "codec.objective.stereo"] == [
        line for line in lines if not line.startswith("codec.objective.stereo")
    ]
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "--fields" in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb, number, status, told",
    [
        ("run", signal.SIGINT, 130, "jaxherd: interrupted; run the same command to go on.\n"),
        ("run", signal.SIGTERM, 143, "jaxherd: interrupted; run the same command to go on.\n"),
        ("inspect", signal.SIGINT, 130, "jaxherd: interrupted.\n"),
    ],
)
def test_a_signal_ends_a_verb_with_one_line(capsys, monkeypatch, verb, number, status, told):
    def stopped(*arguments, **named):
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(catalog, "load", stopped)
    # A job that a shell runs in the background ignores interrupts.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert call(capsys, verb, "llama4/scout") == (status, "", told)
    finally:
        signal.signal(signal.SIGINT, interrupts)
    assert signal.getsignal(signal.SIGTERM) is before


def test_several_overrides_count(capsys):
    status, out, _ = call(
        capsys, "inspect", "llama4/scout", "--on", "cpu", "--json", "--no-batch",
        "--set", "pretrain.run_config.steps=70", "--set", "optimizer.clip=none",
    )  # fmt: skip
    stage = json.loads(out)["config"]["stages"][0]
    assert status == 0
    assert stage["run_config"]["steps"] == 70 and stage["optimizer"]["clip"] is None


def test_launch_dry_run_prints_copyable_commands(capsys):
    status, out, _ = call(
        capsys, "launch", "llama4/scout", "--on", "v5p-256", "--project", "my-project",
        "--zone", "us-east5-a", "--bucket", "gs://my-bucket/runs", "--dry-run",
        "--source", "git+https://host/owner/repository@0123abc",
        "--set", "pretrain.run_config.steps=10", "--set", "optimizer.clip=none",
    )  # fmt: skip
    assert status == 0
    assert "queued-resources create" in out and "--accelerator-type=v5p-256" in out
    assert "jaxherd run llama4/scout --on v5p:4x4x8" in out
    # The command that the workers get is one that the verb `run` understands.
    start = next(line for line in out.splitlines() if "jaxherd run" in line and "nohup" in line)
    remote = next(a for a in shlex.split(start) if a.startswith("--command="))
    loop = shlex.split(remote.removeprefix("--command="))[3]
    words = shlex.split(loop[loop.index("jaxherd run") : loop.index("; status=")])
    given = {}

    def run(experiment, /, **arguments):
        given.update(arguments, experiment=experiment)

    run.__signature__ = inspect.signature(run_.main)
    run.__annotations__ = run_.main.__annotations__
    tyro.cli(run, args=words[2:])
    assert given["experiment"] == "llama4/scout" and given["on"] == "v5p:4x4x8"
    assert given["set"] == ("pretrain.run_config.steps=10", "optimizer.clip=none")
    assert given["seed"] == 0


def test_launch_asks_what_to_install(capsys):
    """The package index's name need not be the project's."""
    with pytest.raises(SystemExit):
        main(["launch", "llama4/scout", "--on", "v5p-256", "--project", "my-project",
              "--zone", "us-east5-a", "--bucket", "gs://my-bucket/runs", "--dry-run"])  # fmt: skip
    assert "--source" in capsys.readouterr().err


def test_a_full_disk_has_its_own_status(capsys, monkeypatch):
    def fail(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runner, "_run_stages", fail)
    monkeypatch.setattr(runner, "prepare_folder", lambda workdir: [])
    monkeypatch.setattr(runner, "_claim", lambda *arguments: False)
    monkeypatch.setattr(TrainStage, "check", lambda *arguments: None)
    status, _, err = call(capsys, "run", "llama4/scout", "--quiet")
    assert status == 74
    assert "is full: make room" in err and err.count("\n") == 1
