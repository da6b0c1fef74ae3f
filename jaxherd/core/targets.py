"""Names of machines: `cpu:8`, `h100:8`, `v5e:4x4`, `v5p-1024`, `2*v5p:4x4x4`.

A `Target` says how many chips, devices and hosts a name stands for; `abstract_devices` gives the
JAX devices to compile for, without owning any of that hardware.
"""

import importlib.util
import itertools
import math
import os
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from jaxherd.core.chips import CHIPS, Chip
from jaxherd.core.errors import JaxherdError, missing_extra, nearest

__all__ = ["CHIPS", "Chip", "Target", "abstract_devices", "known_targets", "parse_target"]

# Published slice shapes of the two-dimensional generations (Google Cloud, v5e and v6e pages).
_SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# v5p and tpu7x: these, and whole cubes of 4x4x4, sorted, up to the largest that can be scheduled.
_SHAPES_SUBCUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_MAX_CHIPS_3D = {"v5p": 6144, "tpu7x": 9216}
_MAX_SLICES = 256
_TPU = ("v5e", "v5p", "v6e", "tpu7x")
_GPU = ("gpu", "h100", "a100")
# Accelerator types count chips on v5e and v6e and TensorCores on v5p and tpu7x.
_TYPE_PREFIX = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x"}
_EXAMPLES = "cpu, cpu:8, gpu, h100:8, v5e:4x4, v5litepod-16, v5p:8x8x8, v5p-1024, 2*v5p:4x4x4"


@dataclass(frozen=True)
class Target:
    """A machine or a group of identical TPU slices; build it with `parse_target`."""

    kind: str
    """`cpu`, `gpu` or `tpu`."""
    family: str
    """The name's first part: `cpu`, `gpu`, `h100`, `a100`, `v5e`, `v5p`, `v6e`, `tpu7x`."""
    chip: Chip
    topology: tuple[int, ...]
    """Chips along each axis of one slice; `(n,)` for CPUs and GPUs."""
    num_slices: int
    """Slices joined by the data-centre network; 1 unless asked."""
    chips: int
    """Chips over all slices."""
    devices: int
    """JAX devices over all slices: twice the chips on tpu7x."""
    hosts: int
    """Machines (TPU VMs, GPU nodes) over all slices, each running one process."""

    @property
    def name(self) -> str:
        """The canonical name, which `parse_target` reads back to an equal target."""
        if self.kind == "tpu":
            one = f"{self.family}:{'x'.join(map(str, self.topology))}"
            return one if self.num_slices == 1 else f"{self.num_slices}*{one}"
        return self.family if self.topology == (1,) else f"{self.family}:{self.topology[0]}"

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice."""
        return self.chips // self.num_slices

    @property
    def hosts_per_slice(self) -> int:
        """Machines of one slice."""
        return self.hosts // self.num_slices

    @property
    def devices_per_slice(self) -> int:
        """JAX devices of one slice."""
        return self.devices // self.num_slices

    @property
    def accelerator_type(self) -> str:
        """The name `gcloud compute tpus` uses for one slice, such as `v5p-1024`.

        Raises:
            JaxherdError: for CPUs and GPUs, which have no such name.
        """
        if self.kind != "tpu":
            raise JaxherdError(f"{self.name!r} is not a TPU slice, so it has no accelerator type.")
        unit = self.chip.tensor_cores
        return f"{_TYPE_PREFIX[self.family]}-{self.chips_per_slice * unit}"

    @property
    def default_topology(self) -> bool:
        """Whether `accelerator_type` alone stands for this topology."""
        return self.kind == "tpu" and _default_shape(self.family, self.chips_per_slice) == (
            self.topology
        )

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """Chips along each axis of one host's part of a slice."""
        shape = (*self.topology, 1, 1, 1)[:3]
        if self.chips_per_slice <= 2:
            return (1, 1, 1)
        # Eight-chip v5e and v6e slices are one virtual machine; all others have four chips each.
        return (2, 4, 1) if shape == (2, 4, 1) else (2, 2, 1)


