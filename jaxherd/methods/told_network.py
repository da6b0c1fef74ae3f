"""Telling how far a solver is: a network that reports every call from within a compiled program.

Which report is told is a number that the program is given, so that one program serves them all.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxherd.core.reports import Report

_numbers = itertools.count()
# What to do at a call, by the number of the report.
_told: dict[int, Callable[[], None]] = {}


def _tell(number: Any) -> None:
    tell = _told.get(int(number))
    if tell is not None:
        tell()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Told:
    """A network that says when it is called; nothing of it is static but the network's own."""

    model: Any
    number: Any

    @property
    def config(self) -> Any:
        return self.model.config

    def __call__(self, z, t, condition=None):
        jax.debug.callback(_tell, self.number)
        return self.model(z, t, condition)


@contextlib.contextmanager
def told(model: Any, report: Report | None, what: str, total: int) -> Iterator[Any]:
    """Give the network, telling `report` of each of `total` calls; itself without a report.

    All reports share a program with each other, and not with runs that have none: those call
    nothing on the host.  Calls are told until the block ends, which waits for them.
    """
    if report is None:
        yield model
        return
    number, calls = next(_numbers), itertools.count(1)
    _told[number] = lambda: report(what, next(calls), total)
    try:
        yield _Told(model, np.int32(number))
        jax.effects_barrier()
    finally:
        del _told[number]
