"""How far work is: a bar on a terminal, plain lines on standard error where there is none."""

import sys
import time
from typing import Any

# Between two lines of one kind of work where there is no terminal, in seconds.
_PAUSE = 10.0


class Progress:
    """Shows how far a run is, with its loss, speed and time left.

    The first step holds the compilation: until it is done "compiling" is shown, and speed and time
    left are those of the steps after it.

    Args:
      title: of the bar.
      total: steps of the whole run.
      start: steps already done.
      unit: what `amount` counts, such as "tokens".
      quiet: show nothing.
    """

    def __init__(self, title: str, total: int, start: int, unit: str, *, quiet: bool = False):
        self._title, self._total, self._unit = title, total, unit
        self._bar, self._task = None, None
        self._lines = not quiet and not sys.stderr.isatty()
        self._last_line = time.monotonic()
        # (when, steps, units) of the last steps, from the first one that this process has made.
        self._seen: list[tuple[float, int, int | float]] = []
        if self._lines and start < total:
            _print_line(f"{title}: compiling the step")
        if quiet or self._lines:
            return
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]}"),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TextColumn("ETA {task.fields[eta]}"),
        )
        self._task = self._bar.add_task(
            title, total=total, completed=start, loss="-", speed="compiling", eta="-"
        )
        self._bar.start()

    def update(self, step: int, amount: int | float, loss: float | None) -> None:
        """Show that `step` steps are done; `amount` units were processed in this one.

        A step whose batch held nothing to learn from has no loss.
        """
        now = time.monotonic()
        done = self._seen[-1][2] + amount if self._seen else 0.0
        self._seen = [*self._seen, (now, step, done)][-50:]
        fields: dict[str, Any] = {
            "loss": "-" if loss is None else f"{loss:.3f}",
            **self._pace(step),
        }
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, **fields)
        elif self._lines and (now - self._last_line > _PAUSE or step == self._total):
            self._last_line = now
            _print_line(
                f"{self._title} {step}/{self._total} loss {fields['loss']} "
                f"{fields['speed']} ETA {fields['eta']}"
            )

    def _pace(self, step: int) -> dict[str, str]:
        """Return speed and time left by the steps that were seen, unknown until there are two."""
        (then, first, before), (now, _, done) = self._seen[0], self._seen[-1]
        if step == first:
            return {"speed": f"- {self._unit}/s", "eta": "-"}
        seconds = max(now - then, 1e-9)
        left = int((self._total - step) * seconds / (step - first))
        return {
            "speed": f"{_short((done - before) / seconds)} {self._unit}/s",
            "eta": f"{left // 60}:{left % 60:02d}",
        }

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Counts:
    """Shows counts of long work, such as recordings decoded: a `jaxherd.core.reports.Report`.

    On a terminal a bar for every kind of work.  Elsewhere a line: at once for work that is
    announced by a count of 0, and else every ten seconds.

    Args:
      title: whose work it is, for lines.
      quiet: show nothing.
    """

    def __init__(self, title: str = "", *, quiet: bool = False):
        self._before = f"{title}: " if title else ""
        self._quiet, self._bar = quiet, None
        self._lines = not sys.stderr.isatty()
        self._tasks: dict[str, Any] = {}
        self._last_line = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` pieces of the work called `what` are done."""
        if self._quiet:
            return
        if self._lines:
            now = time.monotonic()
            if not done or (done < total and now - self._last_line > _PAUSE):
                self._last_line = now
                count = f": {done} of {total}" if total > 1 else ""
                _print_line(f"{self._before}{what}{count}")
            return
        bar = self._started()
        if what not in self._tasks:
            self._tasks[what] = bar.add_task(self._before + what, total=total)
        bar.update(self._tasks[what], completed=done)

    def _started(self) -> Any:
        # Not before there is something to show: a bar takes the terminal from other bars.
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self._bar

    def close(self) -> None:
        """Take the bars away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}

    def __enter__(self) -> "Counts":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _short(number: int | float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"
