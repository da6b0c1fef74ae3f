"""A guard of rules: patterns that mark a text, from a file of the user's or the small set that is here.

A file is TOML or JSON of this form:

    name = "house-rules"
    threshold = 0.5                  # scores from here on veto; 0.5 if not given

    [[rule]]
    id = "project-name"
    hazard = "S7"                    # a class of `hazards`, or a word of your own
    patterns = ['project bluebird', 'code ?name .{0,20}bluebird']
    on = ["answer"]                  # "prompt", "answer"; both if not given
    score = 1.0                      # below the threshold: scored, not vetoed
    description = "what it is for"

Patterns are those of `jaxherd.inference.guards.patterns`: linear time on any text.  They are looked for in
the folded text (`jaxherd.data.folded_text`); one of words alone also in a second reading, where figures
stand for letters, words spelled letter by letter are joined, and spaces may be absent.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.folded_text import fold, join_spaced, letters_for_figures
from jaxherd.inference.guards.guard import Conversation, Verdict, texts_of
from jaxherd.inference.guards.patterns import Pattern

MOMENTS = ("prompt", "answer")
_FIELDS = ("id", "hazard", "patterns", "on", "score", "description")
_LARGEST_FILE, _MOST_RULES, _LONGEST_MATCH = 1 << 20, 1000, 1000
# The word that an answer in the making ends with is left out of sight, up to so many characters.
_LAST_WORD = 64


@dataclasses.dataclass(frozen=True)
class Rule:
    """Patterns that mean one thing.

    Attributes:
      id: in reasons.
      patterns: any of them is enough.
      hazard: its class.
      on: where it is looked for, among "prompt" and "answer".
      score: of a text that has it, above 0 and up to 1.
      description: for people.
    """

    id: str
    patterns: tuple[str, ...]
    hazard: str
    on: tuple[str, ...] = MOMENTS
    score: float = 1.0
    description: str = ""

    def __post_init__(self):
        where = f"rule {self.id!r}"
        if not self.id or not self.hazard or not self.patterns:
            raise JaxherdError(f"{where} needs an id, a hazard and at least one pattern.")
        for moment in self.on:
            if moment not in MOMENTS:
                raise JaxherdError(f"{where}: no moment {moment!r}; {nearest(moment, MOMENTS)}")
        if not self.on or not 0 < self.score <= 1:
            raise JaxherdError(f"{where}: score must be above 0 and up to 1, and on name a moment.")

    @functools.cached_property
    def compiled(self) -> tuple[tuple[Pattern, Pattern | None], ...]:
        """Each pattern for the folded text, and for the second reading where it has one."""
        found = []
        for source in self.patterns:
            try:
                plain = Pattern(source)
                loose = Pattern(source, letters=letters_for_figures, loose=True)
            except JaxherdError as error:
                raise JaxherdError(f"rule {self.id!r}: {error}") from None
            if plain.longest > _LONGEST_MATCH:
                raise JaxherdError(
                    f"rule {self.id!r}: {source[:60]!r} may match {plain.longest} characters, and "
                    f"{_LONGEST_MATCH} is the most: shorten its gaps."
                )
            found.append((plain, loose if plain.plain else None))
        return tuple(found)

    def matches(self, text: str, loose_text: str) -> bool:
        """Return whether a text has it, given both readings."""
        return any(
            plain.search(text) is not None
            or (loose is not None and loose.search(loose_text) is not None)
            for plain, loose in self.compiled
        )


class RuleGuard:
    """Vetoes a text in which a rule's score reaches the threshold.

    Every message of a prompt is looked at, whoever is said to have written it.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        name: str = "rules",
        threshold: float = 0.5,
        max_characters: int = 200_000,
    ):
        """Compile the rules.

        Args:
          rules: with different ids.
          threshold: scores from here on veto.
          max_characters: of one message or answer; longer ones are vetoed, since nobody looked.
        Raises:
          JaxherdError: no rules or too many, two of one id, or a pattern that is none.
        """
        if not 0 < len(rules) <= _MOST_RULES:
            raise JaxherdError(f"{name}: from 1 to {_MOST_RULES} rules, got {len(rules)}.")
        ids = [rule.id for rule in rules]
        for id in ids:
            if ids.count(id) > 1:
                raise JaxherdError(f"{name}: two rules are called {id!r}.")
        if not 0 < threshold <= 1 or max_characters < 1:
            raise JaxherdError(f"{name}: threshold must be above 0 and up to 1, got {threshold}.")
        self.name, self.rules = name, tuple(rules)
        self._threshold, self._most = threshold, max_characters
        longest = max(plain.longest for rule in rules for plain, _ in rule.compiled)
        # Twice: words spelled letter by letter take that much; and an edge and the last word.
        self.reach = 2 * longest + 16 + _LAST_WORD

    def pre(self, conversation: Conversation) -> Verdict:
        """Judge every message of a prompt."""
        return self._judge(texts_of(conversation), "prompt")

    def post(self, conversation: Conversation, answer: str, *, complete: bool = True) -> Verdict:
        """Judge an answer; the prompt plays no part."""
        return self._judge([answer], "answer", complete)

    def _judge(self, texts: Sequence[str], moment: str, complete: bool = True) -> Verdict:
        scores: dict[str, float] = {}
        found: list[str] = []
        for text in texts:
            if len(text) > self._most:
                reason = f"{len(text)} characters, of which {self._most} are read"
                return Verdict(True, {"unread": 1.0}, self.name, (reason,))
            text = fold(text)
            if not complete:
                # More text may go on with its last word, and undo the edge that a pattern asks for.
                end = text.rfind(" ", max(0, len(text) - _LAST_WORD)) + 1
                text = text[: end or len(text)]
            loose = letters_for_figures(join_spaced(text))
            for rule in self.rules:
                if moment in rule.on and rule.id not in found and rule.matches(text, loose):
                    found.append(rule.id)
                    scores[rule.hazard] = max(rule.score, scores.get(rule.hazard, 0.0))
        vetoed = any(score >= self._threshold for score in scores.values())
        return Verdict(vetoed, scores, self.name, tuple(found))


