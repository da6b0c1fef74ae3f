"""`save(module, folder)`: whole or not at all."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxherd.core.coded import is_coded
from jaxherd.core.errors import JaxherdError, StorageError, nearest
from jaxherd.core.modules import flatten, split
from jaxherd.weights import registry
from jaxherd.weights.assemble import with_parts
from jaxherd.weights.generation import GenerationDefaults
from jaxherd.weights.hf_config import write_config
from jaxherd.weights.licence import joined, remembered
from jaxherd.weights.mapping import Placement, place
from jaxherd.weights.stores import write_shards

FORMATS = ("hf", "jaxherd")


def save(
    module: Any,
    folder: str | os.PathLike[str],
    *,
    format: str = "jaxherd",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Any = None,
    generation: GenerationDefaults | None = None,
    companions: Sequence[pathlib.Path] = (),
    texts: Mapping[str, str] | None = None,
    derived_from: Sequence[str | os.PathLike[str]] = (),
) -> pathlib.Path:
    """Write a model to a new folder and return its path.

    Args:
      module: what `load` or a config's `build` gave.
      folder: must not exist, or be empty.
      format: "hf" (safetensors and config.json as Hugging Face reads them) or "jaxherd" (any
        registered model, untrained variables included).
      max_shard_bytes: larger models are split into several files with an index.
      tokenizer: is saved beside the model.
      generation: stop tokens and sampling defaults, saved beside the model.
      companions: files that are copied as they are (see `generation.companion_files`).
      texts: further small files, by name.
      derived_from: sources that the model was made from or of whose outputs it learned, where `load`
        did not give this very module.  Of Llama Materials (`jaxherd.weights.licence`) licence and Notice
        are written too.
    Raises:
      JaxherdError: an unknown format, a folder that is not empty or cannot be made, a model that the
        format cannot express, or a name or an absent licence that Llama Materials do not allow;
        nothing is written then.
      StorageError: the disk could not be written; nothing is left of it.
    """
    if format not in FORMATS:
        raise JaxherdError(f"no checkpoint format {format!r}; " + nearest(format, FORMATS))
    if max_shard_bytes < 1:
        raise JaxherdError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}.")
    target = check_target(folder)
    companions, texts = [*companions], dict(texts or {})
    materials = joined([remembered(module), *map(_materials_of, derived_from)])
    if materials is not None:
        materials.check_export(target.resolve().name)
        licences, notices = materials.files()
        companions, texts = [*companions, *licences], texts | notices
    _, params, buffers = split(module)
    if format == "hf":
        if any(is_coded(value) for value in flatten(params).values()):
            raise JaxherdError(
                "a model with weights in few bits is saved with format='jaxherd' alone: choose that, "
                "or jaxherd.models.quantise.dequantised(model) for plain weights."
            )
        architecture, entries = write_config(module.config)
        ids = _token_ids(generation)
        entries |= ids
        if "text_config" in entries:
            entries["text_config"] |= ids
        tensors = _hf_tensors(module.config, architecture, flatten(params) | flatten(buffers))
        # What transformers calls the type of most of the weights.
        entries["torch_dtype"] = flatten(params)["embedding/table"].dtype.name
    else:
        entries = registry.own_entries(module.config)
        tensors = {
            f"{kind}/{path}": (tuple(a.shape), np.dtype(a.dtype), lambda a=a: np.asarray(a))
            for kind, tree in (("params", params), ("buffers", buffers))
            for path, a in with_parts(flatten(tree)).items()
        }
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        scratch.chmod(0o755)
        write_shards(scratch, tensors, max_shard_bytes=max_shard_bytes)
        _write_json(scratch / "config.json", entries)
        if generation is not None:
            _write_json(scratch / "generation_config.json", generation.to_hf())
        if tokenizer is not None:
            tokenizer.save(scratch)
        for path in companions:
            shutil.copyfile(path, scratch / path.name)
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8")
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except OSError as error:
        raise StorageError(
            f"{str(target)!r} could not be written ({error.strerror or error}): make room or choose "
            "another folder."
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _materials_of(source: str | os.PathLike[str]) -> Any:
    from jaxherd.weights.load import materials_of

    return materials_of(source)


def check_target(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Return the absolute path of a folder that `save` can make; leaves nothing behind.

    Raises:
      JaxherdError: it exists and is not empty, or cannot be made where it is wanted.
    """
    target = pathlib.Path(folder).expanduser().absolute()
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise JaxherdError(f"{str(target)!r} exists and is not empty: name a new folder.")
        nearest_folder = next(path for path in target.parents if path.exists())
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=nearest_folder))
    except OSError as error:
        raise JaxherdError(
            f"{str(target)!r} cannot be written ({error.strerror or error}): choose another folder."
        ) from error
    return target


def _write_json(path: pathlib.Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _token_ids(generation: GenerationDefaults | None) -> dict[str, Any]:
    """Return the ids of a config.json, absent ones too: readers would assume 1 and 2."""
    known = generation.to_hf() if generation is not None else {}
    return {name: known.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _hf_tensors(config: Any, architecture: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return name -> (shape, dtype, function that makes the tensor)."""
    # Stacks come from the device once each, when their first row is wanted.
    host: dict[str, np.ndarray] = {}

    def piece(p: Placement) -> np.ndarray:
        if p.path not in host:
            host[p.path] = np.asarray(jax.device_get(values[p.path]))
        return p.rule.to_theirs(host[p.path][p.index], p.head_dim)

    groups: dict[str, list[Placement]] = {}
    for p in place(config, {path: tuple(v.shape) for path, v in values.items()}, architecture):
        groups.setdefault(p.name, []).append(p)

    def make(group: list[Placement]) -> np.ndarray:
        if group[0].rule.part is None:
            return piece(group[0])
        ordered = sorted(group, key=lambda p: p.rule.part or (0, 1))
        return np.concatenate([piece(p) for p in ordered], axis=-1)

    return {
        name: (g[0].shape, np.dtype(values[g[0].path].dtype), lambda g=g: make(g))
        for name, g in groups.items()
    }
