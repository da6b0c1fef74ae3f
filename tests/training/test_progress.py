"""What is shown of long work where there is no terminal."""

import pytest

from jaxherd.training import progress
from jaxherd.training.progress import Counts, Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that only stands still or is moved."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    return now


def test_compiling_is_said_and_does_not_count_in_speed_or_time_left(clock, capsys):
    shown = Progress("fit", 100, 0, "tokens")
    assert capsys.readouterr().err == "fit: compiling the step\n"
    clock[0] += 60.0  # the first step with its compilation
    shown.update(1, 1000, 2.0)
    assert capsys.readouterr().err == "fit 1/100 loss 2.000 - tokens/s ETA -\n"
    for step in range(2, 14):
        clock[0] += 1.0
        shown.update(step, 1000, 1.0)
    assert capsys.readouterr().err == "fit 12/100 loss 1.000 1.0k tokens/s ETA 1:28\n"


def test_a_step_without_anything_to_count_has_no_loss(clock, capsys):
    shown = Progress("fit", 1, 0, "tokens")
    shown.update(1, 10, None)
    assert "fit 1/1 loss - " in capsys.readouterr().err


def test_a_finished_run_compiles_nothing_and_a_quiet_one_is_quiet(clock, capsys):
    Progress("fit", 3, 3, "tokens")
    quiet = Progress("fit", 3, 0, "tokens", quiet=True)
    quiet.update(3, 1, 1.0)
    with Counts("fit", quiet=True) as report:
        report("decoding", 0, 3)
    assert capsys.readouterr().err == ""


def test_counts_are_announced_and_then_told_every_ten_seconds(clock, capsys):
    with Counts("codec") as report:
        report("fetching songs", 0, 1)
        report("fetching songs", 1, 1)
        report("decoding", 0, 30)
        for done in range(1, 31):
            clock[0] += 1.0
            report("decoding", done, 30)
    assert capsys.readouterr().err.splitlines() == [
        "codec: fetching songs",
        "codec: decoding: 0 of 30",
        "codec: decoding: 11 of 30",
        "codec: decoding: 22 of 30",
    ]


def test_on_a_terminal_there_is_a_bar_for_each_kind_of_work(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Counts("codec") as report:
        report("decoding", 3, 30)
        report("decoding", 4, 30)
        report("fetching", 1, 1)
        bar = report._started()
        found = [(t.description, t.completed, t.total) for t in bar.tasks]
    assert found == [("codec: decoding", 4, 30), ("codec: fetching", 1, 1)]