@cache
def _shapes(family: str) -> tuple[tuple[int, ...], ...]:
    if family in ("v5e", "v6e"):
        return _SHAPES_2D
    limit = _MAX_CHIPS_3D[family] // 64
    cubes = [
        (4 * a, 4 * b, 4 * c)
        for a, b, c in itertools.product(range(1, 13), range(1, 13), range(1, limit + 1))
        if a <= b <= c and a * b * c <= limit
    ]
    one = ((1, 1, 1),) if family == "tpu7x" else ()
    return (*one, *_SHAPES_SUBCUBE, *sorted(cubes, key=lambda s: (math.prod(s), s)))


def _default_shape(family: str, chips: int) -> tuple[int, ...] | None:
    """Return the published shape of that many chips: the one nearest to a cube."""
    fitting = [shape for shape in _shapes(family) if math.prod(shape) == chips]
    return min(fitting, key=sum, default=None)


def known_targets(family: str, max_chips: int = 512) -> list[str]:
    """Return the canonical single-slice names of a TPU family, smallest first."""
    return [
        f"{family}:{'x'.join(map(str, shape))}"
        for shape in _shapes(family)
        if math.prod(shape) <= max_chips
    ]


def _nearest_shapes(family: str, wanted: tuple[int, ...], text: str) -> JaxherdError:
    chips = math.prod(wanted)
    ranked = sorted(
        _shapes(family),
        key=lambda s: (
            sorted(s) != sorted(wanted),
            abs(math.log(math.prod(s) / max(chips, 1))),
            sum(s),
        ),
    )
    names = ", ".join(f"{family}:{'x'.join(map(str, shape))}" for shape in ranked[:3])
    return JaxherdError(f"{text!r} is not a {family} slice; the nearest ones are {names}.")


