"""The tokens that stand for an image in a prompt (llama4.md 4).

    one tile      <|image_start|> <|image|> P <|image_end|>
    R by C tiles  <|image_start|> (P <|tile_x_separator|> P ... P <|tile_y_separator|>) x R
                  <|image|> P <|image_end|>

where P is the placeholder <|patch|> as often as a tile has features, and the P after <|image|>
stands for the whole image.  Only <|patch|> receives features; <|image|> is a mark.
"""

import dataclasses

from jaxherd.core.errors import JaxherdError
from jaxherd.data.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """Ids of the control tokens; the defaults are Llama 4's."""

    image_start: int = 200080
    image_end: int = 200081
    tile_x_separator: int = 200084
    tile_y_separator: int = 200085
    image: int = 200090
    patch: int = 200092

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ImageTokens":
        """Return the ids of a tokenizer.

        Raises:
          JaxherdError: it lacks some of them.
        """
        special = tokenizer.special_tokens()
        names = {field.name: f"<|{field.name}|>" for field in dataclasses.fields(cls)}
        absent = [name for name in names.values() if name not in special]
        if absent:
            raise JaxherdError(
                f"the tokenizer has no {', '.join(absent)}, which stand around images: use the "
                "tokenizer of a model that reads images."
            )
        return cls(**{field: special[name] for field, name in names.items()})


def image_length(rows: int, columns: int, features: int = 144) -> int:
    """Return the tokens of an image: 147, or 147 + 145 R C, with 144 features a tile."""
    tiles = rows * columns
    return features + 3 + (tiles * (features + 1) if tiles > 1 else 0)


def image_tokens(
    rows: int, columns: int, features: int = 144, tokens: ImageTokens = ImageTokens()
) -> list[int]:
    """Return the tokens of an image of `rows` by `columns` tiles, `features` placeholders each."""
    patches, ids = [tokens.patch] * features, [tokens.image_start]
    if rows * columns > 1:
        for _ in range(rows):
            for column in range(columns):
                last = column == columns - 1
                ids += [*patches, tokens.tile_y_separator if last else tokens.tile_x_separator]
    return [*ids, tokens.image, *patches, tokens.image_end]
