"""From logical axis names to shardings: one rule table, one `shard`, never a silent no-op."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxherd.core import axes as vocabulary
from jaxherd.core.coded import is_coded
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.layouts import Layout, Rule

LogicalAxes = Sequence[str | None]


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh together with the rule table that was made for it."""

    mesh: Mesh
    rules: Mapping[str, Rule]
    name: str = "custom"

    def __hash__(self):
        return hash((self.mesh, tuple(sorted(self.rules.items())), self.name))

    @classmethod
    def create(cls, layout: Layout, devices: Sequence[Any] | None = None) -> "Partitioner":
        """Lay the devices out as a mesh with all axes of `MESH_AXES`, most distant axis first.

        Args:
          layout: axis sizes and rules.
          devices: real or ahead-of-time devices; all devices of this process group by default.
        Raises:
          JaxherdError: the layout does not fit the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
        if slices > 1 and layout.slice == 1:
            layout = dataclasses.replace(layout, slice=slices)
        if slices > 1 and layout.slice != slices:
            raise JaxherdError(
                f"layout {layout.name!r} has slice={layout.slice} and the target has {slices} slices."
            )
        sizes = layout.sizes(len(devices))
        shape = tuple(sizes.values())
        if len(devices) > 1 and getattr(devices[0], "platform", "cpu") == "tpu":
            grid = _tpu_grid(devices, sizes)
        else:
            grid = np.asarray(devices, dtype=object).reshape(shape)
        mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        return cls(mesh, layout.rules(), layout.name)

    def axis_size(self, *mesh_axes: str) -> int:
        """Return the number of devices along these mesh axes together."""
        return math.prod(self.mesh.shape[name] for name in mesh_axes)

    def mesh_axes(self, logical: str) -> Rule:
        """Return the mesh axes of size above one that carry a logical axis.

        Raises:
          JaxherdError: the name is not in the vocabulary.
        """
        if logical not in vocabulary.ALL_AXES:
            raise JaxherdError(
                f"no logical axis {logical!r}; " + nearest(logical, vocabulary.ALL_AXES)
            )
        return tuple(name for name in self.rules[logical] if self.mesh.shape[name] > 1)

    def spec(self, names: LogicalAxes) -> PartitionSpec:
        """Return the partition of dimensions that carry these logical names.

        A mesh axis is used once: where two dimensions ask for it, the more specific one (the one
        whose rule names fewer axes) keeps it.
        """
        wanted = [self.mesh_axes(name) if name is not None else () for name in names]
        owner: dict[str, int] = {}
        for index in sorted(range(len(wanted)), key=lambda i: len(self._rule(names[i]))):
            for mesh_axis in wanted[index]:
                owner.setdefault(mesh_axis, index)
        kept = [tuple(a for a in axes if owner[a] == i) for i, axes in enumerate(wanted)]
        return PartitionSpec(*(a if len(a) > 1 else (a[0] if a else None) for a in kept))

    def _rule(self, name: str | None) -> Rule:
        return self.rules[name] if name is not None else ()

    def sharding(
        self, names: LogicalAxes, shape: Sequence[int] | None = None, what: str = "array"
    ) -> NamedSharding:
        """Return the sharding of an array whose dimensions carry these names.

        Raises:
          JaxherdError: with `shape` given, a dimension that its mesh axes do not divide.
        """
        spec = self.spec(names)
        if shape is not None:
            self.check_divisible(names, spec, shape, what)
        return NamedSharding(self.mesh, spec)

    def check_divisible(
        self, names: LogicalAxes, spec: PartitionSpec, shape: Sequence[int], what: str
    ) -> None:
        """Raise a `JaxherdError` unless every dimension divides by its mesh axes."""
        if len(names) != len(shape):
            raise JaxherdError(
                f"{what}: {len(names)} logical axes {tuple(names)} for shape {shape}."
            )
        for name, size, part in zip(names, shape, spec):
            parts = self.axis_size(*((part,) if isinstance(part, str) else part or ()))
            if size % parts:
                raise JaxherdError(
                    f"{what}: dimension {name!r} of size {size} does not divide by {parts} "
                    f"(mesh axes {part!r} of layout {self.name!r}): choose a layout whose axes "
                    f"divide {size}, or drop {name!r} from its rules."
                )

    def tree_shardings(self, axes_tree: Any, shapes: Any) -> Any:
        """Return the shardings of a tree of arrays or shapes with a like tree of axis names.

        The names of weights in few bits are those of the matrix that they stand for.

        Raises:
          JaxherdError: a leaf that its mesh axes do not divide, named by its path.
        """

        def one(path, leaf, names):
            what = jax.tree_util.keystr(path, simple=True, separator="/")
            if is_coded(leaf):
                return leaf.shardings(self, names, what)
            return self.sharding(names, leaf.shape, what)

        return jax.tree_util.tree_map_with_path(one, shapes, axes_tree, is_leaf=is_coded)

    def replicated(self) -> NamedSharding:
        """Return the sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @contextlib.contextmanager
    def activate(self) -> Iterator["Partitioner"]:
        """Make `shard` constrain to this mesh inside the block (also while tracing)."""
        token = _ACTIVE.set(self)
        try:
            yield self
        finally:
            _ACTIVE.reset(token)


