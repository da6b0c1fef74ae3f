"""Values of several arrays that stand for one array, such as weights in few bits.

The floors that carry parameters about (shardings, casts) treat such a value as one leaf without
knowing how it is coded.
"""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Coded(Protocol):
    """A pytree of arrays in the place of one floating-point array."""

    def dequantize(self, dtype: Any = ...) -> Any:
        """Return the array that it stands for."""
        ...

    def shardings(self, partitioner: Any, names: Any, what: str) -> Any:
        """Return the sharding of each part, given the logical axes of the array it stands for."""
        ...


def is_coded(value: Any) -> bool:
    """Whether a node of a tree is such a value: an `is_leaf` of `jax.tree.map`."""
    return isinstance(value, Coded)