def _tpu(family: str, shape: tuple[int, ...], num_slices: int, text: str) -> Target:
    if shape not in _shapes(family):
        raise _nearest_shapes(family, shape, text)
    chip = CHIPS[family]
    chips = math.prod(shape)
    per_host = 8 if shape == (2, 4) else chip.chips_per_host
    return Target(
        kind="tpu",
        family=family,
        chip=chip,
        topology=shape,
        num_slices=num_slices,
        chips=chips * num_slices,
        devices=chips * chip.devices_per_chip * num_slices,
        hosts=max(1, chips // per_host) * num_slices,
    )


def _counted(family: str, count: int, text: str) -> Target:
    chip = CHIPS["h100" if family == "gpu" else family]
    kind = chip.kind
    if not 1 <= count <= 4096:
        raise JaxherdError(f"{text!r}: the number of devices must be between 1 and 4096.")
    if kind == "gpu" and count > 8 and count % 8:
        below, above = count // 8 * 8, (count // 8 + 1) * 8
        raise JaxherdError(
            f"{text!r}: more than 8 GPUs come in whole hosts of 8; "
            f"the nearest ones are {family}:{below}, {family}:{above}."
        )
    hosts = math.ceil(count / 8) if kind == "gpu" else 1
    return Target(kind, family, chip, (count,), 1, chips=count, devices=count, hosts=hosts)


def parse_target(text: str) -> Target:
    """Return the `Target` that `text` names.

    Forms: `cpu`, `cpu:8` (fake devices), `gpu`, `h100:8`, `v5e:4x4`, accelerator types such as
    `v5litepod-16` or `v5p-1024` (v5p and tpu7x count TensorCores, two to a chip), and several
    slices as `2*v5p:4x4x4` or `v5p:4x4x4@2`.

    Raises:
        JaxherdError: the name is unknown or no such slice is offered; the nearest names are told.
    """
    raw = text
    text = text.strip().lower()
    num_slices = 1
    if multi := re.fullmatch(r"(\d{1,9})\*(.+)", text):
        num_slices, text = int(multi[1]), multi[2]
    elif multi := re.fullmatch(r"(.+)@(\d{1,9})", text):
        num_slices, text = int(multi[2]), multi[1]
    if not 1 <= num_slices <= _MAX_SLICES:
        raise JaxherdError(f"{raw!r}: the number of slices must be between 1 and {_MAX_SLICES}.")

    if match := re.fullmatch(r"(cpu|gpu|h100|a100)(?::(\d{1,9}))?", text):
        if num_slices > 1:
            raise JaxherdError(f"{raw!r}: only TPU slices can be multiplied; write cpu:8 or gpu:8.")
        return _counted(match[1], int(match[2] or 1), raw)
    if match := re.fullmatch(r"(v5e|v5p|v6e|tpu7x):(\d{1,4}(?:x\d{1,4}){1,2})", text):
        family, shape = match[1], tuple(map(int, match[2].split("x")))
        # A trailing 1 is how some tools write a two-dimensional slice.
        if family in ("v5e", "v6e") and len(shape) == 3 and shape[2] == 1:
            shape = shape[:2]
        return _tpu(family, shape, num_slices, raw)
    if match := re.fullmatch(r"(v5litepod|v5e|v5p|v6e|tpu7x)-(\d{1,6})", text):
        family = "v5e" if match[1] == "v5litepod" else match[1]
        chip, count = CHIPS[family], int(match[2])
        shape = _default_shape(family, count // chip.tensor_cores)
        if shape is None or count % chip.tensor_cores:
            sizes = sorted({math.prod(s) * chip.tensor_cores for s in _shapes(family)})
            closest = sorted(sizes, key=lambda size: abs(math.log(size / max(count, 1))))[:3]
            names = ", ".join(f"{match[1]}-{size}" for size in sorted(closest))
            raise JaxherdError(f"{raw!r} is not a {family} slice; the nearest ones are {names}.")
        return _tpu(family, shape, num_slices, raw)

    family = re.split(r"[:\-]", text)[0]
    families = ("cpu", *_GPU, *_TPU, "v5litepod")
    if family in _TPU:
        raise JaxherdError(
            f"{raw!r}: write the topology as in {known_targets(family)[2]} "
            f"or the accelerator type as in {_TYPE_PREFIX[family]}-128."
        )
    raise JaxherdError(
        f"Unknown target {raw!r}: {nearest(family, families)} Examples: {_EXAMPLES}."
    )


def abstract_devices(target: Target) -> list[Any]:
    """Return the JAX devices of `target`, in the order of their ids; TPUs need not exist here.

    TPU devices come from the compiler in the `libtpu` wheel, GPU devices from a description of an
    H100 and the CUDA plugin; both can be compiled for and not run on.  CPU devices are real.

    Raises:
        JaxherdError: the compiler is missing, or the CPU shows fewer devices than asked.
    """
    if target.kind == "cpu":
        import jax

        devices = jax.devices("cpu")
        if len(devices) < target.devices:
            raise JaxherdError(
                f"{target.name!r} needs {target.devices} CPU devices and JAX shows {len(devices)}: "
                f"set XLA_FLAGS=--xla_force_host_platform_device_count={target.devices} "
                "before Python starts."
            )
        return list(devices[: target.devices])
    return list(_tpu_devices(target) if target.kind == "tpu" else _gpu_devices(target))


def prepare_environment() -> None:
    """Set what libtpu wants to see on a machine without TPUs, wherever the user set nothing.

    libtpu reads these when it loads, so it works at any time before the first TPU topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Without it two processes that compile at the same time fight over a lock file.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@lru_cache(maxsize=16)
def _tpu_devices(target: Target) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise missing_extra("libtpu", "tpu", f"Compiling for {target.name}")
    prepare_environment()
    from jax.experimental import topologies

    one = f"{target.family}:{'x'.join(map(str, target.topology))}"
    options: dict[str, Any] = {"chips_per_host_bounds": target.host_bounds}
    if target.num_slices > 1:
        options["num_slices"] = target.num_slices
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=one, **options)
    except Exception as error:
        raise JaxherdError(
            f"The installed libtpu cannot describe {target.name!r}: {str(error).splitlines()[0]}"
        ) from error
    return tuple(description.devices)


@lru_cache(maxsize=16)
def _gpu_devices(target: Target) -> tuple[Any, ...]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise missing_extra("jax-cuda12-plugin", "cuda", f"Compiling for {target.name}")
    from importlib import resources

    from jax.experimental import topologies

    if target.chip.name != "h100":
        raise JaxherdError(
            f"Compiling without a GPU is described for h100 only, not {target.name}."
        )
    config = resources.files("jaxherd.core").joinpath("gpu_targets", "h100.textproto").read_text()
    per_host = target.devices // target.hosts
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.name,
            topology=f"1x{target.hosts}x{per_host}",
            target_config=config,
        )
    except Exception as error:
        raise JaxherdError(
            f"The installed CUDA plugin cannot describe {target.name!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return tuple(description.devices)
