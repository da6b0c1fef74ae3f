"""Fill the stacked variables of a module from the tensors of a checkpoint.

Every stack is allocated once and its rows are placed as the tensors are read; the host holds the
model and one tensor more.  Weights in few bits are coded matrix by matrix on the way, so that the
host never holds them in more.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, flatten, split, unflatten
from jaxherd.kernels.quantized_matmul import QuantizedMatrix
from jaxherd.layers.weight_format import WeightFormat, inner_first, is_table
from jaxherd.weights.mapping import Placement, place
from jaxherd.weights.stores import TensorStore

_SHOWN = 12
_PARTS = ("values", "scales", "zeros")


def assemble(
    config: Any,
    store: TensorStore,
    placements: Callable[[Mapping[str, tuple[int, ...]]], list[Placement]],
    *,
    dtype: Any = None,
    ignored: Callable[[str], bool] = lambda name: False,
    zero_buffers: bool = True,
    codes: Callable[[Placement], QuantizedMatrix] | None = None,
    parts: bool = False,
) -> Any:
    """Return the module of `config` with its variables read from `store`.

    Args:
      config: has `build(key)`; its `weight_formats()` tell which variables are kept in few bits.
      store: the tensors.
      placements: from our shapes (path -> shape) to where each is.
      dtype: of all floating-point variables; None keeps that of the tensors.
      ignored: tensors that may be there and are not used.
      zero_buffers: untrained variables start at zero, the checkpoint has none.
      codes: returns the stored code of a tensor, in our layout; without it the values that are
        read are quantised here.
      parts: the store has the arrays of a code under names of their own, `<path>/values` and so on.
    Raises:
      JaxherdError: unknown, missing and wrongly shaped tensors, all in one message.
    """
    definition, params, buffers = split(abstract(config.build, jax.random.key(0)))
    flat_params, flat_buffers = flatten(params), flatten(buffers)
    wanted = dict(flat_params) if zero_buffers else flat_params | flat_buffers
    coded = {path: leaf for path, leaf in wanted.items() if isinstance(leaf, QuantizedMatrix)}
    if parts:
        wanted = with_parts(wanted)
    found = placements({path: _shape(path, leaf) for path, leaf in wanted.items()})
    _check(found, store, ignored)

    by_name: dict[str, list[Placement]] = {}
    for placement in found:
        by_name.setdefault(placement.name, []).append(placement)
    kinds: dict[str, np.dtype] = {}
    for placement in found:
        kind = store.dtypes[placement.name]
        path = placement.path
        kinds[path] = np.dtype(jnp.promote_types(kinds[path], kind)) if path in kinds else kind
    for path, kind in kinds.items():
        of_code = parts and path.rpartition("/")[0] in coded
        if dtype is not None and jnp.issubdtype(kind, jnp.floating) and not of_code:
            kinds[path] = np.dtype(dtype)
    formats = config.weight_formats() if coded and not parts else {}
    stacks: dict[str, Any] = {}
    for name in store.shapes:
        if name not in by_name:
            continue
        # Of stored codes only the parts are read.
        stored = codes is not None and all(p.path in formats for p in by_name[name])
        tensor = None if stored else store.read(name)
        for p in by_name[name]:
            if p.path in formats:
                if p.path not in stacks:
                    stacks[p.path] = _allocated(coded[p.path])
                given = codes(p) if codes is not None else None
                _place_code(stacks[p.path], p, given, tensor, kinds[p.path], formats[p.path])
                continue
            assert tensor is not None
            if p.path not in stacks:
                stacks[p.path] = _aligned(tuple(wanted[p.path].shape), kinds[p.path])
            # Casts while copying, so that no converted copy of the tensor is made.
            stacks[p.path][p.index] = p.rule.to_ours(tensor, p.head_dim)
    # On a CPU the arrays are taken over as they are; elsewhere one stack at a time is copied.
    arrays = {path: jax.device_put(stacks.pop(path), may_alias=True) for path in wanted}
    if parts:
        arrays |= {path: _joined(path, leaf, arrays) for path, leaf in coded.items()}
    if zero_buffers:
        arrays |= {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in flat_buffers.items()}
    return definition.merge(
        unflatten({path: arrays[path] for path in flat_params}),
        unflatten({path: arrays[path] for path in flat_buffers}),
    )


def with_parts(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables with every code as its arrays: `<path>/values`, `/scales`, `/zeros`."""
    found = {}
    for path, leaf in variables.items():
        if not isinstance(leaf, QuantizedMatrix):
            found[path] = leaf
            continue
        for part in _PARTS:
            if getattr(leaf, part) is not None:
                found[f"{path}/{part}"] = getattr(leaf, part)
    return found


def _joined(path: str, like: QuantizedMatrix, arrays: Mapping[str, Any]) -> QuantizedMatrix:
    parts = {part: arrays[f"{path}/{part}"] for part in _PARTS if getattr(like, part) is not None}
    return dataclasses.replace(like, **parts)


def _shape(path: str, leaf: Any) -> tuple[int, ...]:
    """Return the shape of a variable as an array; a table in few bits lies the other way round."""
    shape = tuple(leaf.shape)
    coded = isinstance(leaf, QuantizedMatrix)
    return (*shape[:-2], shape[-1], shape[-2]) if coded and is_table(path) else shape


def _allocated(like: QuantizedMatrix) -> QuantizedMatrix:
    return jax.tree.map(lambda part: _aligned(tuple(part.shape), np.dtype(part.dtype)), like)


def _place_code(
    stack: QuantizedMatrix,
    p: Placement,
    given: QuantizedMatrix | None,
    tensor: np.ndarray | None,
    kind: np.dtype,
    weight_format: WeightFormat,
) -> None:
    """Write a code, or that of a tensor, into its rows of a stack, one matrix at a time."""
    if given is not None:
        _write(stack, p.index, given)
        return
    assert tensor is not None
    value = inner_first(p.path, p.rule.to_ours(tensor, p.head_dim))
    for index in np.ndindex(value.shape[:-2]):
        _write(stack, (*p.index, *index), weight_format.quantise(value[index].astype(kind)))


def _write(stack: QuantizedMatrix, index: tuple[int, ...], code: QuantizedMatrix) -> None:
    for part in _PARTS:
        if getattr(stack, part) is not None:
            getattr(stack, part)[index] = np.asarray(getattr(code, part))


def decoder_placements(
    config: Any, architecture: str, store: TensorStore
) -> Callable[[Mapping[str, tuple[int, ...]]], list[Placement]]:
    """Return the function that places the tensors of `store` by the architecture's table."""
    return lambda shapes: place(config, dict(shapes), architecture, store.shapes)


def _check(found: list[Placement], store: TensorStore, ignored: Callable[[str], bool]) -> None:
    expected = {p.name: p.shape for p in found}
    missing = [name for name in expected if name not in store.shapes]
    unknown = [name for name in store.shapes if name not in expected and not ignored(name)]
    wrong = [
        f"{name} is {store.shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in store.shapes and tuple(store.shapes[name]) != tuple(shape)
    ]
    parts = [
        f"{title}: {_listed(names)}"
        for title, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
        if names
    ]
    if parts:
        raise JaxherdError(f"{store.where} does not fit its config; " + "; ".join(parts) + ".")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array at a 64-byte boundary, which XLA on CPU takes as it is."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
