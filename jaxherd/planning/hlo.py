"""Read a compiled program's text (`compiled.as_text()`) into computations and instructions.

Only what planning needs is kept: opcode, sizes, operands, called computations, replica groups and
the compiler's cycle estimate.  A `while` line does not say how often its body runs: the trip count
is the constant that the condition compares with, so `schedule` gives each scheduled instruction
its *multiplicity*, the product of the trip counts around it.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from jaxherd.core.errors import JaxherdError

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
# A computation ends with a brace of its own, or with the thread that runs it; an attribute over
# several lines (a kernel's) ends with braces and more.
_END = re.compile(r"\}(\s*$|, execution_thread=)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .+ \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_INTEGER = re.compile(r"constant\((-?\d+)\)")


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    # f8e4m3fn, bf16, s4, u32, c64: the first number is the width in bits.
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0
    """0 is HBM; the TPU compiler puts 1 on what lives in VMEM, other numbers on scalar memories."""

    @property
    def bytes(self) -> int:
        """Unpadded size in bytes."""
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)

    @property
    def text(self) -> str:
        """Such as `bf16[1024,4096]`."""
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: tuple[tuple[str, str], ...]
    """(attribute, computation) pairs such as `("body", "region_0.1")`."""
    attributes: str = field(repr=False)
    """Everything after the operand list."""
    is_root: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all results."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate for one execution, where it gives one."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """The JAX name stack this instruction came from, or nothing."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def channel(self) -> str:
        """What ties the parts of one collective together: its channel, or nothing."""
        found = re.search(r"\bchannel_id=(\d+)", self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The target of a custom call, or nothing."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def thread(self) -> str:
        """The execution thread of an asynchronous call: `sparsecore`, or nothing."""
        found = re.search(r'async_execution_thread="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def call(self, attribute: str) -> str | None:
        """Return the computation called as `attribute` (`body`, `calls`, ...), if any."""
        return next((name for key, name in self.called if key == attribute), None)

    def usual_branch(self) -> str | None:
        """Return the computation of a conditional's false branch: the first of `lax.cond`'s.

        The programs here keep what is rarely needed in the true branch.
        """
        return self.call("false_computation") or self.call("branch")

    def cost_estimate(self) -> tuple[float, float] | None:
        """Return (FLOPs, bytes) that a Pallas call states of itself, if it does."""
        found = re.search(r'"cost_estimate":\{([^}]*)\}', self.attributes)
        if not found:
            return None
        numbers = dict(re.findall(r'"(\w+)":"?(-?[\d.]+)"?', found[1]))
        return float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", 0))


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, in schedule order where the module is scheduled."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose result the computation returns."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    num_partitions: int

    def nested(self, name: str) -> Iterator[Instruction]:
        """Yield the instructions of a computation and of all it calls, each computation once."""
        seen, stack = set(), [name]
        while stack:
            current = stack.pop()
            if current in seen or current not in self.computations:
                continue
            seen.add(current)
            for instruction in self.computations[current].instructions:
                yield instruction
                stack.extend(called for _, called in instruction.called)

    def trip_count(self, loop: Instruction) -> int | None:
        """Return how often a `while` runs its body, or None where no constant tells."""
        condition = self.computations.get(loop.call("condition") or "")
        if condition is None:
            return None
        found = _bound(self, condition)
        return None if found is None else max(found, 0)

    def schedule(self) -> "Schedule":
        """Return the scheduled computations with their multiplicities."""
        runs: dict[str, float] = {}
        unknown: list[str] = []
        conditionals: list[str] = []
        self._visit(self.entry, 1.0, runs, unknown, conditionals)
        return Schedule(self, runs, tuple(unknown), tuple(conditionals))

    def _visit(
        self,
        name: str,
        times: float,
        runs: dict[str, float],
        unknown: list[str],
        conditionals: list[str],
    ) -> None:
        runs[name] = runs.get(name, 0.0) + times
        for instruction in self.computations[name].instructions:
            if instruction.opcode == "while":
                trips = self.trip_count(instruction)
                if trips is None:
                    unknown.append(instruction.name)
                    trips = 1
                body = instruction.call("body")
                if body in self.computations:
                    self._visit(body, times * trips, runs, unknown, conditionals)
            elif instruction.opcode == "conditional":
                usual = instruction.usual_branch()
                conditionals.append(instruction.name)
                if usual in self.computations:
                    self._visit(usual, times, runs, unknown, conditionals)
            elif instruction.opcode == "call":
                for attribute, called in instruction.called:
                    if attribute != "condition" and called in self.computations:
                        self._visit(called, times, runs, unknown, conditionals)


@dataclass(frozen=True)
class Schedule:
    """Which computations the core runs line by line, and how often each."""

    module: Module
    runs: dict[str, float]
    unknown_loops: tuple[str, ...]
    """Loops whose trip count no constant tells; they are counted once."""
    conditionals: tuple[str, ...] = ()
    """Counted as their false branch."""

    def __iter__(self) -> Iterator[tuple[Instruction, Computation, float]]:
        for name, times in self.runs.items():
            computation = self.module.computations[name]
            for instruction in computation.instructions:
                yield instruction, computation, times


def _bound(module: Module, condition: Computation) -> int | None:
    """Find N in `i < N`, for the induction variable that starts at 0 in every JAX loop."""
    for instruction in reversed(condition.instructions):
        if instruction.opcode == "compare":
            found = re.search(r"direction=(\w+)", instruction.attributes)
            direction = found[1] if found else ""
            values = [_constant(condition, name) for name in instruction.operands]
            known = [value for value in values if value is not None]
            if len(known) != 1 or direction not in ("LT", "LE", "GT", "GE", "NE"):
                return None
            return known[0] + (direction in ("LE", "GE"))
        if instruction.opcode == "fusion":
            inner = module.computations.get(instruction.call("calls") or "")
            if inner is None or not any(i.opcode == "compare" for i in inner.instructions):
                continue
            found = _bound(module, inner)
            if found is not None:
                return found
            values = [_constant(condition, name) for name in instruction.operands]
            known = [value for value in values if value is not None]
            return known[0] if len(known) == 1 else None
    return None


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation.by_name.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = computation.by_name.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    found = _INTEGER.match("constant" + instruction.attributes)
    return int(found[1]) if found else None


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(dim) for dim in dims.split(",") if dim)
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(shapes)


def _instruction(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if not match:
        return None
    rest = line[match.end() :]
    # The result type is a tuple in brackets or one word; layouts hold brackets but no spaces.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    result, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    if not opcode:
        return None
    start = opcode.end() - 1
    stop = _closing(rest, start)
    operands, attributes = rest[start : stop + 1], rest[stop + 1 :]
    called = [(key, name) for key, name in _CALLED.findall(attributes)]
    if branches := _BRANCHES.search(attributes):
        called += [("branch", name) for name in _OPERAND.findall(branches[1])]
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        shapes=_shapes(result),
        operands=tuple(_OPERAND.findall(operands)),
        called=tuple(called),
        # A constant's value stands where other instructions have operands.
        attributes=operands + attributes if opcode[1] in ("constant", "parameter") else attributes,
        is_root=bool(match[1]),
    )


def _whole_lines(text: str) -> Iterator[str]:
    """Yield lines; an instruction whose attributes hold line breaks (kernels' do) comes as one."""
    held: list[str] = []
    for line in text.splitlines():
        if held and not (_NAME.match(line) or _END.match(line) or _HEADER.match(line)):
            held.append(line)
            continue
        if held:
            yield "".join(held)
        held = [line] if _NAME.match(line) else []
        if not held:
            yield line
    yield "".join(held)


def parse_hlo(text: str) -> Module:
    """Parse `compiled.as_text()`.

    Raises:
        JaxherdError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in _whole_lines(text):
        if header := _HEADER.match(line):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif name and _END.match(line):
            computations[name] = Computation(name, tuple(lines))
            name = ""
        elif name and (instruction := _instruction(line)):
            lines.append(instruction)
    if not entry:
        raise JaxherdError("This text is not a compiled HLO module: it has no ENTRY computation.")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
    replicas = re.search(r"\breplica_count=(\d+)", text[: text.find("\n")])
    count = max(int(partitions[1]) if partitions else 1, int(replicas[1]) if replicas else 1)
    return Module(computations, entry, count)


def replica_groups(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Return the groups of device positions that a collective runs in.

    Understands lists `{{0,1},{2,3}}`, iota `[2,4]<=[4,2]T(1,0)` and meshes
    `mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}`.  Positions count along the flattened mesh
    that the program was compiled for.  An empty list stands for one group of all devices.
    """
    everyone = (tuple(range(num_devices)),)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        return _mesh_groups(*match.groups())
    if match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        rows = _numbers(match[1])
        flat = _iota(_numbers(match[2]), _numbers(match[3] or ""))
        width = math.prod(rows[1:])
        return tuple(tuple(flat[i : i + width]) for i in range(0, len(flat), width))
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = tuple(_numbers(group) for group in re.findall(r"\{([\d,]*)\}", match[1]))
        return tuple(group for group in groups if group) or everyone
    return everyone


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _iota(dims: tuple[int, ...], permutation: tuple[int, ...]) -> list[int]:
    """Return iota over `dims`, transposed by `permutation`, flattened."""
    permutation = permutation or tuple(range(len(dims)))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    ranges = [range(dims[axis]) for axis in permutation]
    return [
        sum(index * strides[axis] for index, axis in zip(indices, permutation))
        for indices in itertools.product(*ranges)
    ]


def _mesh_groups(axes: str, order: str, chosen: str) -> tuple[tuple[int, ...], ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = list(range(math.prod(sizes.values())))
    if match := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        ids = _iota(_numbers(match[1]), _numbers(match[2] or ""))
    elif match := re.search(r"device_ids=\(([\d,]+)\)", order):
        ids = list(_numbers(match[1]))
    wanted: dict[str, list[tuple[int, int]]] = {}
    for name, outer, width in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        # `'a':(2)4` is a part of an axis: 4 steps, after splitting off an outer 2.
        wanted.setdefault(name, []).append((int(outer or 1), int(width or sizes[name])))
    inside, outside = [], []
    stride = math.prod(sizes.values())
    for name, size in sizes.items():
        done = 1
        for outer, width in sorted(wanted.get(name, [])):
            outside.append((outer // done, stride // outer))
            inside.append((width, stride // (outer * width)))
            done = outer * width
        outside.append((size // done, stride // size))
        stride //= size
    return tuple(tuple(ids[base + step] for step in _offsets(inside)) for base in _offsets(outside))


def _offsets(parts: list[tuple[int, int]]) -> list[int]:
    """Return all sums of one multiple per (size, stride) part, in order."""
    steps = [[index * stride for index in range(size)] for size, stride in parts]
    return [sum(combination) for combination in itertools.product(*steps)]
