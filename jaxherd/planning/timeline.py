"""Walk the schedule: which collectives the core waits for, and for how long.

The core runs the lines of a computation one after the other.  A synchronous collective stops it
for the collective's whole time.  An asynchronous one starts when its links are free and stops the
core at its `done` line only for what is left.  Two collectives on the same links queue up, so the
same computation never hides both.  A loop counts as its body's time, times its trips.

The four shapes of an asynchronous collective in the text: `all-gather-start` ... `-done`;
`call-start` ... `call-done` around a computation on the SparseCore; `async-start` ... `-done`; and
an asynchronous collective fusion on the TensorCore, whose start, steps (fused with matmuls) and end
are fusions that share a chain number.  Between slices the host's network runtime does the work: a
`send` that names the collective, and a `recv-done` that waits for it.
"""

import re
from dataclasses import dataclass, field

from jaxherd.planning.costs import Cost, CostModel
from jaxherd.planning.hlo import Computation, Instruction, Module, replica_groups
from jaxherd.planning.links import Fabric, Span, wire_bytes

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass
class CollectiveUse:
    """One collective in the schedule; times and bytes are per execution and device."""

    name: str
    op: str
    axes: str
    group_size: int
    wire_bytes: float
    seconds: float
    asynchronous: bool
    unit: str
    """Who drives it: `tensorcore`, `sparsecore`, `dma` or, between slices, `network`."""
    op_name: str
    dtype: str
    count: float = 0.0
    exposed_seconds: float = 0.0
    resources: frozenset[str] = frozenset()


@dataclass
class Timeline:
    """Sums over one step of one device."""

    collectives: list[CollectiveUse] = field(default_factory=list)
    compute_seconds: float = 0.0
    matmul_seconds: float = 0.0
    hbm_bytes: float = 0.0
    total_seconds: float = 0.0
    """Length of the walk: computation by the compiler's estimates, plus exposed collectives."""
    unpriced_kernels: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    unknown_loops: tuple[str, ...] = ()
    conditionals: tuple[str, ...] = ()


