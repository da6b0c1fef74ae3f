"""The module seam: the only file that knows Flax.

Modules are declared with `flax.nnx` and used as pure functions.  A module is a JAX pytree, so
`jax.jit`, `jax.grad`, `jax.eval_shape` and `jax.lax.scan` take it as it is.  For training it is
split once into a static definition and plain nested dictionaries of arrays.

Conventions (a Flax change should touch this file alone):

- Constructors take a `key` (a JAX PRNG key) and build arrays; nothing is changed afterwards.
- `Parameter` is trained.  `Buffer` is state that the optimiser does not touch (a router's
  selection bias, running statistics).
- `axes` names the *trailing* dimensions of a variable.  Building a stack of blocks with `stacked`
  adds leading dimensions, which are called `"layers"` when the axes are read back.
- No variable has two owners: tied embeddings and repeated blocks are calls to one owner.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxherd.core.coded import is_coded

Module = nnx.Module
ModuleList = nnx.List
M = TypeVar("M")

Axes = tuple[str | None, ...]
Tree = dict[str, Any]


class Parameter(nnx.Param):
    """A trained variable; read its array with `parameter[...]`."""


class Buffer(nnx.Variable):
    """A variable that the optimiser does not touch."""


def parameter(value: jax.Array, axes: Axes) -> Parameter:
    """Return a trained variable whose dimensions carry the logical names `axes`."""
    return Parameter(value, axes=_checked(value, axes))


def buffer(value: jax.Array, axes: Axes) -> Buffer:
    """Return an untrained variable whose dimensions carry the logical names `axes`."""
    return Buffer(value, axes=_checked(value, axes))


def axes_of(variable: Any) -> Axes:
    """Return the logical names of a variable's dimensions; those of a stack it was cut from are gone."""
    return _trailing(variable.get_metadata("axes"), len(variable.get_value().shape))


def recode(variable: Any, code: Callable[[jax.Array], Any], axes: Axes) -> None:
    """Let a variable of a module that is being built hold a code of its value.

    The code is a pytree that stands for an array (`jaxherd.core.coded`) whose trailing dimensions
    have the logical names `axes`.
    """
    variable.set_value(code(variable.get_value()))
    variable.set_metadata(axes=axes)


def _checked(value: jax.Array, axes: Axes) -> Axes:
    if len(axes) != value.ndim:
        raise ValueError(f"axes {axes} do not name the {value.ndim} dimensions of {value.shape}")
    return tuple(axes)


def _trailing(axes: Axes, dimensions: int) -> Axes:
    """Stacking adds leading dimensions that a declaration does not know of, and a scan takes them."""
    axes = axes[max(0, len(axes) - dimensions) :]
    return ("layers",) * (dimensions - len(axes)) + axes


def stacked(build: Callable[[jax.Array], M], key: jax.Array, count: int) -> M:
    """Build `count` modules with independent keys as one module of stacked variables.

    `jax.lax.scan` over the result hands its body one module at a time.
    """
    return jax.vmap(build)(jax.random.split(key, count))


class Definition:
    """What is static about a module: its structure without its arrays.  Hashable."""

    def __init__(self, graph: Any, variables: tuple[tuple[tuple, type, Axes], ...]):
        self._graph = graph
        self._variables = variables

    def merge(self, params: Tree, buffers: Tree | None = None) -> Any:
        """Return the module that holds these arrays.

        Args:
          params: nested dictionary as `split` returned it; its leaves may be arrays, tracers or
            abstract values.
          buffers: likewise for the untrained variables.
        Raises:
          KeyError: an array that the definition needs is absent.
        """
        flat_params, flat_buffers = flatten(params), flatten(buffers or {})
        variables = {}
        for path, kind, axes in self._variables:
            name = _name(path)
            value = flat_params[name] if issubclass(kind, Parameter) else flat_buffers[name]
            variables[path] = kind(value, axes=axes)
        return nnx.merge(self._graph, nnx.State.from_flat_path(variables))

    def axes(self) -> tuple[Tree, Tree]:
        """Return the declared logical axes, as (params, buffers) dictionaries of tuples."""
        params, buffers = {}, {}
        for path, kind, axes in self._variables:
            (params if issubclass(kind, Parameter) else buffers)[_name(path)] = axes
        return unflatten(params), unflatten(buffers)

    def __hash__(self):
        return hash((self._graph, self._variables))

    def __eq__(self, other):
        return (
            isinstance(other, Definition)
            and self._graph == other._graph
            and self._variables == other._variables
        )


def split(module: Any) -> tuple[Definition, Tree, Tree]:
    """Return (definition, params, buffers); `definition.merge(params, buffers)` is the inverse.

    Both trees are nested dictionaries with string keys, ready for optax and Orbax.

    Raises:
      TypeError: the module holds a variable that is neither a `Parameter` nor a `Buffer`.
    """
    graph, state = nnx.split(module)
    variables, params, buffers = [], {}, {}
    for path, variable in nnx.to_flat_state(state):
        kind = type(variable)
        if not issubclass(kind, Parameter | Buffer):
            raise TypeError(f"{_name(path)} is a {kind.__name__}: use parameter() or buffer()")
        value = variable.get_value()
        axes = _trailing(variable.get_metadata("axes"), len(value.shape))
        variables.append((path, kind, axes))
        (params if issubclass(kind, Parameter) else buffers)[_name(path)] = value
    return Definition(graph, tuple(variables)), unflatten(params), unflatten(buffers)


def map_parameters(module: M, change: Callable[[Any, Axes], Any]) -> M:
    """Return the module with `change(value, axes)` in place of each trained value.

    `axes` are the logical names of all dimensions of the value.
    """
    definition, params, buffers = split(module)
    axes = flatten(definition.axes()[0])
    changed = {name: change(value, axes[name]) for name, value in flatten(params).items()}
    return definition.merge(unflatten(changed), buffers)


def abstract(build: Callable[..., M], *args: Any) -> M:
    """Return `build(*args)` with shapes in place of arrays; nothing is allocated."""
    return jax.eval_shape(build, *args)


def cast_floating(tree: M, dtype: Any) -> M:
    """Return the tree with every floating-point leaf in `dtype`; `None` leaves it as it is.

    Weights in few bits stay as they are, their scales too.
    """
    if dtype is None:
        return tree

    def cast(x):
        plain = not is_coded(x) and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if plain else x

    return jax.tree.map(cast, tree, is_leaf=is_coded)


def _name(path: tuple) -> str:
    return "/".join(str(part) for part in path)


def flatten(tree: Tree) -> dict[str, Any]:
    """Return `{"a/b/c": leaf}` of a nested dictionary; tuples count as leaves."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping):
            for name, child in node.items():
                visit(f"{prefix}/{name}" if prefix else str(name), child)
        else:
            flat[prefix] = node

    visit("", tree)
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Return the nested dictionary of `{"a/b/c": leaf}`."""
    tree: Tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def count_params(tree: Any) -> int:
    """Return the number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
