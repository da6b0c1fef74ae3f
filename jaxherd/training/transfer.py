"""Learning rates and initial scales of single parameters, carried over from a smaller model.

A rate found at a small size is wrong at a large one unless each matrix's rate and scale follow its
shape.  For Adam and a matrix whose inputs are r times as many as at the base size (Yang et al. 2022,
arXiv 2203.03466, table 8):

    hidden (inputs and outputs grow)    scale / sqrt(r), rate / r
    output (only inputs grow)           scale / r,       rate / r
    input (inputs are of fixed number), vectors          as they are

A model that is q times as deep has its rates divided by q^depth_exponent; a batch b times as large
and a run of t times as many tokens multiply the rate by b^batch_exponent and t^token_exponent.

Meta trained Llama 4 with "MetaP", which sets per-layer rates and initial scales that transfer over
batch size, width, depth and tokens; its algorithm is not disclosed (llama4.md section 7), and this is
no more than like it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.modules import Tree, abstract, flatten, split, unflatten

# Stacked layers and experts are many matrices, not larger ones.
_STACKS = ("layers", "expert")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """From which size a recipe's rates and scales come.

    Attributes:
      base: config of the model for which the learning rate was found; of the same structure, other
        widths, layers of each kind as many times as it likes.
      depth_ratio: layers over the base's layers.
      batch_ratio, token_ratio: tokens of a batch, and of the run, over the base's.
      rule: "transfer", the table above; "standard", what is usual without: scale / sqrt(r) for every
        matrix with more inputs and one rate for all (to compare with).
      depth_exponent, batch_exponent, token_exponent: jaxherd's choices, as Meta disclosed none; 0.5
        for depth and for batches are what theory gives Adam's residual branches and noise.
    """

    base: Any
    depth_ratio: float = 1.0
    batch_ratio: float = 1.0
    token_ratio: float = 1.0
    rule: Literal["transfer", "standard"] = "transfer"
    depth_exponent: float = 0.5
    batch_exponent: float = 0.5
    token_exponent: float = 0.0

    def __post_init__(self):
        for name in ("depth_ratio", "batch_ratio", "token_ratio"):
            if not getattr(self, name) > 0:
                raise JaxherdError(f"transfer.{name} must be positive, got {getattr(self, name)}.")
        if self.rule not in ("transfer", "standard"):
            raise JaxherdError(
                f"transfer.rule={self.rule!r}: " + nearest(self.rule, ("transfer", "standard"))
            )

    def multipliers(self, shapes: Tree, axes: Tree) -> tuple[Tree, Tree]:
        """Return what multiplies (the learning rate, the initial values) of every parameter.

        Args:
          shapes: the model's abstract parameters.
          axes: their logical axes.
        Raises:
          JaxherdError: the base has other parameters.
        """
        base = flatten(split(abstract(self.base.build, jax.random.key(0)))[1])
        own, names = flatten(shapes), flatten(axes)
        if base.keys() != own.keys():
            odd = sorted(base.keys() ^ own.keys())
            raise JaxherdError(
                f"transfer.base has other parameters than the model ({', '.join(odd[:4])}): give it "
                "the same structure."
            )
        everywhere = self.batch_ratio**self.batch_exponent
        everywhere *= self.token_ratio**self.token_exponent
        rates, scales = {}, {}
        for path, leaf in own.items():
            rate, scale = self._of(leaf.shape, base[path].shape, names[path])
            rates[path], scales[path] = rate * everywhere, scale
        return unflatten(rates), unflatten(scales)

    def _of(self, shape, base_shape, names) -> tuple[float, float]:
        sizes = [
            (own, small)
            for own, small, name in zip(shape, base_shape, names)
            if name not in _STACKS
        ]
        if self.rule == "transfer" and "layers" in names:
            deep = self.depth_ratio**-self.depth_exponent
        else:
            deep = 1.0
        if len(sizes) < 2:
            return deep, 1.0
        (rows, small_rows), (columns, small_columns) = sizes[-2:]
        more = rows / small_rows
        # An embedding's rows are words, of which one is read: its inputs do not grow.
        if more == 1 or names[-2:] == ("vocab", "embed"):
            return deep, 1.0
        if self.rule == "standard":
            return 1.0, more**-0.5
        return deep / more, (more**-0.5 if columns != small_columns else 1 / more)


def scaled(params: Tree, scales: Tree) -> Tree:
    """Return the parameters times their scales."""
    by: Mapping[str, float] = flatten(scales)
    return unflatten(
        {path: leaf if by[path] == 1 else leaf * by[path] for path, leaf in flatten(params).items()}
    )
