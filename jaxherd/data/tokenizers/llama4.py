"""Llama 4's tokenizer: Meta's rank file and the control tokens that the file does not hold.

200,000 ranks and 2,048 control tokens behind them make 202,048 ids (llama4.md 5).  The rank file,
`tokenizer.model`, is Llama Material: it is never part of jaxherd, but read from a path of the
user's or from an installed `llama-models` package.
"""

import importlib.util
import pathlib

from jaxherd.core.errors import JaxherdError
from jaxherd.data.tokenizers.tiktoken_ranks import TiktokenTokenizer, parse_ranks

RANKS, SPECIALS = 200_000, 2_048

# Sources that stand for the rank file of an installed llama-models package: name -> instruct.
INSTALLED = {"llama-4": True, "llama-4-base": False}

CHAT_FORMAT = "llama-4"

# tiktoken takes no more at once; both cuts decide ids of very long texts, so they are the model's.
_LONGEST_PIECE, _LONGEST_RUN = 400_000, 25_000

# The control tokens in the order of their ids: names, and ranges of numbers of reserved ones.
# Each family counts its reserved tokens by itself (text's 6 and 7 became the python tokens).
_BASIC = ("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix")
_FAMILIES: dict[str, tuple[str | range, ...]] = {
    "text_post_train": (
        "header_start", "header_end", "eom", "eot", "step", range(6), "python_start", "python_end",
        "finetune_right_pad", range(8, 69),
    ),
    "vision": (
        "image_start", "image_end", range(2), "tile_x_separator", "tile_y_separator", range(2, 6),
        "image", range(6, 7), "patch", range(7, 1048),
    ),
    "reasoning": (range(8), "reasoning_thinking_start", "reasoning_thinking_end"),
}  # fmt: skip


def special_tokens(ranks: int = RANKS) -> dict[str, int]:
    """Return the 2,048 control tokens, name -> id, behind so many ranks (llama4.md 5)."""
    names = [f"<|{name}|>" for name in _BASIC]
    for family, items in _FAMILIES.items():
        for item in items:
            if isinstance(item, str):
                names.append(f"<|{item}|>")
            else:
                names += [f"<|{family}_reserved_special_token_{n}|>" for n in item]
    names += [f"<|reserved_special_token_{n}|>" for n in range(SPECIALS - len(names))]
    return {name: ranks + place for place, name in enumerate(names)}


def llama4_tokenizer(ranks: bytes, *, instruct: bool = True) -> TiktokenTokenizer:
    """Return the tokenizer of a rank file.

    Args:
      ranks: the content of `tokenizer.model`; ranks must be 0, 1, 2, ... without a gap.
      instruct: the instruction-tuned models end their turns with <|eot|> or <|eom|> and have a
        chat format; the base models end with <|end_of_text|> alone.  The file is the same.
    Raises:
      JaxherdError: the ranks have gaps, so that the control tokens have no place.
    """
    table = parse_ranks(ranks)
    if sorted(table.values()) != list(range(len(table))):
        raise JaxherdError("The rank file has gaps, so it is no tokenizer.model of Llama 4.")
    return TiktokenTokenizer(
        ranks,
        split_pattern="llama-4",
        special_tokens=special_tokens(len(table)),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|finetune_right_pad|>",
        stop=("<|eom|>", "<|eot|>") if instruct else (),
        chat_format=CHAT_FORMAT if instruct else None,
        longest_piece=_LONGEST_PIECE,
        longest_run=_LONGEST_RUN,
    )


def is_llama4(ranks: bytes) -> bool:
    """Return whether a rank file is Llama 4's: no other family has exactly 200,000 ranks."""
    return len(parse_ranks(ranks)) == RANKS


def installed_ranks() -> pathlib.Path | None:
    """Return the rank file of an installed llama-models package, without importing it."""
    spec = importlib.util.find_spec("llama_models")
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        path = pathlib.Path(folder) / "llama4" / "tokenizer.model"
        if path.is_file():
            return path
    return None


def load_installed(name: str) -> TiktokenTokenizer:
    """Return the tokenizer that a name of `INSTALLED` stands for.

    Raises:
      JaxherdError: the package is not installed.
    """
    path = installed_ranks()
    if path is None:
        raise JaxherdError(
            f"{name!r} reads Meta's tokenizer.model from the package llama-models, which is not "
            "installed: pip install llama-models==0.3.0 (its licence is Meta's), or name the file."
        )
    return llama4_tokenizer(path.read_bytes(), instruct=INSTALLED[name])