class _Walker:
    def __init__(self, module: Module, fabric: Fabric, model: CostModel):
        self.module, self.fabric, self.model = module, fabric, model
        self.runs = module.schedule()
        self.timeline = Timeline(
            unknown_loops=self.runs.unknown_loops, conditionals=self.runs.conditionals
        )
        self.kernels: dict[str, bool] = {}
        self.lengths: dict[str, float] = {}

    def walk(self, name: str) -> float:
        """Return the seconds of one run of a computation, and book all of its runs."""
        if name in self.lengths:
            return self.lengths[name]
        computation, times = self.module.computations[name], self.runs.runs[name]
        clock = 0.0
        flying: dict[str, tuple[CollectiveUse, float]] = {}
        chains: dict[str, str] = {}
        for line in computation.instructions:
            if line.opcode in ("while", "call", "conditional"):
                clock += self._inner(line)
                continue
            if rendezvous := _between_slices(line):
                if line.opcode == "send":
                    use = self._slice_use(line, computation, times)
                    begin = max([clock, *(f for o, f in flying.values() if o.unit == "network")])
                    flying[rendezvous] = (use, begin + use.seconds)
                else:
                    chains[line.name] = rendezvous
                continue
            if line.opcode == "recv-done" and line.operands:
                key = chains.get(line.operands[0], "")
                if key in flying:
                    clock = self._land(flying.pop(key), clock)
                continue
            kind, inner, holder = self._collective(line, computation)
            if kind == "done":
                key = self._started_by(line, inner, chains)
                if key in flying:
                    clock = self._land(flying.pop(key), clock)
                continue
            if kind == "step":
                # Part of a chain already in flight: its own cycles hide it.
                clock += self._compute(line, computation, times)
                continue
            if kind in ("start", "sync", "fused") and inner is not None:
                use = self._use(line, inner, holder, kind, times)
                if kind == "start":
                    begin = clock
                    for other, finish in flying.values():
                        if other.resources & use.resources:
                            begin = max(begin, finish)
                    flying[line.name] = (use, begin + use.seconds)
                    chains[_chain(inner)] = line.name
                    continue
                # The links may still be busy: that wait is the other collective's exposure.
                for key in [k for k, (o, _) in flying.items() if o.resources & use.resources]:
                    clock = self._land(flying[key], clock)
                    flying[key] = (flying[key][0], clock)
                if kind == "fused":
                    own = self._compute(line, computation, times)
                    use.exposed_seconds = max(0.0, use.seconds - own)
                    clock += own + use.exposed_seconds
                else:
                    use.exposed_seconds = use.seconds
                    clock += use.seconds
                continue
            clock += self._compute(line, computation, times)
        for landing in flying.values():
            clock = self._land(landing, clock)
        self.lengths[name] = clock
        return clock

    def _inner(self, line: Instruction) -> float:
        names = [n for a, n in line.called if a != "condition" and n in self.runs.runs]
        if line.opcode == "conditional":
            names = [n for n in names if n == line.usual_branch()]
        lengths = [self.walk(n) for n in names]
        if line.opcode == "while":
            return sum(lengths) * (self.module.trip_count(line) or 1)
        return max(lengths, default=0.0)

    @staticmethod
    def _land(flight: tuple[CollectiveUse, float], clock: float) -> float:
        use, finish = flight
        use.exposed_seconds += max(0.0, finish - clock)
        return max(clock, finish)

    def _compute(self, line: Instruction, computation: Computation, times: float) -> float:
        cost: Cost = self.model.cost(line, computation)
        total = self.timeline
        total.compute_seconds += cost.seconds * times
        total.matmul_seconds += min(cost.matmul_seconds, cost.seconds) * times
        total.hbm_bytes += cost.hbm_bytes * times
        if cost.kernel:
            self.kernels[line.name] = cost.priced
        return cost.seconds

    def _collective(
        self, line: Instruction, computation: Computation
    ) -> tuple[str, Instruction | None, Computation]:
        """Return (start, done, step, sync, fused or nothing; the collective; where it is)."""
        opcode = line.opcode
        if opcode in COLLECTIVES:
            return "sync", line, computation
        for suffix, kind in (("-start", "start"), ("-done", "done")):
            if opcode.removesuffix(suffix) in COLLECTIVES and opcode.endswith(suffix):
                return kind, line, computation
        if opcode in ("call-done", "async-done"):
            return "done", None, computation
        called = line.call("to_apply") if opcode == "call-start" else line.call("calls")
        if called is None or opcode not in ("call-start", "async-start", "fusion"):
            return "", None, computation
        found, holder, markers, matmul = self._find(called)
        if found is None or holder is None:
            return "", None, computation
        if opcode != "fusion" or "AsyncCollectiveStart" in markers:
            return "start", found, holder
        if "AsyncCollectiveDone" in markers:
            return "done", found, holder
        if _chain(found):
            return "step", found, holder
        return ("fused" if matmul else "sync"), found, holder

    def _find(self, called: str) -> tuple[Instruction | None, Computation | None, set[str], bool]:
        found, holder, markers, matmul = None, None, set(), False
        stack, seen = [called], set()
        while stack:
            name = stack.pop()
            if name in seen or name not in self.module.computations:
                continue
            seen.add(name)
            for inner in self.module.computations[name].instructions:
                if inner.opcode in COLLECTIVES and found is None:
                    found, holder = inner, self.module.computations[name]
                if inner.opcode == "custom-call":
                    markers.add(inner.target)
                matmul = matmul or inner.opcode in ("dot", "convolution")
                stack.extend(n for _, n in inner.called)
        return found, holder, markers, matmul

    def _slice_use(
        self, line: Instruction, computation: Computation, times: float
    ) -> CollectiveUse:
        op = _attribute(line, "_xla_megascale_transfer_type").lower().replace("_", "-")
        slices = _slices(_attribute(line, "_xla_megascale_target"), self.fabric.target.num_slices)
        size = line.shapes[0].bytes
        use = CollectiveUse(
            name=line.name,
            op=op if op in COLLECTIVES else "send",
            axes=self.fabric.slice_axes(),
            group_size=slices,
            wire_bytes=wire_bytes(op, size, slices),
            seconds=self.fabric.between_slices(op, size, slices),
            asynchronous=True,
            unit="network",
            op_name=line.op_name,
            dtype=line.shapes[0].dtype,
            count=times,
            resources=frozenset(("dcn",)),
        )
        self.timeline.collectives.append(use)
        return use

    @staticmethod
    def _started_by(line: Instruction, inner: Instruction | None, chains: dict[str, str]) -> str:
        if inner is not None and _chain(inner) in chains and line.opcode == "fusion":
            return chains[_chain(inner)]
        return line.operands[0] if line.operands else ""

    def _use(
        self,
        line: Instruction,
        inner: Instruction,
        holder: Computation,
        kind: str,
        times: float,
    ) -> CollectiveUse:
        op = next(
            name
            for name in sorted(COLLECTIVES, key=len, reverse=True)
            if inner.opcode.removesuffix("-start") == name
        )
        operands = [holder.by_name[n] for n in inner.operands if n in holder.by_name]
        size = sum(operand.bytes for operand in operands)
        if op == "ragged-all-to-all" and len(operands) >= 2:
            # How much is sent is known at run time only: a balanced load fills the smaller of
            # what is held and what is received into.
            size = min(operands[0].bytes, operands[1].bytes)
        if not size:
            size = inner.bytes
        # A fusion of an all-reduce with the slice this device keeps is a reduce-scatter.
        if op == "all-reduce" and line.opcode == "fusion":
            root = self.module.computations[line.call("calls") or ""].root
            if root.opcode == "dynamic-slice":
                op = "reduce-scatter"
        groups = collective_groups(inner, self.module.num_partitions)
        span: Span = self.fabric.span(max(groups, key=len))
        unit = "tensorcore"
        if kind == "start":
            unit = line.thread or ("dma" if line.opcode != "fusion" else "tensorcore")
        use = CollectiveUse(
            name=line.name,
            op=op,
            axes=self.fabric.axes(groups),
            group_size=span.size,
            wire_bytes=wire_bytes(op, size, span.size),
            seconds=self.fabric.seconds(op, size, span),
            asynchronous=kind in ("start", "fused"),
            unit=unit,
            op_name=inner.op_name or line.op_name,
            dtype=operands[0].shapes[0].dtype if operands and operands[0].shapes else "",
            count=times,
            resources=span.resources,
        )
        self.timeline.collectives.append(use)
        return use


