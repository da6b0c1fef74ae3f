"""Checkpoints of a training stage: state and data position together, committed or not there.

Orbax writes into a temporary folder and renames it, so a kill at any moment leaves the older
checkpoints as they were.  On restoring, a damaged checkpoint is passed over with a notice for the
one before it.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxherd.core.errors import JaxherdError, StorageError
from jaxherd.core.experiment import write_json
from jaxherd.core.modules import flatten, unflatten


class Checkpoints:
    """The checkpoints of one stage.

    Args:
      folder: where they are; made when first needed.
      keep: how many of the newest to keep.
      keep_every: also keep those whose step is a multiple of this; None keeps no more.
      say: prints one line for the user.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        say: Callable[[str], None] = print,
    ):
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").addFilter(_is_news)
        policies: list[Any] = [ocp.training.preservation_policies.LatestN(keep)]
        if keep_every is not None:
            policies.append(ocp.training.preservation_policies.EveryNSteps(keep_every))
        self._folder, self._say = folder.absolute(), say
        self._manifests = self._folder.parent / "manifests"
        self._pending: int | None = None
        keeping: Any = ocp.training.preservation_policies.AnyPreservationPolicy(policies)
        saving: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._checkpointer = ocp.training.Checkpointer(
            str(self._folder),
            preservation_policy=keeping,
            save_decision_policy=saving,
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Return the steps of the committed checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, position: Any) -> None:
        """Start to write a checkpoint; the copy off the device is done on return.

        Args:
          step: its number.
          state: a pytree of arrays.
          position: JSON-able state of the data iterator of this process.
        Raises:
          JaxherdError: the disk is full or the folder cannot be written.
        """
        if step in self.steps():
            return
        self.wait()
        # Sizes of an earlier checkpoint of this number would make the new one look damaged.
        self._forget_manifest(step)
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                {"state": state},
                force=True,
                custom_metadata={"positions": _gather(position)},
            )
        except Exception as error:
            raise self._explained(step, error) from error
        self._pending = step

    def wait(self) -> None:
        """Wait until the checkpoint being written is committed.

        Raises:
          JaxherdError: it could not be written; older ones are untouched.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._checkpointer.wait()
            if step not in self.steps():
                raise OSError("it was not committed")
            self._write_manifest(step)
        except Exception as error:
            raise self._explained(step, error) from error

    def restore(self, abstract_state: Any) -> tuple[int, Any, Any] | None:
        """Return (step, state, position) of the newest sound checkpoint, or None if there is none.

        Args:
          abstract_state: shapes, dtypes and shardings of the result.
        Raises:
          JaxherdError: checkpoints exist but none can be read, or they hold another model.
        """

        def read(step: int) -> tuple[Any, Any]:
            self._check_shapes(step, abstract_state)
            return self._load(step, abstract_state)

        restored = self._newest(read)
        return None if restored is None else (restored[0], *restored[1])

    def _newest(self, read: Callable[[int], Any]) -> tuple[int, Any] | None:
        steps = self.steps()
        for step in reversed(steps):
            damage = _agreed(self._damage(step))
            if damage is None:
                try:
                    return step, read(step)
                except JaxherdError:
                    raise
                except Exception as error:  # whatever the reader makes of broken files
                    damage = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            self._say(f"checkpoint {step} is damaged ({damage}); trying the one before it.")
        if steps:
            raise JaxherdError(
                f"none of the checkpoints {steps} in {self._folder} can be read: restore one from "
                "a backup, or choose another --workdir to start anew."
            )
        return None

    def restore_model(self, abstract_params: Any, abstract_buffers: Any) -> tuple[Any, Any] | None:
        """Return (parameters, buffers) of the newest sound checkpoint, or None if there is none.

        Whatever optimiser the run had, its state is not read.  Where the run kept a moving average
        of the parameters, that is what comes back.  Buffers that the run did not have are absent
        from the result.

        Args:
          abstract_params, abstract_buffers: shapes, dtypes and shardings of the result.
        Raises:
          JaxherdError: as for `restore`.
        """
        restored = self._newest(
            lambda step: self._load_model(step, abstract_params, abstract_buffers)
        )
        return None if restored is None else restored[1]

    def discard_after(self, step: int) -> None:
        """Put aside checkpoints newer than `step`: damaged ones that a resumed run will redo.

        They are kept in `damaged/` beside the others, in case the fault was the reader's.
        """
        for other in self.steps():
            if other > step and jax.process_index() == 0:
                aside = self._folder.parent / "damaged" / f"{other}-{time.time_ns()}"
                aside.parent.mkdir(exist_ok=True)
                self._step_folder(other).rename(aside)
                self._forget_manifest(other)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints are gone")
        self._checkpointer.reload()

    def close(self) -> None:
        """Wait for what is being written and release resources."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _load(self, step: int, abstract_state: Any) -> tuple[Any, Any]:
        loaded = self._checkpointer.load_checkpointables(step, {"state": abstract_state})
        metadata: Any = self._checkpointer.checkpointables_metadata(step).custom_metadata
        positions = metadata["positions"]
        if len(positions) != jax.process_count():
            # The same position for all is one for any number; the iterator has the last word.
            if any(position != positions[0] for position in positions):
                raise JaxherdError(
                    f"checkpoint {step} in {self._folder} holds data positions of "
                    f"{len(positions)} processes and this run has {jax.process_count()}: use as "
                    "many processes."
                )
            return loaded["state"], positions[0]
        return loaded["state"], positions[jax.process_index()]

    def _load_model(self, step: int, abstract_params: Any, abstract_buffers: Any):
        from orbax.checkpoint import v1 as ocp

        stored = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        part = "average" if _leaves(stored.get("average") or {}) else "params"
        self._check_shapes(step, {part: abstract_params}, part=part)
        known = {_path(p): tuple(leaf.shape) for p, leaf in _leaves(stored.get("buffers") or {})}
        buffers = {
            name: leaf
            for name, leaf in flatten(abstract_buffers).items()
            if known.get(name) == tuple(leaf.shape)
        }
        wanted = {part: abstract_params} | ({"buffers": unflatten(buffers)} if buffers else {})
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            path = str(self._step_folder(step))
            found = ocp.load_checkpointables(path, {"state": wanted})["state"]
        return found[part], found.get("buffers", {})

    def _check_shapes(self, step: int, abstract_state: Any, part: str = "") -> None:
        stored = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        if part:
            stored = {part: stored[part]}
        found = {_path(p): tuple(leaf.shape) for p, leaf in _leaves(stored)}
        wanted = {_path(p): tuple(leaf.shape) for p, leaf in _leaves(abstract_state)}
        wrong = [
            f"{name} {found.get(name, 'absent')} (wanted {wanted.get(name, 'none')})"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if wrong:
            raise JaxherdError(
                f"checkpoint {step} in {self._folder} is of another config: "
                + "; ".join(wrong[:4])
                + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
                + ". Use the config it was made with, or another --workdir."
            )

    def _step_folder(self, step: int) -> Path:
        return self._folder / str(step)

    def _forget_manifest(self, step: int) -> None:
        if jax.process_index() == 0:
            (self._manifests / f"{step}.json").unlink(missing_ok=True)

    def _write_manifest(self, step: int) -> None:
        """Record the size of every file, so that a file cut short is noticed."""
        if jax.process_index() != 0:
            return
        folder = self._step_folder(step)
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        write_json(self._manifests / f"{step}.json", sizes)
        for old in self._manifests.glob("*.json"):
            if not self._step_folder(int(old.stem)).exists():
                old.unlink(missing_ok=True)

    def _damage(self, step: int) -> str | None:
        manifest = self._manifests / f"{step}.json"
        if not manifest.exists():
            return None
        try:
            sizes = json.loads(manifest.read_text())
        except (OSError, json.JSONDecodeError):
            return None
        for name, size in sizes.items():
            path = self._step_folder(step) / name
            actual = path.stat().st_size if path.exists() else None
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
        return None

    def _explained(self, step: int, error: Exception) -> StorageError:
        steps = self.steps()
        kept = f"the last good checkpoint is step {steps[-1]}" if steps else "none was saved before"
        full = shutil.disk_usage(self._existing_parent()).free < (1 << 20)
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if full or "No space left" in str(error) or "ENOSPC" in str(error):
            reason = "the disk is full"
        return StorageError(
            f"checkpoint {step} could not be written to {self._folder} ({reason}); {kept}: make "
            "room and run the same command to go on from there."
        )

    def _existing_parent(self) -> Path:
        path = self._folder
        while not path.exists():
            path = path.parent
        return path


def _is_news(record: logging.LogRecord) -> bool:
    """Drop tracebacks of Orbax's threads from the log: the errors reach us, and are told once.

    So is what its parts have to say about each other's use of them.
    """
    if record.exc_info is not None or "option objects to Context" in str(record.msg):
        return False
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


def _gather(position: Any) -> list[Any]:
    """Return the positions of all processes, in order."""
    if jax.process_count() == 1:
        return [position]
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(position).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(data)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, lengths)]


def _agreed(damage: str | None) -> str | None:
    """Return what process 0 found, so that all processes restore the same checkpoint."""
    if jax.process_count() == 1:
        return damage
    return _gather(damage)[0]


def _leaves(tree: Any):
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
