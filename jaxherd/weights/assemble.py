"""Fill the stacked variables of a module from the tensors of a checkpoint.

Every stack is allocated once and its rows are placed as the tensors are read; the host holds the
model and one tensor more.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, flatten, split, unflatten
from jaxherd.weights.mapping import Placement, place
from jaxherd.weights.stores import TensorStore

_SHOWN = 12


def assemble(
    config: Any,
    store: TensorStore,
    placements: Callable[[Mapping[str, tuple[int, ...]]], list[Placement]],
    *,
    dtype: Any = None,
    ignored: Callable[[str], bool] = lambda name: False,
    zero_buffers: bool = True,
) -> Any:
    """Return the module of `config` with its variables read from `store`.

    Args:
      config: has `build(key)`.
      store: the tensors.
      placements: from our shapes (path -> shape) to where each is.
      dtype: of all floating-point variables; None keeps that of the tensors.
      ignored: tensors that may be there and are not used.
      zero_buffers: untrained variables start at zero, the checkpoint has none.
    Raises:
      JaxherdError: unknown, missing and wrongly shaped tensors, all in one message.
    """
    definition, params, buffers = split(abstract(config.build, jax.random.key(0)))
    flat_params, flat_buffers = flatten(params), flatten(buffers)
    wanted = dict(flat_params) if zero_buffers else flat_params | flat_buffers
    found = placements({path: tuple(leaf.shape) for path, leaf in wanted.items()})
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
        if dtype is not None and jnp.issubdtype(kind, jnp.floating):
            kinds[path] = np.dtype(dtype)
    stacks: dict[str, np.ndarray] = {}
    for name in store.shapes:
        if name not in by_name:
            continue
        tensor = store.read(name)
        for p in by_name[name]:
            if p.path not in stacks:
                stacks[p.path] = _aligned(tuple(wanted[p.path].shape), kinds[p.path])
            # Casts while copying, so that no converted copy of the tensor is made.
            stacks[p.path][p.index] = p.rule.to_ours(tensor, p.head_dim)
    # On a CPU the arrays are taken over as they are; elsewhere one stack at a time is copied.
    arrays = {path: jax.device_put(stacks.pop(path), may_alias=True) for path in wanted}
    if zero_buffers:
        arrays |= {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in flat_buffers.items()}
    return definition.merge(
        unflatten({path: arrays[path] for path in flat_params}),
        unflatten({path: arrays[path] for path in flat_buffers}),
    )


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
