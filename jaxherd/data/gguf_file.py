"""GGUF files: metadata and tensors, with every length checked against the file before use.

Layout (little-endian): magic, version, number of tensors, number of metadata entries; the
entries; name, dimensions, type and offset of each tensor; padding; the values.  Block formats are
turned into float32 by `gguf.quants`.  The package's own reader is not used: it believes the
lengths in the header, so that a damaged file can keep it busy without end.
"""

import math
import pathlib
import struct
from typing import Any

import numpy as np

from jaxherd.core.errors import JaxherdError, missing_extra

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class _Cursor:
    """Reads forward through a buffer and never past its end."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise ValueError("a length reaches past the end")
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        # Old vocabularies hold bytes that are no UTF-8; they stay distinguishable.
        return bytes(self.take(self.scalar("<Q"))).decode("utf-8", errors="surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 2:
            raise ValueError(f"metadata type {kind} is unknown")
        inner, count = self.scalar("<I"), self.scalar("<Q")
        if inner in _SCALARS:
            # struct and numpy share these one-letter codes.
            dtype = np.dtype(_SCALARS[inner][1:]).newbyteorder("<")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        # The smallest string or array takes eight bytes, which bounds the loop.
        if count > (len(self.data) - self.at) // 8:
            raise ValueError("an array is longer than the file")
        return [self.value(inner, depth + 1) for _ in range(count)]


class GgufStore:
    """Metadata and tensors of one file.

    Attributes:
      metadata: plain Python values by key.
      shapes: in the order [out, in], the reverse of the file's.
      dtypes: what `read` gives: float32 for all.
    """

    def __init__(self, path: pathlib.Path):
        try:
            import gguf
        except ImportError as error:
            raise missing_extra("gguf", "text", f"Reading {str(path)!r}") from error
        self._gguf = gguf
        self.where = str(path)
        self.metadata: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._places: dict[str, tuple[Any, int, int]] = {}
        try:
            self._data = np.memmap(path, mode="r")
            self._parse(_Cursor(self._data.data))
        except JaxherdError:
            raise
        except (ValueError, OSError, struct.error, OverflowError, MemoryError) as error:
            raise JaxherdError(f"{str(path)!r} is truncated or no GGUF file ({error}).") from error

    def _parse(self, cursor: _Cursor) -> None:
        if bytes(cursor.take(4)) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, entries = cursor.scalar("<I"), cursor.scalar("<Q"), cursor.scalar("<Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not read, only 2 and 3 in little-endian order")
        # An entry has at least 13 bytes and a tensor 24.
        if entries * 13 + tensors * 24 > len(cursor.data):
            raise ValueError("it claims more entries than it can hold")
        for _ in range(entries):
            key = cursor.string()
            if key in self.metadata:
                raise ValueError(f"the key {key!r} comes twice")
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        infos = [self._tensor_info(cursor) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"the alignment {alignment!r} is no power of two")
        start = cursor.at + (-cursor.at % alignment)
        for name, shape, kind, offset in infos:
            block, size = self._gguf.GGML_QUANT_SIZES[kind]
            if name in self.shapes:
                raise ValueError(f"the tensor {name!r} comes twice")
            if offset % alignment or shape[-1] % block:
                raise ValueError(f"the tensor {name!r} is not aligned")
            length = math.prod(shape) // block * size
            if start + offset + length > len(cursor.data):
                raise ValueError(f"the tensor {name!r} reaches past the end")
            self.shapes[name] = shape
            self.dtypes[name] = np.dtype(np.float32)
            self._places[name] = (kind, start + offset, length)

    def _tensor_info(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], Any, int]:
        name, rank = cursor.string(), cursor.scalar("<I")
        if not 1 <= rank <= 4:
            raise ValueError(f"the tensor {name!r} has {rank} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(rank))[::-1]
        if math.prod(shape) == 0:
            raise ValueError(f"the tensor {name!r} is empty")
        kind = self._gguf.GGMLQuantizationType(cursor.scalar("<I"))
        return name, shape, kind, cursor.scalar("<Q")

    def kind(self, name: str) -> str:
        """Return the format of one tensor: "F32", "Q4_0", ..."""
        return self._places[name][0].name

    def blocks(self, name: str) -> tuple[str, np.ndarray]:
        """Return (format, bytes) of one tensor as stored, rows kept apart: [..., out, row bytes].

        `kernels.quantized_matmul.formats.from_gguf` makes a matrix of "Q4_0", "Q4_1" and "Q8_0".
        """
        kind, start, length = self._places[name]
        rows = np.asarray(self._data[start : start + length])
        return kind.name, rows.reshape(*self.shapes[name][:-1], -1)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in float32.

        Raises:
          JaxherdError: a block format that the `gguf` package cannot turn into floats.
        """
        kind, start, length = self._places[name]
        shape = self.shapes[name]
        raw = np.asarray(self._data[start : start + length])
        types = self._gguf.GGMLQuantizationType
        plain = {types.F64: np.float64, types.F32: np.float32, types.F16: np.float16}
        if kind in plain:
            return raw.view(plain[kind]).reshape(shape).astype(np.float32)
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        rows = raw.reshape(*shape[:-1], shape[-1] // block * size)
        try:
            return self._gguf.quants.dequantize(rows, kind).reshape(shape)
        except NotImplementedError as error:
            raise JaxherdError(
                f"{self.where!r}: {name!r} has the format {kind.name}, which the gguf package "
                "does not dequantise."
            ) from error