def load_rules(path: str | os.PathLike[str]) -> RuleGuard:
    """Return the guard of a TOML or JSON file.

    Raises:
      JaxherdError: it cannot be read, or something in it is wrong, which is named.
    """
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise JaxherdError(f"{str(path)!r} is larger than a file of rules may be (1 MiB).")
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise JaxherdError(f"{str(path)!r} cannot be read as rules ({error}).") from error
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, JaxherdError):
            raise
        raise JaxherdError(f"{str(path)!r} is neither TOML nor JSON ({error}).") from error
    return rules_of(data, path.stem, str(path))


def builtin_rules() -> RuleGuard:
    """Return the guard of the set that comes with jaxherd (`builtin_rules.toml` beside this file)."""
    return load_rules(pathlib.Path(__file__).with_name("builtin_rules.toml"))


def rules_of(data: Any, name: str, where: str) -> RuleGuard:
    """Return the guard of a file's content.

    Args:
      data: what TOML or JSON gave.
      name: of the guard, if the content has none.
      where: what to call it in messages.
    Raises:
      JaxherdError: as `load_rules` does.
    """
    if not isinstance(data, Mapping):
        raise JaxherdError(f"{where} holds no table with rules.")
    known = ("name", "threshold", "rule")
    for field in data:
        if field not in known:
            raise JaxherdError(f"{where} has no field {field!r}: {nearest(str(field), known)}")
    given = data.get("name", name)
    entries = data.get("rule")
    if not isinstance(entries, list) or not isinstance(given, str):
        raise JaxherdError(f"{where} needs a list of rules ([[rule]]), and a name that is a text.")
    rules = [_rule(entry, f"{where}, rule {n}") for n, entry in enumerate(entries, 1)]
    return RuleGuard(rules, name=given, threshold=_number(data, "threshold", 0.5, where))


def _rule(entry: Any, where: str) -> Rule:
    if not isinstance(entry, Mapping):
        raise JaxherdError(f"{where} is no table.")
    for field in entry:
        if field not in _FIELDS:
            raise JaxherdError(f"{where} has no field {field!r}: {nearest(str(field), _FIELDS)}")
    texts = {}
    for field in ("id", "hazard", "description"):
        texts[field] = entry.get(field, "")
        if not isinstance(texts[field], str):
            raise JaxherdError(f"{where}: {field} must be a text.")
    lists = {}
    for field, default in (("patterns", []), ("on", list(MOMENTS))):
        value = entry.get(field, default)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise JaxherdError(f"{where}: {field} must be a list of texts.")
        lists[field] = tuple(value)
    return Rule(
        texts["id"], lists["patterns"], texts["hazard"], lists["on"],
        _number(entry, "score", 1.0, where), texts["description"],
    )  # fmt: skip


def _number(entry: Mapping[str, Any], field: str, default: float, where: str) -> float:
    value = entry.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise JaxherdError(f"{where}: {field} must be a number.")
    return float(value)
