"""What a checkpoint says about generating with it: stop tokens, sampling, tokenizer."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxherd.core.errors import JaxherdError
from jaxherd.data.gguf_file import GgufStore
from jaxherd.weights import registry
from jaxherd.weights.trained import trained_folder


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """Token ids that begin and end text, and the authors' sampling settings where given."""

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def to_hf(self) -> dict[str, Any]:
        """Return the entries of a generation_config.json."""
        eos: Any = list(self.eos_ids) if len(self.eos_ids) > 1 else next(iter(self.eos_ids), None)
        entries = {
            "bos_token_id": self.bos_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_id,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
        return {name: value for name, value in entries.items() if value is not None}


def generation_defaults(source: str | os.PathLike[str]) -> GenerationDefaults:
    """Return the defaults of a model source; fields that it does not give are empty."""
    from jaxherd.weights.load import gguf_at, resolve_model

    path = resolve_model(source)
    model = gguf_at(path)
    if model is not None:
        return _from_gguf(GgufStore(model).metadata)
    folder = path if path.is_dir() else path.parent
    entries: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            data = registry.read_json(folder / name)
            data = {**data, **data.get("text_config", {})}
            entries |= {key: value for key, value in data.items() if value is not None}
    eos = entries.get("eos_token_id", ())
    return GenerationDefaults(
        tuple(int(i) for i in (eos if isinstance(eos, list) else [eos] if eos != () else [])),
        entries.get("bos_token_id"),
        entries.get("pad_token_id"),
        entries.get("temperature"),
        entries.get("top_k"),
        entries.get("top_p"),
    )


def _from_gguf(metadata: Mapping[str, Any]) -> GenerationDefaults:
    def token(role: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return value if isinstance(value, int) else None

    stops = (token(role) for role in ("eos", "eot", "eom"))
    return GenerationDefaults(
        tuple(dict.fromkeys(i for i in stops if i is not None)), token("bos"), token("padding")
    )


# What other libraries write beside the weights: the tokenizer, its chat template, its defaults.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "*.tiktoken",
    "*.spm",
    "jaxherd_tokenizer.json",
)
_OTHER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def companion_files(source: str | os.PathLike[str]) -> tuple[list[pathlib.Path], bool]:
    """Return the files of a model folder that say how to use it, and whether a tokenizer is there.

    A GGUF file has none: its tokenizer is inside.
    """
    from jaxherd.weights.load import gguf_at, resolve_model

    path = resolve_model(source)
    if gguf_at(path) is not None:
        return [], False
    folder = path if path.is_dir() else path.parent
    tokenizer = [found for name in _TOKENIZER_FILES for found in sorted(folder.glob(name))]
    others = [found for name in _OTHER_FILES for found in folder.glob(name)]
    return [*tokenizer, *others], bool(tokenizer)


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """Return the tokenizer of a model source, with its chat template and stop tokens.

    Args:
      source: as for `load`; a GGUF file carries its tokenizer inside.  `llama-4` and
        `llama-4-base` read the rank file of an installed llama-models package.
    Raises:
      JaxherdError: there is none.
    """
    from jaxherd.data import tokenizers
    from jaxherd.weights.load import gguf_at, resolve_model

    if os.fspath(source) in tokenizers.INSTALLED and not os.path.exists(source):
        return tokenizers.load_tokenizer(source)
    path = resolve_model(source)
    model = gguf_at(path)
    if model is not None:
        return tokenizers.load_tokenizer(model)
    path = trained_folder(path) or path
    if path.is_file() and path.suffix == ".safetensors":
        path = path.parent
    if not pathlib.Path(path).exists():
        raise JaxherdError(f"There is no tokenizer at {str(path)!r}.")
    return tokenizers.load_tokenizer(path)
