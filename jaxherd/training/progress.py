"""A progress bar with loss, speed and time left; plain lines where there is no terminal."""

import sys
import time
from typing import Any


class Progress:
    """Shows how far a run is.

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
        self._seen: list[tuple[float, int, int | float]] = [(time.monotonic(), start, 0.0)]
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

    def update(self, step: int, amount: int | float, loss: float) -> None:
        """Show that `step` steps are done; `amount` units were processed in this one."""
        now = time.monotonic()
        done = self._seen[-1][2] + amount
        self._seen.append((now, step, done))
        self._seen = self._seen[-50:]
        first = self._seen[0] if len(self._seen) < 50 else self._seen[-50]
        seconds = max(now - first[0], 1e-9)
        rate = (done - first[2]) / seconds
        left = (self._total - step) * seconds / max(step - first[1], 1)
        fields: dict[str, Any] = {
            "loss": f"{loss:.3f}",
            "speed": f"{_short(rate)} {self._unit}/s",
            "eta": f"{int(left) // 60}:{int(left) % 60:02d}",
        }
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, **fields)
        elif self._lines and (now - self._last_line > 10 or step == self._total):
            self._last_line = now
            print(
                f"{self._title} {step}/{self._total} loss {fields['loss']} "
                f"{fields['speed']} ETA {fields['eta']}",
                file=sys.stderr,
                flush=True,
            )

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


def _short(number: int | float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"
