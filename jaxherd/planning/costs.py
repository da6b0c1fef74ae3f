"""What each scheduled instruction costs on one device: seconds of the core, bytes of HBM.

Where the compiler states `estimated_cycles` they are used.  It states none for copies, dynamic
updates and Pallas kernels: those are priced by their bytes over the HBM bandwidth, and a kernel by
the FLOPs that it states, at the share of the peak that the compiler grants its own large products
(`Shares`).  All of this is an estimate.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxherd.core.chips import Chip
from jaxherd.planning.hlo import Computation, Instruction, Module


@dataclass(frozen=True)
class Shares:
    """Of the peak, what kernels are taken to reach on one kind of chip, so that they are priced as
    XLA prices its own products.

    Attributes:
      matmul: peak cycles over XLA's estimated cycles of its own product of [8192, 5120] and
        [5120, 8192], Scout's experts (`tests/benchmarks/matmul_share.py`).
      attention, attention_gradient: that, times bundles of the grouped product over bundles of the
        attention kernels per multiplication (inner / tile in the kernels' READMEs, heads of 128):
        their exponentials keep the matrix unit waiting, the more the wider it is.
    """

    matmul: float
    attention: float
    attention_gradient: float


SHARES: Mapping[str, Shares] = {
    "v5e": Shares(0.97, 0.77, 0.94),
    "v5p": Shares(0.88, 0.69, 0.85),
    "v6e": Shares(0.91, 0.33, 0.44),
    "tpu7x": Shares(0.82, 0.17, 0.26),
}
# Elsewhere no compiler says what its own products take: the peak, a lower bound of the time.
PEAK = Shares(1.0, 1.0, 1.0)

# Lines that move nothing: names for values, control flow (booked by what it runs), ends of copies.
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "call",
        "conditional",
        "partition-id",
        "replica-id",
        "after-all",
        "add-dependency",
        "optimization-barrier",
        "domain",
    )
)
_MATMULS = frozenset(("dot", "convolution"))
_NUMBER = r"\d\.\d+e[+-]\d+"
_STATED = rf"kernel_flops_fwd_(?P<fwd>{_NUMBER})_dkv_(?P<dkv>{_NUMBER})_dq_(?P<dq>{_NUMBER})"
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu")


@dataclass(frozen=True)
class Cost:
    """One execution of one instruction on one device."""

    seconds: float
    matmul_seconds: float
    """The part of `seconds` spent in matrix multiplication."""
    hbm_bytes: float
    kernel: bool = False
    """Whether it is a hand-written kernel."""
    priced: bool = True
    """False for a kernel that says nothing of its FLOPs: it is priced by its bytes alone."""


def attention_flops(instruction: Instruction) -> tuple[float, bool]:
    """Return (FLOPs that an attention kernel's name scope states or 0, whether of its gradient).

    `kernels/attention/splash.py` writes the scope; jax names the kernel after its pass, in a scope
    of its own as well, since a call in a loop over rows has another name.
    """
    found = re.search(_STATED, instruction.op_name)
    if found is None:
        return 0.0, False
    backward = re.search(r"splash_\w+?_(dkv|dq)_", f"{instruction.op_name}/{instruction.name}")
    return float(found[backward[1] if backward else "fwd"]), backward is not None


class CostModel:
    """Prices instructions of one module on one kind of chip."""

    def __init__(self, module: Module, chip: Chip, dtype: str = "bf16"):
        self.module = module
        self.chip = chip
        self.peak = chip.peak(dtype) / chip.devices_per_chip
        self.bandwidth = chip.hbm_bytes_per_s / chip.devices_per_chip
        self.shares = SHARES.get(chip.name, PEAK)

    def has_matmul(self, instruction: Instruction) -> bool:
        """Whether it is a matmul, or a fusion around one."""
        if instruction.opcode in _MATMULS:
            return True
        called = instruction.call("calls")
        return called is not None and any(i.opcode in _MATMULS for i in self.module.nested(called))

    def cost(self, instruction: Instruction, computation: Computation) -> Cost:
        """Price one execution."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return Cost(0.0, 0.0, 0.0)
        moved = self.hbm_bytes(instruction, computation)
        if opcode.endswith("-start") or opcode in ("send", "recv"):
            return Cost(0.0, 0.0, moved)
        transfer = moved / self.bandwidth
        if opcode == "custom-call":
            if not instruction.target.startswith(_KERNELS):
                # Markers such as `PrepareAsyncCallStart`; real ones still pay for their bytes.
                return Cost(transfer, 0.0, moved)
            estimate = instruction.cost_estimate()
            flops, stated = estimate or (0.0, 0.0)
            share = self.shares.matmul
            if not flops:
                flops, gradient = attention_flops(instruction)
                share = self.shares.attention_gradient if gradient else self.shares.attention
            matmul = flops / (self.peak * share)
            # A kernel may leave most of a buffer alone, which the buffer's size does not tell.
            moved = stated or moved
            seconds = max(matmul, moved / self.bandwidth)
            return Cost(seconds, matmul, moved, kernel=True, priced=bool(flops))
        cycles = instruction.estimated_cycles
        seconds = transfer if cycles is None else cycles / self.chip.clock_hz
        return Cost(seconds, seconds if self.has_matmul(instruction) else 0.0, moved)

    def hbm_bytes(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes read from and written to HBM: operands and results that do not live in VMEM.

        A fusion that slices a stacked operand, or updates one in place, moves the slice only.
        """
        if instruction.opcode in _FREE:
            return 0.0
        inner = self.module.computations.get(instruction.call("calls") or "")
        if inner is None:
            return self._plain_bytes(instruction, computation)
        total, in_place = 0.0, False
        parameters = {
            int(i.attributes.strip("()").split(")")[0]): i
            for i in inner.instructions
            if i.opcode == "parameter"
        }
        for index, name in enumerate(instruction.operands):
            source = computation.by_name.get(name)
            parameter = parameters.get(index)
            if source is None or parameter is None:
                continue
            full = sum(s.bytes for s in source.shapes if s.memory_space == 0)
            if not full:
                continue
            uses = _uses(inner, parameter.name)
            if uses and all(u.opcode == "dynamic-slice" for u, _ in uses):
                total += min(full, sum(u.bytes for u, _ in uses))
            elif uses and all(u.opcode == "dynamic-update-slice" and i == 0 for u, i in uses):
                in_place = True
            else:
                total += full
        written = sum(s.bytes for s in instruction.shapes if s.memory_space == 0)
        if in_place:
            updates = [
                inner.by_name[i.operands[1]].bytes
                for i in inner.instructions
                if i.opcode == "dynamic-update-slice" and i.operands[1] in inner.by_name
            ]
            written = min(written, 2 * sum(updates))
        return total + written

    def _plain_bytes(self, instruction: Instruction, computation: Computation) -> float:
        written = sum(s.bytes for s in instruction.shapes if s.memory_space == 0)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2.0 * written
        if instruction.opcode == "dynamic-update-slice":
            update = computation.by_name.get(instruction.operands[1])
            return 2.0 * (update.bytes if update else 0)
        if instruction.opcode == "copy-start":
            # Result: destination, source, a context word; one of the two may be in VMEM.
            return float(sum(s.bytes for s in instruction.shapes[:2] if s.memory_space == 0))
        read = 0
        for name in instruction.operands:
            source = computation.by_name.get(name)
            if source is not None:
                read += sum(s.bytes for s in source.shapes if s.memory_space == 0)
        return float(read + written)


def _uses(computation: Computation, name: str) -> list[tuple[Instruction, int]]:
    """Return (instruction, operand index) of each use, looking through bitcasts."""
    uses = []
    for instruction in computation.instructions:
        for index, operand in enumerate(instruction.operands):
            if operand != name:
                continue
            if instruction.opcode == "bitcast":
                uses += _uses(computation, instruction.name)
            else:
                uses.append((instruction, index))
    return uses
