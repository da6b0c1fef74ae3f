"""Telling how far a solver is: a network that reports every call from within a compiled program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

# Called with what is being done, how much of it is done, and how much there is.
Report = Callable[[str, int, int], None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Told:
    """A network that says when it is called.  A program with it is compiled for every run."""

    model: Any
    tell: Callable[[], None] = dataclasses.field(metadata={"static": True})

    @property
    def config(self) -> Any:
        return self.model.config

    def __call__(self, z, t, condition=None):
        jax.debug.callback(self.tell)
        return self.model(z, t, condition)


def told(model: Any, report: Report | None, what: str, total: int) -> Any:
    """Return the network, telling `report` of each of `total` calls; itself without a report."""
    if report is None:
        return model
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        report(what, done, total)

    return _Told(model, tell)
