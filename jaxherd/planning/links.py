"""How long a collective occupies the links, at best: a bound from the slice's wiring.

Model.  A group of devices spans some axes of the slice's torus.  Along an axis it can use one link
in one direction, or two where it covers a full ring with wrap-around.  With B bytes per second and
link, and L links over the axes it spans, moving W bytes per device takes W / (L * B).  A group
that takes every s-th chip of an axis shares that axis with s - 1 sister groups.  Ring, latency and
routing costs are left out, so this is a lower bound on the time.

Wrap-around: v5p and tpu7x have it on slices made of whole 4x4x4 cubes, v5e and v6e along an axis of
16 (Google Cloud's v5p page; JAX scaling book, chapter on TPUs).  The two devices of a tpu7x chip
share its torus links and talk to each other over a die-to-die link, assumed to carry as much as all
six of them.
"""

from dataclasses import dataclass
from typing import Any

from jaxherd.core.targets import Target

_DIE_TO_DIE_LINKS = 6
_DIMS = ("x", "y", "z")


@dataclass(frozen=True)
class Span:
    """What a group of devices covers."""

    size: int
    slices: int
    links: float
    """Torus links per device the group can use at once, after sharing."""
    resources: frozenset[str]
    """Names of the link sets it occupies: `x`, `y`, `z`, `die`, `dcn`, `nvlink`."""
    rings: tuple[tuple[int, bool], ...]
    """(length, wraps) of each torus axis spanned, for all-to-all's bisection bound."""


def wire_bytes(op: str, operand_bytes: float | int, size: int) -> float:
    """Return the bytes one device sends for one execution, by the operand's size on it.

    all-gather operand*(n-1), reduce-scatter and all-to-all operand*(n-1)/n, all-reduce twice that,
    collective-permute the operand.
    """
    if size <= 1:
        return 0.0
    share = (size - 1) / size
    factors = {
        "all-gather": float(size - 1),
        "reduce-scatter": share,
        "all-reduce": 2 * share,
        "all-to-all": share,
        "ragged-all-to-all": share,
    }
    return operand_bytes * factors.get(op, 1.0)


