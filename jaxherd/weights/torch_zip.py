"""Tensors out of torch's zip files without running any of their pickle.

A `.bin` or `.pt` of torch is a zip of stored entries: one pickle that describes the object, and the
raw values of each tensor.  A pickle is a program.  Here it is read opcode by opcode by a machine
that knows plain dictionaries, lists, tuples, text, numbers and torch's recipe for a plain tensor;
whatever else it names is refused, and nothing is imported or called.
"""

import collections
import dataclasses
import math
import os
import pathlib
import pickletools
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from jaxherd.core.errors import JaxherdError

_STORAGES = {
    f"torch.{name}Storage": np.dtype(kind)
    for name, kind in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_ORDERED = "collections.OrderedDict"
_KNOWN = {_TENSOR, _PARAMETER, _ORDERED, *_STORAGES}

# A description of a large model has some thousand tensors of about 200 bytes each.
MAX_PICKLE_BYTES = 64 * 2**20
MAX_ENTRIES = 200_000
_MAX_DIMENSIONS = 8


@dataclasses.dataclass(frozen=True)
class _Name:
    """Something that the pickle names; it is never looked up."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    entry: str
    count: int


class _Mark:
    """The pickle machine's mark on its stack."""


def read_torch_zip(path: str | os.PathLike[str]) -> Any:
    """Return the object in a torch zip file, with tensors as NumPy arrays.

    Raises:
      JaxherdError: no torch zip, compressed or overlapping entries, entries outside of the
        archive's folder, a damaged description, or anything in it that is no plain value or
        tensor; the message names what was found.
    """
    where = pathlib.Path(path)
    try:
        size = where.stat().st_size
        with zipfile.ZipFile(where) as archive:
            entries, prefix = _checked(archive, str(where), size)
            text = archive.read(entries[prefix + "data.pkl"])
            return _Machine(archive, entries, prefix, str(where)).run(text)
    except FileNotFoundError:
        raise JaxherdError(f"There is no file {str(where)!r}.") from None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise JaxherdError(
            f"{str(where)!r} is no torch zip file or is damaged ({error}); files from before torch "
            "1.6 must be saved again by torch."
        ) from error


def _checked(archive: zipfile.ZipFile, where: str, size: int):
    infos = archive.infolist()
    if len(infos) > MAX_ENTRIES:
        raise JaxherdError(f"{where!r} has {len(infos)} entries; at most {MAX_ENTRIES} are read.")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or ":" in name or ".." in parts or name in entries:
            raise JaxherdError(
                f"{where!r} has an entry {name!r} that leaves its folder or repeats."
            )
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise JaxherdError(
                f"{where!r}: the entry {name!r} is compressed, which torch never does."
            )
        entries[name] = info
    # Stored entries that do not share bytes are no larger together than the file.
    if sum(info.file_size for info in infos) > size:
        raise JaxherdError(f"{where!r}: its entries overlap.")
    descriptions = [n for n in entries if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(descriptions) != 1:
        raise JaxherdError(f"{where!r} is no torch zip file: it has no single <name>/data.pkl.")
    prefix = descriptions[0].removesuffix("data.pkl")
    outside = next((name for name in entries if not name.startswith(prefix)), None)
    if outside is not None:
        raise JaxherdError(f"{where!r} has an entry {outside!r} outside of {prefix!r}.")
    if entries[prefix + "data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise JaxherdError(f"{where!r}: its description is larger than {MAX_PICKLE_BYTES} bytes.")
    order = entries.get(prefix + "byteorder")
    if order is not None and (order.file_size > 16 or archive.read(order).strip() != b"little"):
        raise JaxherdError(f"{where!r} is not little-endian.")
    return entries, prefix


class _Machine:
    """The few opcodes that torch writes for plain objects."""

    def __init__(self, archive, entries, prefix: str, where: str):
        self.archive, self.entries, self.prefix, self.where = archive, entries, prefix, where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def fail(self, found: str) -> JaxherdError:
        return JaxherdError(
            f"{self.where!r} holds {found}; only plain tensors, dictionaries, lists, text and "
            "numbers are read: save it again as those, or as safetensors."
        )

    def run(self, text: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(text):
                if opcode.name == "STOP":
                    result = self.stack.pop()
                    if self.stack or isinstance(result, _Name | _Storage | _Mark):
                        raise ValueError("the description ends in the middle")
                    return result
                self.step(opcode.name, argument)
        except JaxherdError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise JaxherdError(f"{self.where!r} has a damaged description ({error}).") from error
        raise JaxherdError(f"{self.where!r} has a damaged description (no end).")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                stack.append(_Mark())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case (
                "BINUNICODE"
                | "SHORT_BINUNICODE"
                | "BININT"
                | "BININT1"
                | "BININT2"
                | "LONG1"
                | "BINFLOAT"
            ):
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                taken = [self.value() for _ in range(count)]
                stack.append(tuple(reversed(taken)))
            case "TUPLE":
                stack.append(tuple(self.to_mark()))
            case "APPEND" | "APPENDS":
                items = [self.value()] if name == "APPEND" else self.to_mark()
                self.target(list).extend(items)
            case "SETITEM" | "SETITEMS":
                if name == "SETITEM":
                    items = [self.value(), self.value()][::-1]
                else:
                    items = self.to_mark()
                if len(items) % 2:
                    raise ValueError("a key without its value")
                for key, value in zip(items[::2], items[1::2]):
                    if not isinstance(key, str | int):
                        raise self.fail(f"a dictionary key of type {type(key).__name__}")
                    self.target(dict)[key] = value
            case "GLOBAL":
                self.named(".".join(argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                self.named(f"{module}.{attribute}")
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments))
            case "BUILD":
                # A state dict carries its modules' versions; they are no values of it.
                stack.pop()
                self.target(collections.OrderedDict)
            case _:
                raise self.fail(f"the pickle instruction {name}")

    def value(self) -> Any:
        found = self.stack.pop()
        if isinstance(found, _Mark):
            raise ValueError("a mark in place of a value")
        return found

    def to_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(self.stack[-1], _Mark):
            items.append(self.stack.pop())
        self.stack.pop()
        return items[::-1]

    def target(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"a change to a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def named(self, text: str) -> None:
        if text not in _KNOWN:
            raise self.fail(f"the object {text!r}")
        self.stack.append(_Name(text))

    def storage(self, record: Any) -> _Storage:
        if not isinstance(record, tuple) or len(record) != 5 or record[0] != "storage":
            raise self.fail("a reference that is no tensor storage")
        _, kind, key, _, count = record
        if not isinstance(kind, _Name) or kind.text not in _STORAGES:
            raise self.fail(f"a storage of type {getattr(kind, 'text', kind)!r}")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError("a storage without name or size")
        entry, dtype = f"{self.prefix}data/{key}", _STORAGES[kind.text]
        if entry not in self.entries:
            raise ValueError(f"the values {entry!r} are absent")
        if self.entries[entry].file_size != count * dtype.itemsize:
            raise ValueError(f"{entry!r} has not the size of {count} {dtype.name}")
        return _Storage(dtype, entry, count)

    def call(self, function: Any, arguments: Any) -> Any:
        name = function.text if isinstance(function, _Name) else type(function).__name__
        if not isinstance(arguments, tuple):
            raise ValueError("a call without arguments")
        if name == _ORDERED and not arguments:
            return collections.OrderedDict()
        if name == _PARAMETER and arguments and isinstance(arguments[0], np.ndarray):
            return arguments[0]
        if name == _TENSOR and len(arguments) >= 4:
            return self.tensor(*arguments[:4])
        raise self.fail(f"a call of {name!r}")

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        if not isinstance(storage, _Storage):
            raise self.fail("a tensor without storage")
        sizes = (offset, *shape, *strides)
        if any(type(s) is not int or s < 0 for s in sizes) or len(shape) != len(strides):
            raise ValueError("a tensor of impossible shape")
        if len(shape) > _MAX_DIMENSIONS:
            raise self.fail(f"a tensor of {len(shape)} dimensions")
        count = math.prod(shape)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
        # A tensor that repeats its values by zero strides could be of any size.
        if count and (last >= storage.count or count > storage.count):
            raise ValueError("a tensor larger than its storage")
        raw = self.archive.read(self.entries[storage.entry])
        values = np.frombuffer(raw, storage.dtype)
        if not count:
            return np.zeros(shape, storage.dtype)
        steps = tuple(s * storage.dtype.itemsize for s in strides)
        view = np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)
        return np.array(view)
