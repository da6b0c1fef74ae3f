"""Telling how far long work is, by whoever does it to whoever shows it."""

import contextlib
from collections.abc import Callable, Iterator

# Called with what is being done, how much of it is done, and how much there is.  A call with
# nothing done announces work that may be silent for a while.
Report = Callable[[str, int, int], None]


@contextlib.contextmanager
def announced(report: Report | None, what: str) -> Iterator[None]:
    """Tell `report`, if there is one, that one piece of work begins and that it is done."""
    if report is not None:
        report(what, 0, 1)
    yield
    if report is not None:
        report(what, 1, 1)
