"""Named tensors on disk: safetensors read one at a time, and written in shards.

Reading and writing go tensor by tensor, so that the host never holds a second copy of the model.
Pickled formats are refused: reading one runs whatever code it contains.
"""

import json
import math
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from jaxherd.core.errors import JaxherdError

PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
# What audiocraft calls its two files of a generator and its codec (melodyflow.md 3.5).
AUDIOCRAFT = ("state_dict.bin", "compression_state_dict.bin")

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@runtime_checkable
class TensorStore(Protocol):
    """Named tensors whose shapes are known before they are read."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    where: str

    def read(self, name: str) -> np.ndarray:
        """Return one tensor."""
        ...


class SafetensorsStore:
    """One or more safetensors files."""

    def __init__(self, files: Iterable[pathlib.Path], where: str):
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._file_of: dict[str, pathlib.Path] = {}
        for file in files:
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118  (the handle is no mapping)
                if name in self.shapes:
                    raise JaxherdError(f"{where}: the tensor {name!r} is in two files.")
                piece = handle.get_slice(name)
                if piece.get_dtype() not in DTYPES:
                    raise JaxherdError(
                        f"{str(file)!r}: {name!r} has the type {piece.get_dtype()}, which is not "
                        f"read; known are {', '.join(DTYPES)}."
                    )
                self.shapes[name] = tuple(piece.get_shape())
                self.dtypes[name] = DTYPES[piece.get_dtype()]
                self._file_of[name] = file
        self._open_file: pathlib.Path | None = None
        self._handle: Any = None

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as a new array."""
        file = self._file_of[name]
        if self.dtypes[name] == DTYPES["F8_E4M3"]:
            # The safetensors package gives no NumPy array of eight-bit floats.
            return _read_bytes(file, name).view(self.dtypes[name]).reshape(self.shapes[name])
        if file != self._open_file:
            self._open_file, self._handle = file, _open(file)
        return self._handle.get_tensor(name)


def _read_bytes(file: pathlib.Path, name: str) -> np.ndarray:
    """Return the bytes of a tensor of a file whose header was found sound."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        begin, end = json.loads(opened.read(length))[name]["data_offsets"]
        opened.seek(8 + length + begin)
        return np.fromfile(opened, np.uint8, end - begin)


def _open(file: pathlib.Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(str(file), framework="numpy")
    except FileNotFoundError:
        raise JaxherdError(f"The weight file {str(file)!r} is missing.") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise JaxherdError(
            f"{str(file)!r} is truncated or no safetensors file ({error})."
        ) from error


def safetensors_and_metadata(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return (all tensors, the file's own entries of text) of a safetensors file.

    Raises:
      JaxherdError: truncated or no safetensors file.
    """
    store = SafetensorsStore([path], str(path))
    return {name: store.read(name) for name in store.shapes}, dict(_open(path).metadata() or {})


def open_folder(folder: pathlib.Path) -> SafetensorsStore:
    """Open the safetensors of a folder: those its index names, or the only file.

    Raises:
      JaxherdError: no such file, only pickled ones, or a damaged index.
    """
    where = str(folder)
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JaxherdError(f"{str(index)!r} is damaged: fetch it again.") from error
        for name in names:
            if not isinstance(name, str) or pathlib.PurePath(name).name != name:
                raise JaxherdError(f"{str(index)!r} names {name!r}, which is no file beside it.")
        return SafetensorsStore([folder / name for name in sorted(names)], where)
    files = sorted(folder.glob("*.safetensors"))
    preferred = [file for file in files if file.name == "model.safetensors"]
    files = preferred or files
    if len(files) == 1:
        return SafetensorsStore(files, where)
    if files:
        raise JaxherdError(f"{where!r} has several safetensors files and no {INDEX}.")
    refuse_pickle(folder)
    raise JaxherdError(f"There are no safetensors in {where!r}.")


def refuse_pickle(path: pathlib.Path) -> None:
    """Raise JaxherdError if `path` is a pickled checkpoint or a folder that holds one."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = next((file for file in files if file.suffix.lower() in PICKLED), None)
    if found is not None and found.name in AUDIOCRAFT:
        raise JaxherdError(
            f"{str(found)!r} is one of the two files of a music model of audiocraft, which is no "
            "single module: name its folder to `jaxherd music`, to "
            "jaxherd.methods.music_files.load_music, or to `jaxherd convert --to jaxherd`; no code "
            "in it is run."
        )
    if found is not None:
        raise JaxherdError(
            f"{str(found)!r} is a pickle, which can run code when it is read: convert it to "
            "safetensors first (save_pretrained of transformers does)."
        )


def write_shards(
    folder: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]],
    *,
    max_shard_bytes: int,
) -> None:
    """Write tensors as `model.safetensors`, or as numbered shards with an index.

    Args:
      folder: exists.
      tensors: name -> (shape, dtype, function that makes the value), called one at a time.
      max_shard_bytes: a shard holds at least one tensor and otherwise at most this.
    """
    sizes = {name: math.prod(s) * np.dtype(d).itemsize for name, (s, d, _) in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], tensors)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, names, tensors)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: pathlib.Path, names: list[str], tensors: Mapping) -> None:
    """Write one file: eight bytes of length, a JSON header padded to 8, the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        shape, dtype, _ = tensors[name]
        end = at + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            shape, dtype, make = tensors[name]
            value = np.asarray(make(), order="C")  # keeps scalars without dimensions
            if value.shape != tuple(shape) or value.dtype != dtype:
                raise AssertionError(f"{name}: {value.shape} {value.dtype}, not {shape} {dtype}")
            file.write(value.reshape(-1).view(np.uint8).data)
