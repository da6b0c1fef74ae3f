"""Phases of a step: parts of the parameters that are updated in turn, each by its own objective.

Most objectives have one phase that owns everything.  An adversarial pair has two: the first
updates the discriminator, the second the generator, which already sees the new discriminator.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import Tree, flatten, unflatten
from jaxherd.training.optimizers import Optimizer


@dataclasses.dataclass(frozen=True)
class Phase:
    """One update within a step.

    Attributes:
      name: unique in the objective; prefixes the metrics of all phases but the last.
      owns: prefixes of the names of the parameters that it updates, such as "discriminator/".
      objective: minimised over the owned parameters, at the others as earlier phases left them.
      optimizer: the stage's own when None.
    """

    name: str
    owns: tuple[str, ...]
    objective: Any
    optimizer: Optimizer | None = None

    def take(self, tree: Tree) -> tuple[Tree, Tree]:
        """Return (owned, rest) of a nested dictionary."""
        if self.owns == ("",):
            return tree, {}
        owned, rest = {}, {}
        for name, leaf in flatten(tree).items():
            (owned if name.startswith(self.owns) else rest)[name] = leaf
        return unflatten(owned), unflatten(rest)

    @staticmethod
    def put(owned: Tree, rest: Tree) -> Tree:
        """Return the tree that `take` divided."""
        return unflatten({**flatten(rest), **flatten(owned)}) if rest else owned


def phases_of(objective: Any, params: Tree) -> tuple[Phase, ...]:
    """Return the phases of an objective; one that declares none has one that owns everything.

    Raises:
      JaxherdError: a parameter that no phase owns, or several do, or two phases of one name.
    """
    declared: Sequence[Phase] = getattr(objective, "phases", ())
    if not declared:
        return (Phase("step", ("",), objective),)
    if len({phase.name for phase in declared}) != len(declared):
        raise JaxherdError(f"two phases share a name: {[phase.name for phase in declared]}.")
    for name in flatten(params):
        owners = [phase.name for phase in declared if name.startswith(phase.owns)]
        if len(owners) != 1:
            raise JaxherdError(
                f"the parameter {name!r} is owned by {owners or 'no phase'}: every parameter needs "
                "exactly one."
            )
    return tuple(declared)
