"""Text in one spelling, for programs that look for words somebody may want to hide from them.

Folding maps character by character, so that the folding of a beginning is a beginning of the folding:

- compatibility forms (full-width, mathematical, circled, squared letters), accents and case go;
- letters of other scripts that look like Latin ones become those (Cyrillic о, Greek ο);
- what is not seen goes: zero-width and bidirectional marks, fillers, soft hyphens; Unicode's
  invisible "tag" letters become the ASCII ones that they repeat;
- a run of white space is one space.

A Cyrillic word is folded to the same letters wherever it stands, so words of any script are found by
folding them as well.  Encodings (base64, other languages, ciphers) are not undone.
"""

import dataclasses
import functools
import unicodedata

# Latin letters and signs, and those of other alphabets that many fonts draw alike.
_ALIKE = {
    "a": "аαᴀɑ", "b": "вβьʙƅɓ", "c": "сᴄϲⅽ", "d": "ԁđᴅɗⅾ", "e": "еεᴇɛ", "f": "ғƒꜰ", "g": "ցɡɢԍգ",
    "h": "һհħʜн", "i": "іıιɪɩ", "j": "јϳᴊ", "k": "кκᴋƙ", "l": "ӏłʟℓⅼ", "m": "мᴍⅿ", "n": "ηпոɴ",
    "o": "оοօøᴏɔ", "p": "рρᴘ", "q": "ԛզք", "r": "гʀ", "s": "ѕꜱ", "t": "тτŧᴛ", "u": "υսᴜ", "v": "νѵᴠʋ",
    "w": "ԝωᴡ", "x": "хχ", "y": "уγʏƴ", "z": "ᴢƶ",
    "'": "’‘ʼ′", "-": "‐‑‒–—―−",
}  # fmt: skip
_LATIN = {theirs: ours for ours, alike in _ALIKE.items() for theirs in alike} | {"μ": "u"}

# Drawn as nothing, though Unicode calls them letters or symbols.
_BLANK = set("\u115f\u1160\u3164\uffa0\u2800")
_DROPPED = ("Mn", "Me", "Cf", "Cs", "Co", "Cn")
_TAGS = range(0xE0020, 0xE007F)
# First code points of the 26 letters of alphabets that have no compatibility form.
_ALPHABETS = (0x1F150, 0x1F170, 0x1F1E6)


@dataclasses.dataclass(frozen=True)
class FoldedText:
    """A folded text; `places[i]` is where its character i stands in the text it came from."""

    text: str
    places: tuple[int, ...]


def fold(text: str) -> str:
    """Return the folded text."""
    return fold_with_places(text).text


def fold_with_places(text: str) -> FoldedText:
    """Return the folded text with the place of every character."""
    found: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        for one in _folded(character):
            if one == " " and found and found[-1] == " ":
                continue
            found.append(one)
            places.append(place)
    return FoldedText("".join(found), tuple(places))


@functools.lru_cache(maxsize=16384)
def _folded(character: str) -> str:
    code = ord(character)
    if character.isspace():
        return " "
    if code < 128:
        return character.lower() if character.isprintable() else ""
    if code in _TAGS:
        return _folded(chr(code - 0xE0000))
    for first in _ALPHABETS:
        if first <= code < first + 26:
            return chr(ord("a") + code - first)
    found = []
    for part in unicodedata.normalize("NFKD", character):
        if unicodedata.category(part) in _DROPPED or part in _BLANK:
            continue
        for letter in unicodedata.normalize("NFKD", part.casefold()):
            if unicodedata.category(letter) not in _DROPPED:
                found.append(" " if letter.isspace() else _LATIN.get(letter, letter))
    return "".join(found)


# Digits and signs that stand for letters; i and l are one, since 1 stands for both.
_FIGURES = str.maketrans({
    "0": "o", "1": "i", "2": "z", "3": "e", "4": "a", "5": "s", "6": "b", "7": "t", "8": "b",
    "9": "g", "@": "a", "$": "s", "€": "e", "+": "t", "!": "i", "|": "i", "l": "i",
})  # fmt: skip
_SEPARATORS = set(" .-_*/,·~:")
_SHORTEST_RUN = 4


def letters_for_figures(text: str) -> str:
    """Return folded text with figures as the letters they stand for (3 for e), l as i."""
    return text.translate(_FIGURES)


def join_spaced(text: str) -> str:
    """Return folded text in which words spelled letter by letter are joined: s-e-n-d is send.

    A run has at least four single letters or figures with the same separator between; a space of
    more than the separator ends it, so words spelled one after the other run together.
    """
    found: list[str] = []
    place, length = 0, len(text)
    while place < length:
        end = _run_end(text, place) if place == 0 or not _word(text[place - 1]) else place
        if end - place >= 2 * _SHORTEST_RUN - 1:
            found.append(text[place:end:2])
            place = end
        else:
            found.append(text[place])
            place += 1
    return "".join(found)


def _run_end(text: str, begin: int) -> int:
    """Return where the longest run of separated single characters ends; `begin` if there is none."""
    length = len(text)
    if not _word(text[begin]) or begin + 1 >= length or text[begin + 1] not in _SEPARATORS:
        return begin
    separator, end = text[begin + 1], begin + 1
    while end + 1 < length and text[end] == separator and _word(text[end + 1]):
        if end + 2 < length and _word(text[end + 2]):
            break
        end += 2
    return end


def _word(character: str) -> bool:
    return character.isalnum() or character in "@$€!|+"
