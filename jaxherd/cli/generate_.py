"""`jaxherd generate`: continue a prompt with a model, streaming."""

import sys
from pathlib import Path
from typing import Literal

import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError


def main(
    source: tyro.conf.Positional[str],
    /,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float = 0.0,
    seed: int = 0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    chat: bool | None = None,
    system: str | None = None,
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    max_tiles: int = 16,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantise: str | None = None,
    tokenizer: Path | None = None,
    guard: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    on: str = "cpu",
) -> int:
    """Continue a prompt, or answer it when the model is a chat model; text streams as it comes.

    Example: jaxherd generate smollm2-135m-instruct --prompt "Why is the sky blue?"

    A model that reads images: jaxherd generate ./llama4-scout --prompt "What is this?" --image a.png

    Args:
        source: an alias (smollm2-135m-instruct), a Hugging Face folder, a GGUF file, or any source.
        prompt: the text; - reads it from standard input.
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token; the model's own default if not given, else 0.
        top_p: keep the likeliest tokens up to this share; the model's own default, else 1.
        top_k: keep the k likeliest tokens, 0 keeps all; the model's own default, else 0.
        min_p: keep tokens at least this share as likely as the likeliest.
        seed: of the sampling.
        stop: end before any of these strings.
        chat: use the model's chat template; by default when it has one.
        system: a system message for the chat template.
        image: a file that the model sees before the text of the prompt; may be given several times.
        max_tiles: an image is cut into at most so many tiles.
        dtype: of the weights; the source's own if not given.
        quantise: keep weights in few bits: int8, int8_group32, int4, int4_group32; of Llama 4
            int4_mixed, int4_mixed_offline, fp8_mixed; as_stored keeps the file's own codes.
        tokenizer: file or folder, if the source has none.
        guard: "builtin", a .toml or .json file of rules, or the folder of a trained guard; may be
            given several times.  What it vetoes is not shown, and the exit status is 3.
        on: cpu, gpu or tpu.
    """
    from jaxherd.inference.guards import load_guards

    guards = load_guards(guard)
    common.local_devices(on)
    import jaxherd
    from jaxherd.data.chat import can_chat, encode_chat
    from jaxherd.data.tokenizers import load_tokenizer
    from jaxherd.inference.generate import Generator, Request
    from jaxherd.inference.sampling import Sampling
    from jaxherd.weights.load import generation_defaults

    text = sys.stdin.read() if prompt == "-" else prompt
    words = load_tokenizer(tokenizer) if tokenizer else jaxherd.load_tokenizer(source)
    defaults = generation_defaults(source)
    sampling = Sampling(
        temperature=_first(temperature, defaults.temperature, 0.0),
        top_p=_first(top_p, defaults.top_p, 1.0),
        top_k=_first(top_k, defaults.top_k, 0),
        min_p=min_p,
    )
    if chat and not can_chat(words):
        raise JaxherdError(f"{source} has no chat template: leave --chat away.")
    pictures, tiles = _images(source, words, image, max_tiles) if image else ([], None)
    if chat or (chat is None and can_chat(words)):
        messages = [{"role": "system", "content": system}] if system else []
        user = {"role": "user", "content": text, "images": pictures}
        tokens = encode_chat(words, [*messages, user])
    else:
        begins = getattr(words, "adds_bos", False)
        tokens = words.encode(text, add_bos=begins)
        tokens[int(begins) : int(begins)] = [i for ids in pictures for i in ids]
        print(text, end="", flush=True)
    # Without images the tower need not be read.
    module = jaxherd.load(source, dtype=dtype, text_only=not image, quantise=quantise)
    stop_ids = defaults.eos_ids or words.stop_ids
    generator = Generator(module, words, stop_ids=stop_ids, guard=guards)
    request = Request(tuple(tokens), max_new_tokens, sampling, seed, tuple(stop), tiles)
    try:
        for piece in generator.stream(request):
            print(piece, end="", flush=True)
    finally:
        print()
    return 0


def _images(source: str, words, files: tuple[Path, ...], max_tiles: int):
    """Return (token ids of each image, tiles); no weights are read.

    Raises:
      JaxherdError: a model that reads no images, or whose tokenizer knows none; a bad file.
    """
    from jaxherd.data.images import ImageTokens, Tiling, prepare_images
    from jaxherd.models.multimodal_decoder import MultimodalDecoderConfig
    from jaxherd.weights.load import model_config

    config = model_config(source)
    if not isinstance(config, MultimodalDecoderConfig):
        raise JaxherdError(f"{source} is a model that reads no images: leave --image away.")
    tokens = ImageTokens.of(words)
    if tokens.patch != config.patch_token:
        raise JaxherdError(
            f"the tokenizer of {source} has <|patch|> at {tokens.patch} and its model at "
            f"{config.patch_token}: use the tokenizer that belongs to it."
        )
    tiling = Tiling(config.vision.image_size, max_tiles)
    return prepare_images(files, tokens, features=config.vision.features, tiling=tiling)


def _first(*values):
    return next(value for value in values if value is not None)
