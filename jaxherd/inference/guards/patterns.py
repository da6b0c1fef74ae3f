"""Regular expressions that take linear time whatever text they meet.

Python's `re` goes back and tries again, and text can be made that keeps it busy for years.  Here a
pattern is unrolled to a finite automaton without loops and all its states advance together: a text of
n characters costs at most n times the states, of which a pattern may have 2,000.

What a pattern may have: literal characters, `.`, classes `[a-z_]` and `[^...]`, `\\d \\w \\s`, `\\b`,
groups, `|`, and the repeats `?`, `{n}`, `{m,n}` and `{,n}`.  `*` and `+` have no longest match and are
refused, as are look-around and references.  Text and literals are folded (`jaxherd.data.folded_text`), so
case is one; what is searched for is whether and where first a match ends.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxherd.core.errors import JaxherdError
from jaxherd.data.folded_text import fold

_MOST_STATES, _MOST_REPEATS, _DEEPEST = 2000, 1000, 50
# Steps that are remembered: hostile text could otherwise fill the memory.
_MOST_KNOWN = 100_000


@dataclasses.dataclass(frozen=True)
class _Set:
    """One character among `characters`, or any other one."""

    characters: frozenset[str]
    negated: bool = False

    def holds(self, character: str) -> bool:
        return (character in self.characters) != self.negated


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One character of a kind: "d", "w", "s" or ".", or none of it."""

    kind: str
    negated: bool = False

    def holds(self, character: str) -> bool:
        found = {
            "d": character.isdigit(),
            "w": _is_word(character),
            "s": character == " ",
            ".": True,
        }[self.kind]
        return found != self.negated


@dataclasses.dataclass(frozen=True)
class _Any:
    """One character of any of these sets."""

    sets: tuple[Any, ...]
    negated: bool = False

    def holds(self, character: str) -> bool:
        return any(one.holds(character) for one in self.sets) != self.negated


class _Edge:
    """A word's beginning or end."""


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


class _State:
    """What a set of the automaton's states does with each character, worked out when met."""

    __slots__ = ("after_word", "live", "next")

    def __init__(self, live: frozenset[int], after_word: bool):
        self.live, self.after_word = live, after_word
        self.next: dict[str, _State | None] = {}


class Pattern:
    """A compiled pattern.

    Attributes:
      source: as it was written.
      longest: characters of the longest match.
      plain: whether it is of letters, spaces and gaps alone, so that figures may stand for letters.
    """

    def __init__(self, source: str, *, letters: Callable[[str], str] = str, loose: bool = False):
        """Compile.

        Args:
          source: see above.
          letters: maps folded literals once more, as the text to be searched was mapped.
          loose: spaces of the pattern may be absent from the text.
        Raises:
          JaxherdError: not such a pattern, one that matches nothing at all, or a large one.
        """
        self.source = source
        parser = _Parser(source, letters, loose)
        tree = parser.parse()
        self.plain = parser.plain
        # Lists of (kind, argument, next): "set", "edge", "split" and "end".
        self._nodes: list[tuple[str, Any, int]] = [("end", None, -1)]
        self._begin = self._unroll(tree, 0)
        self.longest = _longest(tree)
        if self._empty():
            raise JaxherdError(
                f"the pattern {source!r} matches where there is nothing: shorten it."
            )
        self._forget()

    def _forget(self) -> None:
        # Another thread may go on with the old states, which stay whole.
        self._states: dict[tuple[frozenset[int], bool], _State] = {}
        self._first, self._known = _State(frozenset(), False), 0

    def search(self, text: str) -> int | None:
        """Return where the first match in a folded text ends, or None."""
        state = self._first
        for place, character in enumerate(text):
            try:
                following = state.next[character]
            except KeyError:
                following = state.next[character] = self._step(state, character)
            if following is None:
                return place
            state = following
        return len(text) if self._step(state, None) is None else None

    def _step(self, state: _State, character: str | None) -> _State | None:
        """Return what follows; None once there is a match before the character."""
        word = character is not None and _is_word(character)
        waiting, seen, live = [*state.live, self._begin], set(), set()
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            kind, argument, following = self._nodes[number]
            if kind == "end":
                return None
            if kind == "split":
                waiting += [argument, following]
            elif kind == "edge":
                if state.after_word != word:
                    waiting.append(following)
            elif character is not None and argument.holds(character):
                live.add(following)
        self._known += 1
        if self._known > _MOST_KNOWN:
            self._forget()
        key = (frozenset(live), word)
        return self._states.setdefault(key, _State(*key))

    def _empty(self) -> bool:
        """Whether the end is reached without any character."""
        waiting, seen = [self._begin], set()
        while waiting:
            number = waiting.pop()
            kind, argument, following = self._nodes[number]
            if kind == "end":
                return True
            if number not in seen and kind != "set":
                waiting += [following] if kind == "edge" else [argument, following]
            seen.add(number)
        return False

    def _add(self, kind: str, argument: Any, following: int) -> int:
        if len(self._nodes) >= _MOST_STATES:
            raise JaxherdError(
                f"the pattern {self.source[:60]!r} has more than {_MOST_STATES} states once its repeats are "
                "written out: shorten them, or make several patterns."
            )
        self._nodes.append((kind, argument, following))
        return len(self._nodes) - 1

    def _unroll(self, tree: Any, following: int) -> int:
        """Return the first state of a part that goes on with `following`."""
        kind, *parts = tree
        if kind == "sequence":
            for part in reversed(parts):
                following = self._unroll(part, following)
            return following
        if kind == "choice":
            first = self._unroll(parts[0], following)
            for part in parts[1:]:
                first = self._add("split", first, self._unroll(part, following))
            return first
        if kind == "repeat":
            inner, least, most = parts
            end = first = following
            for _ in range(most - least):
                first = self._add("split", self._unroll(inner, first), end)
            for _ in range(least):
                first = self._unroll(inner, first)
            return first
        if isinstance(parts[0], _Edge):
            return self._add("edge", None, following)
        return self._add("set", parts[0], following)


