"""Named sets of XLA options per TPU generation, each with why.

They go to `.compile(compiler_options=...)` and to the running job alike, so that a plan describes
what runs.  `tests/benchmarks/overlap_flags.py` compiles an FSDP scan with each set and prints what
it hides; `tpu/flags.md` holds its last table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.targets import Target


@dataclass(frozen=True)
class FlagSet:
    """Compiler options that belong together."""

    name: str
    why: str
    families: tuple[str, ...]
    """TPU generations that accept it."""
    options: Mapping[str, Any]


def _set(name: str, why: str, families: tuple[str, ...], **options: Any) -> FlagSet:
    return FlagSet(name, why, families, MappingProxyType(options))


_ALL = ("v5e", "v5p", "v6e", "tpu7x")

FLAG_SETS: Mapping[str, FlagSet] = MappingProxyType(
    {
        flags.name: flags
        for flags in (
            _set("none", "The compiler's defaults.", _ALL),
            _set(
                "async_fusion",
                "Splits an all-gather into steps that run inside the matmuls scheduled meanwhile, "
                "on the TensorCore.",
                _ALL,
                xla_tpu_enable_async_collective_fusion=True,
                xla_tpu_enable_async_collective_fusion_fuse_all_gather=True,
                xla_tpu_enable_async_collective_fusion_multiple_steps=True,
                xla_tpu_overlap_compute_collective_tc=True,
                xla_enable_async_all_gather=True,
            ),
            _set(
                "sparsecore",
                "Hands gathers, scatters, reductions and the rows of routed experts to the SparseCores, "
                "which drive the links while the TensorCore computes.  Numbers are rounded where the "
                "program rounds them: kept wider between operations, as the compiler otherwise may, "
                "they cost passes over wider arrays.",
                ("v5p", "v6e", "tpu7x"),
                xla_tpu_enable_sparse_core_collective_offload_all_gather=True,
                xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=True,
                xla_tpu_enable_sparse_core_collective_offload_all_reduce=True,
                xla_tpu_enable_sparse_core_collective_offload_ragged_all_to_all=True,
                xla_tpu_enable_all_gather_offload_tracing=True,
                xla_tpu_use_tc_device_shape_on_sc=True,
                xla_sc_disable_megacore_partitioning=True,
                xla_tpu_enable_async_collective_fusion_fuse_all_gather=False,
                xla_allow_excess_precision=False,
            ),
        )
    }
)

# XLA picks the tiles of its Triton matmuls by timing them.  Without a GPU it takes one default, which
# some shapes do not divide by ("Couldn't find output tile sizes"); cuBLAS has no such choice.
UNTIMED_GPU: Mapping[str, Any] = MappingProxyType({"xla_gpu_enable_triton_gemm": False})

DEFAULT_SETS: Mapping[str, str] = MappingProxyType(
    {"v5e": "none", "v5p": "sparsecore", "v6e": "sparsecore", "tpu7x": "none"}
)


def options_for(
    target: Target, name: str | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the compiler options of a named set (default: the generation's), with overrides.

    CPUs and GPUs have none of these options; `UNTIMED_GPU` is for planning alone.

    Raises:
        JaxherdError: the set is unknown or the generation does not have it.
    """
    if target.kind != "tpu":
        if name not in (None, "none"):
            raise JaxherdError(f"The option set {name!r} is for TPUs, and {target.name} is none.")
        return dict(overrides or {})
    name = DEFAULT_SETS[target.family] if name is None else name
    if name not in FLAG_SETS:
        raise JaxherdError(f"Unknown option set {name!r}: {nearest(name, FLAG_SETS)}")
    flags = FLAG_SETS[name]
    if target.family not in flags.families:
        fitting = [n for n, f in FLAG_SETS.items() if target.family in f.families]
        raise JaxherdError(
            f"The option set {name!r} does not exist on {target.family}; "
            f"choose one of {', '.join(fitting)}."
        )
    return dict(flags.options) | dict(overrides or {})