_ACTIVE: contextvars.ContextVar[Partitioner | None] = contextvars.ContextVar(
    "partitioner", default=None
)


def active() -> Partitioner | None:
    """Return the partitioner that `shard` constrains to, or None outside of any."""
    return _ACTIVE.get()


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain `x` to the active layout; `names` are the logical axes of its dimensions.

    The names and their number are checked always.  With an active partitioner the constraint is
    applied and each dimension must divide; without one there is no mesh to constrain to and `x`
    is returned.

    Raises:
      JaxherdError: an unknown name, a wrong number of names, or a dimension that does not divide.
    """
    if len(names) != x.ndim:
        raise JaxherdError(f"shard: {len(names)} names {names} for an array of shape {x.shape}.")
    for name in names:
        if name is not None and name not in vocabulary.ALL_AXES:
            raise JaxherdError(
                f"shard: no logical axis {name!r}; " + nearest(name, vocabulary.ALL_AXES)
            )
    partitioner = active()
    if partitioner is None:
        return x
    return jax.lax.with_sharding_constraint(x, partitioner.sharding(names, x.shape, "activation"))


def gather_rows(value: Any, names: LogicalAxes) -> Any:
    """Gather what a parameter's dimension is cut over but for the first mesh axis; else return it.

    So cut (5,120 over 128 devices: 40) it may have so few rows on a device that they fill no tile.
    To gather these at once the TPU compiler writes zeros, puts the rows among them and adds up all
    devices: twice the bytes, and a pass over the whole matrix on every one.  In steps only this
    first one, to the rows of one mesh axis, is of that kind; `gather_whole` is the second.

    Args:
      value: an array, or a code of one, which is left as it is.
      names: the logical axes of its dimensions.
    """
    return _constrained(value, names, whole=False)


def gather_whole(value: Any, names: LogicalAxes) -> Any:
    """Gather the rest of what `gather_rows` left; the gradient is added up over all at once."""
    return _constrained(value, names, whole=True)


def _constrained(value: Any, names: LogicalAxes, whole: bool) -> Any:
    partitioner = active()
    if partitioner is None or is_coded(value):
        return value
    parts = list(partitioner.spec(names))
    cut = next((i for i, part in enumerate(parts) if isinstance(part, tuple)), None)
    if cut is None:
        return value
    axes = parts.pop(cut)
    sharding = NamedSharding(partitioner.mesh, PartitionSpec(None if whole else axes[0], *parts))
    # With the cut dimension in front, what is gathered lies in one piece.
    moved = jax.lax.with_sharding_constraint(jnp.moveaxis(value, cut, 0), sharding)
    return jnp.moveaxis(moved, 0, cut)


def _tpu_grid(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Order TPU devices so that each mesh axis runs along physical links where it can."""
    from jax.experimental import mesh_utils

    shape = tuple(sizes.values())
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        inner = (1, *shape[1:])
        outer = (shape[0],) + (1,) * (len(shape) - 1)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    return mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True, contiguous_submeshes=False
    )
