"""What a batch is: named arrays with global shapes, dtypes and logical axes.

An experiment describes its batches (tokens, audio, frames, pairs, ...); the trainer, the planner
and the checkpointer need no more than this description.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxherd.core.errors import JaxherdError, nearest


@dataclasses.dataclass(frozen=True)
class BatchField:
    """One array of a batch.

    Attributes:
        shape: the global shape, over all processes.
        dtype: anything `numpy.dtype` accepts, such as "int32".
        axes: one logical name (or None) per dimension, such as ("batch", "length"); layouts map
            these names to mesh axes.  The axis named "batch" is divided among processes.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise JaxherdError(
                f"A batch field of shape {self.shape} needs {len(self.shape)} axis names, "
                f"not {self.axes}."
            )

    def local_shape(self, process_count: int) -> tuple[int, ...]:
        """Return the shape that one of `process_count` processes holds."""
        return tuple(
            size // process_count if axis == "batch" else size
            for size, axis in zip(self.shape, self.axes)
        )


BatchSpec = dict[str, BatchField]


@runtime_checkable
class BatchIterator(Protocol):
    """Process-local batches with an exactly restorable position.

    `get_state` returns JSON-serialisable data; after `set_state(state)` the iterator yields what
    it would have yielded after the `get_state` that produced it.  Iterators of a finite pass
    (evaluation) also have `__len__`; those whose batches the model in training makes have
    `attach(running)`, which a training stage calls before the first batch.
    """

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Return itself."""
        ...

    def __next__(self) -> dict[str, np.ndarray]:
        """Return the next process-local batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Return the position."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a log should say about this data.

        "notes" are sentences that a run says at its start.
        """
        ...


@runtime_checkable
class DataConfig(Protocol):
    """The data part of an experiment: a frozen dataclass.

    It may also have `preview(batch) -> str` for `jaxherd inspect`; `units_per_step()`, where the
    first two dimensions of the first field are not what progress should count; `batch_spec(split)`,
    where splits differ in size; `export(folder)`, which writes what users of the model need besides
    weights, such as the tokenizer; and `needs_artifacts = True`, with which `build` is also given
    `artifacts`, the folders of the earlier stages that the stage reads, by name.  A `build` with an
    argument `report` is given a `jaxherd.core.reports.Report`, or None, for what takes long.
    """

    def batch_spec(self) -> BatchSpec:
        """Return the global shapes of a training batch; does no input or output."""
        ...

    def build(
        self,
        *,
        split: str,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> BatchIterator:
        """Open the data: endless for the split "train", one pass for any other."""
        ...


def abstract(spec: BatchSpec, shardings: Mapping[str, Any] | Any | None = None) -> dict[str, Any]:
    """Return `jax.ShapeDtypeStruct` per field, with `shardings` (one, or one each) attached."""
    import jax

    return {
        name: jax.ShapeDtypeStruct(
            field.shape, np.dtype(field.dtype), sharding=_sharding(shardings, name)
        )
        for name, field in spec.items()
    }


def check(batch: Mapping[str, Any], spec: BatchSpec, *, process_count: int = 1) -> None:
    """Raise one clear JaxherdError if a process-local batch does not have the spec's fields."""
    for name in spec:
        if name not in batch:
            raise JaxherdError(f"The batch has no field {name!r}: it has {sorted(batch)}.")
    for name, value in batch.items():
        if name not in spec:
            raise JaxherdError(
                f"The batch has the unexpected field {name!r}: {nearest(name, spec)}"
            )
        field = spec[name]
        expected = field.local_shape(process_count)
        if tuple(value.shape) != expected:
            raise JaxherdError(
                f"Batch field {name!r} has shape {tuple(value.shape)}, expected {expected} "
                f"(axes {field.axes}, {process_count} process(es))."
            )
        if np.dtype(value.dtype) != np.dtype(field.dtype):
            raise JaxherdError(
                f"Batch field {name!r} has dtype {np.dtype(value.dtype)}, expected "
                f"{np.dtype(field.dtype)}."
            )


def to_global(
    batch: Mapping[str, np.ndarray], shardings: Mapping[str, Any] | Any
) -> dict[str, Any]:
    """Make global `jax.Array`s of this process's rows, laid out by `shardings`."""
    import jax

    return {
        name: jax.make_array_from_process_local_data(_sharding(shardings, name), value)
        for name, value in batch.items()
    }


def _sharding(shardings: Mapping[str, Any] | Any | None, name: str) -> Any:
    if not isinstance(shardings, Mapping):
        return shardings
    if name not in shardings:
        raise JaxherdError(f"No sharding is given for the batch field {name!r}.")
    return shardings[name]
