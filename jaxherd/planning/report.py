"""`Plan`: what the compiler said about one experiment on one slice, as data and as a table."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxherd.core.errors import JaxherdError, StorageError

GIB = 1024**3


@dataclass(frozen=True)
class MemoryUse:
    """GiB of HBM per chip, by the compiler's own accounting; exact for this compiler version."""

    arguments: float
    """Train state and batch."""
    outputs: float
    aliased: float
    """Outputs that reuse donated arguments, so they count once."""
    temporaries: float
    """Activations, gathered weights, gradients: everything that lives inside the step."""
    code: float


@dataclass(frozen=True)
class CollectiveRow:
    """Collectives of one kind, over one mesh axis, with one size; sums are per step."""

    op: str
    axes: str
    """Mesh axes, such as `fsdp`; in brackets where the groups are not whole axes."""
    group_size: int
    count: float
    """Executions per step: loops are multiplied out."""
    bytes: float
    """Bytes one device sends per step."""
    seconds: float
    """Lower bound of its time on the links per step."""
    exposed_seconds: float
    """The part of it in which the core waits; an estimate."""
    asynchronous: bool
    unit: str
    """Who drives it: `tensorcore`, `sparsecore`, `dma` or, between slices, `network`."""
    where: str
    """JAX name stack of one of them."""


@dataclass(frozen=True)
class Buffer:
    """A large value in HBM, per device."""

    gib: float
    shape: str
    where: str
    """Argument name, JAX name stack or source line."""


@dataclass(frozen=True)
class Plan:
    """What is known of one training step before any chip is rented; all figures are per step.

    Facts of the compiled program: `fits`, `hbm_gib_per_chip`, `memory`, `collective_bytes`, the
    number and kind of collectives.  A bound: `mfu_bound` (hardware will do no better).  Estimates,
    which nothing has measured: `estimated_step_seconds`, which adds what nothing hides to a bound,
    and `exposed_collective_share`, `non_matmul_share` and `schedule_seconds` from the compiler's
    cost model and the FLOPs that kernels state.
    """

    experiment: str
    slice: str
    """Canonical target name, such as `v5p:4x4x8`."""
    chips: int
    """Chips over all slices."""
    fits: bool
    """Whether the compiler accepted the program within the chip's memory."""
    hbm_gib_per_chip: float
    """GiB needed per chip: arguments + outputs - aliased + temporaries + code."""
    hbm_limit_gib: float
    """GiB per chip the compiler allows (CPU and GPU: the chip table's figure)."""
    flops_per_step: float
    """Model FLOPs of one step over all chips, counted by the model, recomputation not included."""
    tokens_per_step: float
    """Tokens (or other units of the batch) consumed per step over all chips."""
    collective_bytes: float | None = None
    """Bytes one chip sends over the links per step: all-gather out*(n-1)/n, reduce-scatter
    in*(n-1)/n, all-reduce twice that, all-to-all in*(n-1)/n, permute in."""
    compile_seconds: float = 0.0
    """Wall time of lowering and compiling, here."""
    estimated_step_seconds: float | None = None
    """An estimate: max(FLOPs at peak, HBM bytes at full bandwidth), which is a bound, + the estimated
    exposure of collectives."""
    bottleneck: str = ""
    """The largest term of that estimate: `compute`, `hbm` or `collectives`; `memory` on a misfit."""
    mfu_bound: float | None = None
    """FLOPs at peak / max(FLOPs at peak, HBM bytes at full bandwidth): no run will do better."""

    layout: str = ""
    mesh: str = ""
    """Axes longer than one, such as `data=2 fsdp=64`."""
    matmul_dtype: str = "bf16"
    memory: MemoryUse | None = None
    compute_seconds: float | None = None
    """flops_per_step at the peak of all chips."""
    hbm_seconds: float | None = None
    """HBM bytes of the schedule (sliced and in-place operands at their slice) at full bandwidth."""
    collective_seconds: float | None = None
    """Time on the links if nothing hid it: a lower bound by `planning/links.py`."""
    exposed_seconds: float | None = None
    """The part of `collective_seconds` in which the core waits."""
    exposed_collective_share: float | None = None
    """exposed_seconds / collective_seconds; None without collectives or without estimates."""
    non_matmul_share: float | None = None
    """Of the core's estimated computing time, the part that is no matrix multiplication."""
    schedule_seconds: float | None = None
    """Length of the schedule by the compiler's cycle estimates: pessimistic on element-wise work,
    which the compiler prices about twice too slow."""
    collectives: tuple[CollectiveRow, ...] = ()
    largest_buffers: tuple[Buffer, ...] = ()
    compiler_options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What the figures leave out, in sentences."""
    advice: tuple[str, ...] = ()
    """On a misfit: what to change."""

    def to_json(self) -> str:
        """Return the plan as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises:
            JaxherdError: the text is not JSON or not a plan.
        """
        try:
            data = json.loads(text)
            data["memory"] = MemoryUse(**data["memory"]) if data.get("memory") else None
            data["collectives"] = tuple(CollectiveRow(**row) for row in data["collectives"])
            data["largest_buffers"] = tuple(Buffer(**row) for row in data["largest_buffers"])
            data["notes"], data["advice"] = tuple(data["notes"]), tuple(data["advice"])
            return cls(**data)
        except (ValueError, TypeError, KeyError) as error:
            raise JaxherdError(f"This is not a plan written by jaxherd: {error}.") from error

    def save(self, path: Path) -> None:
        """Write the JSON to `path`, whole or not at all."""
        save_plans([self], path)

    def render(self, console: Any = None) -> None:
        """Print the plan as tables that say how to read them (see `planning/render.py`)."""
        from jaxherd.planning.render import render_plan

        render_plan(self, console)


def plans_json(plans: Sequence[Plan]) -> str:
    """Return one plan as its object and several as a list, as indented JSON."""
    if len(plans) == 1:
        return plans[0].to_json()
    return json.dumps([dataclasses.asdict(plan) for plan in plans], indent=1) + "\n"


def save_plans(plans: Sequence[Plan], path: Path) -> None:
    """Write `plans_json(plans)` to `path`, whole or not at all.

    Raises:
        StorageError: the disk could not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(plans_json(plans))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"The plan could not be written to {path} ({error.strerror or error}): make room or "
            "choose another file."
        ) from error


def check_plan_file(path: Path) -> None:
    """Say before a long compile that `save_plans` could not write there.

    Raises:
        JaxherdError: it is a folder, or its folder does not exist or cannot be written.
    """
    if path.is_dir():
        raise JaxherdError(f"--save {path} is a folder: give the name of a file in it.")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise JaxherdError(
            f"--save {path} cannot be written ({error.strerror or error}): choose another file."
        ) from error