class Fabric:
    """The links of a target, seen through the mesh a program was compiled for."""

    def __init__(self, target: Target, mesh: Any, partitions: int | None = None):
        self.target = target
        self.mesh = mesh
        everyone = list(mesh.devices.flat)
        self.index = list(range(len(everyone)))
        # The program of a multi-slice job covers one slice; its positions count within that.
        if target.num_slices > 1 and partitions == target.devices_per_slice:
            self.index = [i for i in self.index if not getattr(everyone[i], "slice_index", 0)]
        self.devices = [everyone[i] for i in self.index]

    def _place(self, position: int) -> tuple[int, tuple[int, ...]]:
        device = self.devices[position]
        if self.target.kind == "gpu":
            return device.process_index, (0, 0, 0)
        coords = tuple(getattr(device, "coords", None) or (0, 0, 0))
        # One slice says None or leaves the attribute out.
        return getattr(device, "slice_index", None) or 0, coords

    def _wraps(self, dim: int) -> bool:
        topology = (*self.target.topology, 1, 1, 1)[:3]
        if self.target.family in ("v5e", "v6e"):
            return topology[dim] == 16
        return all(length % 4 == 0 for length in topology)

    def span(self, group: tuple[int, ...]) -> Span:
        """Return what one group (positions along the flattened mesh) covers."""
        places = [self._place(position) for position in group]
        slices = len({slice_index for slice_index, _ in places})
        resources = {"dcn"} if slices > 1 else set()
        if self.target.kind != "tpu":
            links = float(self.target.chip.ici_links)
            return Span(len(group), slices, links, frozenset(resources | {"nvlink"}), ())
        links, rings = 0.0, []
        for dim, name in enumerate(_DIMS):
            values = sorted({coords[dim] for _, coords in places})
            if len(values) < 2:
                continue
            stretch = values[-1] - values[0] + 1
            topology = (*self.target.topology, 1, 1, 1)[:3]
            # Every s-th chip around the ring still uses the whole ring.
            step = min(b - a for a, b in zip(values, values[1:]))
            full = self._wraps(dim) and step * len(values) == topology[dim]
            share = len(values) / (topology[dim] if full else stretch)
            links += (2 if full else 1) * share
            rings.append((len(values), full))
            resources.add(name)
        if not rings:
            links = float(_DIE_TO_DIE_LINKS)
            resources.add("die")
        else:
            links /= self.target.chip.devices_per_chip
        return Span(len(group), slices, links, frozenset(resources), tuple(rings))

    def seconds(self, op: str, operand_bytes: float | int, span: Span) -> float:
        """Return the least time of one execution; between slices the data-centre network adds."""
        if span.size <= 1:
            return 0.0
        chip = self.target.chip
        link = chip.ici_bytes_per_s_per_link
        if op == "collective-permute":
            if span.slices > 1:
                return operand_bytes * chip.devices_per_chip / chip.dcn_bytes_per_s
            return operand_bytes / (link * max(1.0, min(span.links, 1.0)))
        inside = span.size // span.slices
        total = 0.0
        if inside > 1:
            total = wire_bytes(op, operand_bytes, inside) / (link * span.links)
            if op in ("all-to-all", "ragged-all-to-all"):
                # Half of everything crosses the middle of each axis.
                for length, wraps in span.rings:
                    hops = length / (8 if wraps else 4)
                    per_link = operand_bytes * chip.devices_per_chip * hops / link
                    total = max(total, per_link)
        if span.slices > 1:
            # Reduced or gathered inside the slice first, so each device carries its part only.
            across = operand_bytes / (inside if op in ("all-reduce", "reduce-scatter") else 1)
            sent = wire_bytes(op, across, span.slices)
            total += sent * chip.devices_per_chip / chip.dcn_bytes_per_s
        return total

    def between_slices(self, op: str, operand_bytes: float | int, slices: int) -> float:
        """Return the least time for one device to exchange with its peers in other slices."""
        sent = wire_bytes(op, operand_bytes, slices)
        return sent * self.target.chip.devices_per_chip / self.target.chip.dcn_bytes_per_s

    def slice_axes(self) -> str:
        """Name the mesh axes that cross slices, in brackets where they also run inside one."""
        shape = self.mesh.devices.shape
        names, inside = [], True
        for axis, name in enumerate(self.mesh.axis_names):
            lines = _lines(self.mesh.devices, axis)
            counts = {len({getattr(d, "slice_index", 0) for d in line}) for line in lines}
            if max(counts) > 1:
                names.append(name)
                inside = inside and max(counts) == shape[axis]
        label = "+".join(names)
        return label if inside else f"[{label}]"

    def axes(self, groups: tuple[tuple[int, ...], ...]) -> str:
        """Name the mesh axes whose devices form these groups, such as `fsdp` or `data+fsdp`.

        Groups that no set of whole axes makes are named after the axes along which they vary, in
        brackets.
        """
        import numpy as np

        names, shape = self.mesh.axis_names, self.mesh.devices.shape
        coordinates = np.stack(np.unravel_index(self.index, shape), axis=-1)
        varying = set()
        for group in groups:
            block = coordinates[list(group)]
            varying |= {i for i in range(len(names)) if len(set(block[:, i].tolist())) > 1}
        label = "+".join(names[i] for i in sorted(varying))
        expected = 1
        for i in varying:
            expected *= shape[i]
        whole = all(len(group) == expected for group in groups)
        return label if whole else f"[{label}]"


def _lines(devices: Any, axis: int) -> list[list[Any]]:
    """Return the lines of a device array along `axis`."""
    import numpy as np

    return np.moveaxis(devices, axis, -1).reshape(-1, devices.shape[axis]).tolist()
