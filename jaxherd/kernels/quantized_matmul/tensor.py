"""The leaf type of weights in few bits: one pytree for training, export, experts and serving.

Axis letters: S stacked axes (layers, experts), K inner, N columns, B = K / group blocks along K.

Why not `QArray` of qwix 0.1.8, whose three arrays are the same: it is a Flax dataclass, and kernels
import no Flax; it has no packing of two values a byte, which GGUF, the Llama 4 files and the decode
kernels are about; and its zero points must have the dtype of the values.  `formats.to_qwix` and
`formats.from_qwix` convert.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from jaxherd.core.errors import JaxherdError
from jaxherd.core.sharding import Partitioner

CODES = ("int8", "int4", "float8_e4m3fn")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """w[k, n] = scales[k // group, n] * (values[k, n] - zeros[k // group, n]).

    A pytree with two or three leaves, of which every leading axis is a stack: `jax.jit`, `vmap`,
    `lax.scan`, shardings and Orbax take it as they take any tree.  A split along K must keep whole
    groups (and whole bytes).  The fields have no array types because trees of shardings, specs and
    abstract values have this class too.

    Attributes:
      values: [*S, K, N] in int8, int4 or float8_e4m3fn; packed, [*S, K / 2, N] in int8, whose byte
        i holds row 2 i in its low and row 2 i + 1 in its high nibble (llama4.md section 9).
      scales: [*S, B, N] in float32, bfloat16 or float16; B = 1 is one scale per column.
      zeros: [*S, B, N] zero points as floats, or None for a symmetric code.
      packed: whether `values` holds two int4 values a byte.
      activations: the codes to which rows that meet the matrix are rounded, "int8" or
        "float8_e4m3fn" (see `api.quantized_matmul`), or None.
    """

    values: Any
    scales: Any
    zeros: Any = None
    packed: bool = dataclasses.field(default=False, metadata={"static": True})
    activations: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(*S, K, N)."""
        *stack, rows, columns = self.values.shape
        return (*stack, 2 * rows if self.packed else rows, columns)

    @property
    def ndim(self) -> int:
        """2 and the number of stacked axes."""
        return len(self.values.shape)

    @property
    def code(self) -> str:
        """The element type, one of `CODES`, whether packed or not."""
        return "int4" if self.packed else jnp.dtype(self.values.dtype).name

    @property
    def blocks(self) -> int:
        """B, the scales along K."""
        return self.scales.shape[-2]

    @property
    def group(self) -> int:
        """Rows of K that share a scale; K itself for one scale per column."""
        return self.shape[-2] // self.blocks

    @property
    def nbytes(self) -> int:
        """Bytes that hold it, an unpacked int4 counted as half a byte, as TPUs store it."""
        half = 0.5 if self.code == "int4" else 1.0
        scales = self.scales.size * self.scales.dtype.itemsize
        zeros = 0 if self.zeros is None else self.zeros.size * self.zeros.dtype.itemsize
        return int(math.prod(self.shape) * half) + scales + zeros

    def __getitem__(self, index: Any) -> "QuantizedMatrix":
        """Return what an index along the stacked axes picks; `w[...]` is the whole.

        Raises:
          JaxherdError: an index that would cut into K or N, whose parts do not line up.
        """
        picked = jax.tree.map(lambda leaf: leaf[index], self)
        if any(leaf.shape[-2:] != old.shape[-2:] for leaf, old in zip(
            jax.tree.leaves(picked), jax.tree.leaves(self)
        )):  # fmt: skip
            raise JaxherdError(
                f"QuantizedMatrix{self.shape}: an index picks matrices of a stack, not parts of one."
            )
        return picked

    def check(self) -> None:
        """Raise what is wrong with the shapes and dtypes of the parts.

        Raises:
          JaxherdError: an unknown code, scales that do not divide K or have other stacked axes.
        """
        if self.code not in CODES or (self.packed and self.values.dtype != jnp.int8):
            raise JaxherdError(
                f"QuantizedMatrix: values of {self.values.dtype} are none of {', '.join(CODES)}."
            )
        *stack, rows, columns = self.shape
        for name, part in (("scales", self.scales), ("zeros", self.zeros)):
            if part is None:
                continue
            ok = len(part.shape) == self.ndim and part.shape[-1] == columns
            if not (ok and [*part.shape[:-2]] == stack and part.shape[-2] >= 1):
                raise JaxherdError(
                    f"QuantizedMatrix: {name} of shape {tuple(part.shape)} do not fit the matrix "
                    f"{self.shape}."
                )
            if rows % part.shape[-2] or part.shape[-2] != self.blocks:
                raise JaxherdError(
                    f"QuantizedMatrix: {part.shape[-2]} blocks of {name} do not divide K = {rows}."
                )
        if self.packed and self.blocks > 1 and self.group % 2:
            raise JaxherdError(
                f"QuantizedMatrix: a group of {self.group} rows cuts a byte of two in half."
            )

    def dequantize(self, dtype: Any = jnp.float32) -> Shaped[Array, "*S K N"]:
        """Return the matrix in floating point, computed in float32 and rounded once."""
        values = unpack_int4(self.values) if self.packed else self.values
        values = rearrange(
            values.astype(jnp.float32), "... (b g) n -> ... b g n", b=self.scales.shape[-2]
        )
        if self.zeros is not None:
            values = values - self.zeros.astype(jnp.float32)[..., None, :]
        w = values * self.scales.astype(jnp.float32)[..., None, :]
        return rearrange(w, "... b g n -> ... (b g) n").astype(dtype)

    def specs(self, spec: PartitionSpec) -> "QuantizedMatrix":
        """Return the partition of each part for that of the matrix, (*S, K, N).

        One scale a column is whole on every device, whatever splits K.
        """
        spec = PartitionSpec(*spec, *(None,) * (self.ndim - len(spec)))
        whole = PartitionSpec(*spec[:-2], None, spec[-1])
        scales = spec if self.blocks > 1 else whole
        zeros = None if self.zeros is None else scales
        return dataclasses.replace(self, values=spec, scales=scales, zeros=zeros)

    def check_cut(self, partitioner: Partitioner, spec: PartitionSpec, what: str) -> None:
        """Raise a JaxherdError unless a split along K keeps groups, and bytes of two rows, whole."""
        spec = PartitionSpec(*spec, *(None,) * (self.ndim - len(spec)))
        part = spec[-2]
        shards = partitioner.axis_size(*((part,) if isinstance(part, str) else part or ()))
        if self.blocks > 1 and self.blocks % shards:
            raise JaxherdError(
                f"{what}: {shards} shards of mesh axes {part!r} would cut the {self.blocks} groups of "
                f"{self.group} rows that share a scale: choose a layout whose axes divide "
                f"{self.blocks}, smaller groups, or a scale per column."
            )
        if self.values.shape[-2] % shards:
            raise JaxherdError(
                f"{what}: {self.values.shape[-2]} rows of codes do not divide by the {shards} shards of "
                f"mesh axes {part!r}: choose a layout whose axes divide them."
            )

    def shardings(self, partitioner: Partitioner, names: Any, what: str) -> "QuantizedMatrix":
        """Return the sharding of each part, given the logical axes (*S, K, N) of the matrix.

        Raises:
          JaxherdError: a dimension that its mesh axes do not divide, or a group that a shard cuts.
        """
        spec = partitioner.spec(names)
        partitioner.check_divisible(names, spec, self.shape, what)
        self.check_cut(partitioner, spec, what)
        return jax.tree.map(
            lambda part: NamedSharding(partitioner.mesh, part),
            self.specs(spec),
            is_leaf=lambda part: isinstance(part, PartitionSpec),
        )

    def pack(self) -> "QuantizedMatrix":
        """Return the same int4 matrix with two values a byte.

        Raises:
          JaxherdError: another code, or an odd K.
        """
        if self.packed:
            return self
        if self.code != "int4":
            raise JaxherdError(f"only int4 values can be packed, not {self.code}.")
        return dataclasses.replace(self, values=pack_int4(self.values), packed=True)

    def unpack(self) -> "QuantizedMatrix":
        """Return the same matrix with one value an element."""
        if not self.packed:
            return self
        values = unpack_int4(self.values).astype(jnp.int4)
        return dataclasses.replace(self, values=values, packed=False)


def pack_int4(values: Int[Array, "*S K N"]) -> Int[Array, "*S K/2 N"]:
    """Return int8 bytes of two rows each, the even row in the low nibble.

    Raises:
      JaxherdError: an odd number of rows.
    """
    if values.shape[-2] % 2:
        raise JaxherdError(f"packing two int4 rows a byte needs an even K, not {values.shape[-2]}.")
    v = values.astype(jnp.int8)
    return (v[..., 0::2, :] & 0xF) | (v[..., 1::2, :] << 4)


def unpack_int4(packed: Int[Array, "*S P N"]) -> Int[Array, "*S K N"]:
    """Return the int8 values -8..7 of packed bytes: the inverse of `pack_int4`."""
    low, high = (packed << 4) >> 4, packed >> 4  # arithmetic shifts keep the sign
    return rearrange(jnp.stack([low, high], axis=-2), "... p two n -> ... (p two) n")
