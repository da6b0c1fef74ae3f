"""Explain a compile that ran out of memory: how much was needed, by what, and what to change."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxherd.core.targets import Target, known_targets, parse_target
from jaxherd.planning.report import GIB, Buffer

_UNITS = {"": 1, "B": 1, "K": 1024, "M": 1024**2, "G": GIB, "T": 1024 * GIB}
_NUMBER = r"([\d.]+)\s*([KMGT]?)i?B?"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the compiler refused a program for lack of memory."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text


@dataclass(frozen=True)
class OutOfMemory:
    """What the compiler's message says."""

    space: str
    """`hbm` or `vmem`."""
    needed_bytes: float | None
    available_bytes: float | None
    kernel: str = ""
    """The Pallas kernel or operation that overflowed VMEM."""
    buffers: tuple[Buffer, ...] = ()


def _size(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]


def parse_out_of_memory(message: str) -> OutOfMemory:
    """Read the compiler's message; what it does not say stays None.

    Understood: the early refusal (`the total memory required ... (28.50G) exceeds available HBM
    (15.75G)`, where the figure covers arguments and outputs as well), the buffer assignment's
    (`Used 18.00G of 15.75G hbm`, with a list of the largest allocations), and VMEM overflow of a
    kernel (`Allocation (size=..) would exceed memory (size=..)`, `Scoped allocation with size ..
    and limit ..`).
    """
    if "vmem" in message.lower():
        kernel = ""
        if found := re.search(r"::\s*([\w.\-]+)\s*$", message.strip()):
            kernel = found[1]
        elif found := re.search(r'op_name="([^"]+)"|for %?([\w.\-]+)', message):
            kernel = found[1] or found[2]
        pair = re.search(r"\(size=(\d+)\) would exceed memory \(size=(\d+)\)", message)
        if pair:
            return OutOfMemory("vmem", float(pair[1]), float(pair[2]), kernel)
        pair = re.search(rf"size {_NUMBER} and limit {_NUMBER}", message)
        if pair is None:
            pair = re.search(rf"Used {_NUMBER} of {_NUMBER}", message)
        if pair:
            return OutOfMemory("vmem", _size(pair[1], pair[2]), _size(pair[3], pair[4]), kernel)
        return OutOfMemory("vmem", None, None, kernel)
    pair = re.search(rf"\({_NUMBER}\) exceeds available HBM \({_NUMBER}\)", message)
    if pair is None:
        pair = re.search(rf"Used {_NUMBER} of {_NUMBER}", message)
    needed = _size(pair[1], pair[2]) if pair else None
    available = _size(pair[3], pair[4]) if pair else None
    return OutOfMemory("hbm", needed, available, buffers=_listed(message))


def _listed(message: str) -> tuple[Buffer, ...]:
    """Read entries such as `1. Size: 4.00G / Operator: op_name="..." / Shape: f32[...]`."""
    buffers = []
    for entry in re.split(r"\n\s*\d+\. (?=Size: )", message)[1:]:
        size = re.search(rf"Size: {_NUMBER}", entry)
        if not size:
            continue
        shape = re.search(r"(?:^|\n)\s*(?:Unpadded )?[Ss]hape: (\S+)", entry)
        name = re.search(r'op_name="([^"]*)"', entry)
        source = re.search(r'source_file="([^"]*)"(?: source_line=(\d+))?', entry)
        where = name[1] if name else ""
        if source:
            where += f" ({source[1]}:{source[2] or '?'})"
        buffers.append(
            Buffer(_size(size[1], size[2]) / GIB, shape[1] if shape else "", where.strip())
        )
    return tuple(buffers)


def argument_buffers(arguments: Any, limit: int = 8) -> tuple[Buffer, ...]:
    """Return the largest arguments per device, by path; exact, from shapes and shardings."""
    import jax

    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]:
        if not hasattr(leaf, "shape"):
            continue
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        size = math.prod(shape) * leaf.dtype.itemsize
        text = f"{leaf.dtype.name}[{','.join(map(str, shape))}]"
        found.append(Buffer(size / GIB, text, "argument " + jax.tree_util.keystr(path)))
    return tuple(sorted(found, key=lambda b: -b.gib)[:limit])


def argument_gib(arguments: Any) -> float:
    """Return GiB of arguments per device."""
    return sum(buffer.gib for buffer in argument_buffers(arguments, limit=10**9))


def advise(
    target: Target,
    needed_gib: float,
    arguments_gib: float,
    mesh_shape: Mapping[str, int],
    kernel: str = "",
    batch_axes: Sequence[str] = ("data", "fsdp"),
) -> tuple[str, ...]:
    """Say what to change, with figures; all GiB are per chip.

    Splitting over k times the chips divides what is sharded, so a slice that is needed/limit
    times as large is the least that can hold it.
    """
    if kernel:
        return (
            f"Kernel {kernel!r} asks for more VMEM than a core has: use smaller blocks, or fewer "
            "buffers per operand.",
        )
    limit = target.chip.hbm_gib
    over, temporaries = needed_gib - limit, max(needed_gib - arguments_gib, 0.0)
    lines = []
    if arguments_gib > limit:
        lines.append(
            f"The train state and batch alone take {arguments_gib:.1f} GiB per chip: shard the "
            "parameters and optimiser state further, or keep the optimiser state in bfloat16."
        )
    elif temporaries > 0:
        keep = max(limit - arguments_gib, 0.0) / temporaries
        lines.append(
            f"Temporaries take {temporaries:.1f} GiB per chip and {limit - arguments_gib:.1f} GiB "
            f"are left for them: cut the batch per chip to {math.floor(keep * 100)}% or less "
            "(gradient accumulation keeps the step's tokens), or save less for the backward pass "
            "(a stricter remat policy)."
        )
    replicas = mesh_shape.get("data", 1)
    if replicas > 1:
        lines.append(
            f"The state is held {replicas} times along the data axis: move those devices to fsdp "
            f"(fsdp={mesh_shape.get('fsdp', 1) * replicas}, data=1)."
        )
    if target.kind == "tpu":
        bigger = _bigger(target, needed_gib)
        if bigger:
            lines.append(
                f"Or rent more memory ({over:.1f} GiB per chip too little here): "
                f"{' or '.join(bigger)} could hold it if everything is sharded."
            )
    return tuple(lines)


def _bigger(target: Target, needed_gib: float) -> list[str]:
    """Return the smallest slices whose memory together exceeds what is needed."""
    total = needed_gib * target.chips
    names = []
    for family in (target.family, "v5p", "v6e", "v5e"):
        if any(name.startswith(family) for name in names):
            continue
        for name in known_targets(family, max_chips=8192):
            slice_ = parse_target(name)
            # A tenth to spare: not everything shards evenly.
            if slice_.chips * slice_.chip.hbm_gib >= 1.1 * total:
                names.append(name)
                break
    return names[:3]