def _attribute(instruction: Instruction, key: str) -> str:
    found = re.search(rf'{key}="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _between_slices(instruction: Instruction) -> str:
    """Return the name by which a `send` or `recv` between slices is known, or nothing."""
    if instruction.opcode not in ("send", "recv"):
        return ""
    if "_xla_megascale_transfer_type" not in instruction.attributes:
        return ""
    return _attribute(instruction, "_xla_host_transfer_rendezvous")


def _slices(target: str, default: int) -> int:
    """Count the slices in a target such as `{1,2}x{0:3}`; the last group of ids counts devices."""
    found = re.match(r"\{([\d,:]+)\}", target)
    if not found:
        return default
    total = 0
    for part in found[1].split(","):
        first, _, last = part.partition(":")
        total += int(last or first) - int(first) + 1
    return total


def _chain(instruction: Instruction) -> str:
    """Return what names an asynchronous collective fusion's chain, or nothing."""
    marker = 'chain_id="'
    if marker not in instruction.attributes:
        return ""
    chain = instruction.attributes.split(marker, 1)[1].split('"', 1)[0]
    return f"{instruction.channel}/{chain}"


def collective_groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """Return the device groups of a collective; of a permute, its (source, target) pairs."""
    marker = "source_target_pairs={{"
    if marker not in instruction.attributes:
        return replica_groups(instruction.attributes, devices)
    text = instruction.attributes.split(marker, 1)[1].split("}}", 1)[0]
    pairs = [tuple(int(n) for n in pair.split(",")) for pair in text.split("},{")]
    return tuple(pair for pair in pairs if pair[0] != pair[1]) or ((0,),)


def build_timeline(module: Module, fabric: Fabric, model: CostModel) -> Timeline:
    """Walk the entry computation and all that it runs."""
    walker = _Walker(module, fabric, model)
    walker.timeline.total_seconds = walker.walk(module.entry)
    walker.timeline.kernels = tuple(walker.kernels)
    walker.timeline.unpriced_kernels = tuple(
        k for k, priced in walker.kernels.items() if not priced
    )
    return walker.timeline
