"""How a weight matrix of a model is kept: the code, its scales, and what rows that meet it become.

A format is part of the config of a layer, so that a model that is built, planned, loaded or saved
has its codes from the start; layers take the code in the place of the array (`layers/linear.py`,
`layers/moe.py`).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import Module, axes_of, recode
from jaxherd.kernels.quantized_matmul.codes import check_convention, quantize
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """A code of matrices [K, N] with one scale a column, or one for `group` rows of a column.

    Attributes:
      code: "int8", "int4" (two rows a byte) or "float8_e4m3fn".
      group: rows of K that share a scale; None for all of them.
      convention: of symmetric scales (`kernels.quantized_matmul.codes`); None takes the code's first.
      scale_dtype: of the scales.
      zeros: dtype of zero points; None for a symmetric code.
      activations: rows that meet the matrix are rounded to "int8" or "float8_e4m3fn", each by its
        own scale; None leaves them.
    """

    code: Literal["int8", "int4", "float8_e4m3fn"] = "int8"
    group: int | None = None
    convention: str | None = None
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    zeros: Literal["float32", "bfloat16", "float16"] | None = None
    activations: Literal["int8", "float8_e4m3fn"] | None = None

    def __post_init__(self):
        if self.zeros is None:
            check_convention(self.code, self.convention)

    def check(self, inner: int, what: str) -> None:
        """Raise a JaxherdError unless matrices of `inner` rows can be kept like this."""
        if self.group is not None and inner % self.group:
            raise JaxherdError(
                f"{what}: groups of {self.group} do not divide its {inner} inputs: choose a recipe "
                "with a scale per channel or smaller groups."
            )
        if self.code == "int4" and inner % 2:
            raise JaxherdError(
                f"{what}: int4 keeps two inputs a byte and it has {inner}: choose an int8 recipe."
            )

    def quantise(self, w: Any) -> QuantizedMatrix:
        """Return the code of matrices [*S, K, N]."""
        return _quantise(jnp.asarray(w), self)


@functools.partial(jax.jit, static_argnums=1)
def _quantise(w: jax.Array, how: WeightFormat) -> QuantizedMatrix:
    """In one pass over the matrix: operation by operation a released model would take an hour."""
    matrix = quantize(
        w,
        dtype=how.code,
        group=how.group,
        symmetric=how.zeros is None,
        convention=how.convention,
        scale_dtype=jnp.dtype(how.scale_dtype),
        packed=how.code == "int4",
    )
    if how.zeros is not None:
        matrix = dataclasses.replace(matrix, zeros=matrix.zeros.astype(how.zeros))
    return dataclasses.replace(matrix, activations=how.activations)


Formats = tuple[tuple[str, WeightFormat], ...]


def use_formats(module: Module, formats: Formats) -> None:
    """Keep variables of a module that is being built in these formats.

    Args:
      module: a block, or a model.
      formats: (path of the variable inside the module, its format).  "embedding/table" is kept as
        its head reads it, [D, V].
    """
    for path, weight_format in formats:
        *parts, last = path.split("/")
        owner: Any = module
        for part in parts:
            owner = getattr(owner, part)
        variable = getattr(owner, last)
        shape = variable[...].shape
        inner = shape[-1] if is_table(path) else shape[-2]
        weight_format.check(inner, path)
        names = axes_of(variable)
        recode(
            variable,
            lambda w, path=path, f=weight_format: f.quantise(inner_first(path, w)),
            names[::-1] if is_table(path) else names,
        )


def is_table(path: str) -> bool:
    """Whether a variable is a table of tokens, whose inner axis is its last."""
    return path == "embedding/table"


def inner_first(path: str, w: Any) -> Any:
    """Return a variable's array with its inner axis first: tables [V, D] are [D, V] in few bits."""
    return w.swapaxes(-1, -2) if is_table(path) else w
