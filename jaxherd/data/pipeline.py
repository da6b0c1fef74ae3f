"""From rows to batches: per-process sharding, prefetch and an exactly restorable position.

Nothing here knows what a row is: a dict of NumPy arrays of fixed shapes.  Two kinds of pipeline
produce the same global batches for every number of processes, row r of a global batch of B being
on process r // (B / processes):

* `batch_rows`: rows with random access (a `grain.MapDataset`).  The position is one number.
* `batch_lanes`: B independent streams, of which stream r fills row r of every batch.  Each process
  runs its own streams only.  For packing that must see documents one after the other.
"""

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxherd.core.errors import JaxherdError

STATE_FORMAT = 1


def check_sharding(batch_size: int, process_index: int, process_count: int) -> int:
    """Return the rows per process, or raise JaxherdError if the batch cannot be divided."""
    if batch_size < 1:
        raise JaxherdError(f"batch_size={batch_size} must be at least 1.")
    if not 0 <= process_index < process_count:
        raise JaxherdError(f"process_index={process_index} must lie in [0, {process_count}).")
    if batch_size % process_count:
        raise JaxherdError(
            f"batch_size={batch_size} is not divisible by {process_count} processes: use a "
            "multiple."
        )
    return batch_size // process_count


def batch_rows(
    rows: Any,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 8,
    workers: int = 0,
) -> Any:
    """Return a `grain.IterDataset` of this process's part of each batch.

    Args:
        rows: a `grain.MapDataset`; a finite one must hold whole batches.
        batch_size: global rows per batch.
        process_index, process_count: which part.
        threads, prefetch: batches are made ahead by this many threads, this many at most.
        workers: processes instead, for costly rows; rows must then be picklable.
    """
    import grain

    local = check_sharding(batch_size, process_index, process_count)
    # Groups of `local` rows; group b * processes + p is process p's part of batch b.
    parts = rows.batch(local)[process_index::process_count]
    if workers:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        return parts.to_iter_dataset(options).mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
        )
    return parts.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    )


def batch_lanes(
    lane: Callable[[int], Any],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 8,
) -> Any:
    """Return a `grain.IterDataset` of this process's rows of each batch.

    Args:
        lane: makes the endless `grain.IterDataset` that fills row r of every batch.
        batch_size, process_index, process_count, prefetch: as for `batch_rows`.
    """
    import grain

    local = check_sharding(batch_size, process_index, process_count)
    first = process_index * local
    lanes = grain.experimental.ZipIterDataset([lane(first + i) for i in range(local)])
    return grain.experimental.ThreadPrefetchIterDataset(
        lanes.map(stack_rows), prefetch_buffer_size=prefetch
    )


def stack_rows(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack rows to a batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class GrainBatches:
    """A `BatchIterator` over a Grain dataset.

    Args:
        dataset: a `grain.IterDataset` of process-local batches.
        fingerprint: what must be equal for a saved position to make sense.
        process_index, process_count: where this iterator runs.
        portable: whether a position is the same on every process, whatever their number.
        about: the answer to `describe`.
        length: the number of batches of a finite pass.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        fingerprint: str,
        process_index: int = 0,
        process_count: int = 1,
        portable: bool = False,
        about: Mapping[str, Any] | None = None,
        length: int | None = None,
    ):
        self._iterator = iter(dataset)
        self._fingerprint = fingerprint
        self._place = None if portable else [process_index, process_count]
        self._about = dict(about or {})
        self._length = length
        self._steps = 0
        # Stops the prefetching threads when the iterator goes, and before the interpreter does.
        self.close = weakref.finalize(self, _close, self._iterator)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._steps += 1
        return batch

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("Training data is endless and has no len().")
        return self._length

    def __bool__(self) -> bool:
        return True

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch handed out, as JSON-serialisable data."""
        return {
            "format": STATE_FORMAT,
            "data": self._fingerprint,
            "place": self._place,
            "steps": self._steps,
            "grain": json.loads(json.dumps(self._iterator.get_state(), default=_plain)),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; raises JaxherdError if it belongs to other data or processes."""
        if state.get("format") != STATE_FORMAT:
            raise JaxherdError(
                f"The data position has format {state.get('format')!r}, this version reads "
                f"{STATE_FORMAT}."
            )
        if state["data"] != self._fingerprint:
            raise JaxherdError(
                "The saved data position belongs to other data: corpus, tokenizer, seed, batch or "
                "packing changed since (library sources differ between Python releases); start "
                "anew or restore the old settings."
            )
        if state["place"] != self._place:
            raise JaxherdError(
                f"The saved data position is for process and count {state['place']}, this is "
                f"{self._place}: resume on the same number of processes."
            )
        self._iterator.set_state(state["grain"])
        self._steps = state["steps"]

    def describe(self) -> dict[str, Any]:
        """Return what a log should say about this data."""
        return dict(self._about)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"The data position holds a {type(value).__name__}, which is no JSON.")


def _close(iterator: Any) -> None:
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