def _longest(tree: Any) -> int:
    kind, *parts = tree
    if kind == "sequence":
        return sum(map(_longest, parts))
    if kind == "choice":
        return max(map(_longest, parts))
    if kind == "repeat":
        return _longest(parts[0]) * parts[2]
    return 0 if isinstance(parts[0], _Edge) else 1


class _Parser:
    """From the written pattern to a tree of sequence, choice, repeat and one."""

    def __init__(self, source: str, letters: Callable[[str], str], loose: bool):
        self._source, self._letters, self._loose = source, letters, loose
        self._at, self._depth = 0, 0
        self.plain = True

    def parse(self) -> Any:
        if not self._source:
            raise JaxherdError("a pattern is empty: leave it away.")
        tree = self._choice()
        if self._at < len(self._source):
            raise self._wrong("has a ) too many")
        return tree

    def _wrong(self, what: str) -> JaxherdError:
        return JaxherdError(f"the pattern {self._source[:60]!r} {what}.")

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise self._wrong("ends too early")
        self._at += 1
        return character

    def _choice(self) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._wrong(f"has groups more than {_DEEPEST} deep")
        parts = [self._sequence()]
        while self._peek() == "|":
            self._take()
            parts.append(self._sequence())
        self._depth -= 1
        return parts[0] if len(parts) == 1 else ("choice", *parts)

    def _sequence(self) -> Any:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._one()))
        return ("sequence", *parts)

    def _repeated(self, one: Any) -> Any:
        character = self._peek()
        if character and character in "*+":
            raise self._wrong(f"repeats without end: write {{0,40}} or so in place of {character}")
        if character == "?":
            self._take()
            return self._once(("repeat", one, 0, 1))
        if character == "{":
            self._take()
            least, most = self._counts()
            return self._once(("repeat", one, least, most))
        return one

    def _once(self, tree: Any) -> Any:
        if self._peek() and self._peek() in "?*+{":
            raise self._wrong("has two repeats after each other: put the first into a group")
        return tree

    def _counts(self) -> tuple[int, int]:
        end = self._source.find("}", self._at)
        inside = self._source[self._at : end] if end >= 0 else ""
        least, comma, most = inside.partition(",")
        texts = (least or "0", most if comma else least)
        if not all(text.isascii() and text.isdigit() and len(text) < 5 for text in texts):
            raise self._wrong("has a repeat that is not {n}, {m,n} or {,n}")
        self._at = end + 1
        numbers = int(texts[0]), int(texts[1])
        if not numbers[0] <= numbers[1] <= _MOST_REPEATS or not numbers[1]:
            raise self._wrong(
                f"has a repeat outside of 1 to {_MOST_REPEATS}, or the wrong way round"
            )
        return numbers

    def _one(self) -> Any:
        character = self._take()
        if character == "(":
            if self._peek() == "?":
                if self._source[self._at : self._at + 2] != "?:":
                    raise self._wrong("has a group (?...) other than (?:...)")
                self._at += 2
            tree = self._choice()
            if self._peek() != ")":
                raise self._wrong("has a ( that is never closed")
            self._take()
            return tree
        if character == "[":
            return ("one", self._class())
        if character == ".":
            return ("one", _Kind("."))
        if character == "\\":
            return self._escape()
        if character in "^$":
            raise self._wrong(f"has {character}, and guards look at all of a text: leave it away")
        if character in "?*+{}":
            raise self._wrong(f"has {character} with nothing before it: write \\{character}")
        return self._literal(character)

    def _escape(self) -> Any:
        character = self._take()
        if character == "b":
            return ("one", _Edge())
        if character in "dwsDWS":
            self.plain = self.plain and character not in "dD"
            return ("one", _Kind(character.lower(), character.isupper()))
        if character.isalnum():
            raise self._wrong(f"has \\{character}, which means nothing here")
        return self._literal(character)

    def _literal(self, character: str) -> Any:
        folded = fold(character)
        if not folded:
            raise self._wrong(f"has U+{ord(character):04X}, which is never seen: leave it away")
        self.plain = self.plain and all(c.isalpha() or c in " '" for c in folded)
        ones = [("one", _Set(frozenset(self._letters(c)))) for c in folded]
        tree = ones[0] if len(ones) == 1 else ("sequence", *ones)
        return ("repeat", tree, 0, 1) if self._loose and folded == " " else tree

    def _class(self) -> Any:
        self.plain = False
        negated = self._peek() == "^"
        if negated:
            self._take()
        sets: list[Any] = []
        characters: set[str] = set()
        while self._peek() != "]" or not (sets or characters):
            character = self._take()
            if character == "\\":
                character = self._take()
                if character in "dwsDWS":
                    sets.append(_Kind(character.lower(), character.isupper()))
                    continue
                if character.isalnum():
                    raise self._wrong(f"has \\{character} in a class, which means nothing here")
            last = character
            if self._peek() == "-" and self._source[self._at + 1 : self._at + 2] not in ("", "]"):
                self._take()
                last = self._take()
                if not ord(character) <= ord(last) < ord(character) + 1000:
                    raise self._wrong(f"has the range {character}-{last}, which is no range")
            for code in range(ord(character), ord(last) + 1):
                characters.update(fold(chr(code)))
        self._take()
        return _Any((*sets, _Set(frozenset(characters))), negated)
