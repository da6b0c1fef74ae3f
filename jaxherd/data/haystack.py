"""Needles in a haystack: a sentence hidden in a long real text, and a question that only it answers.

    text text text ... <needle> ... text text text
    question

The haystack is a text that everybody has (Python's own language reference) or a file of the user's; cut at
the end of a sentence, so that the needle stands between two of them.  Lengths are in tokens of the model
and hold everything: what begins the prompt, haystack, needle and question.

Axis letters: none; lists of tokens.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.data.chat import encode_chat
from jaxherd.data.corpus import python_topics
from jaxherd.data.sources import resolve
from jaxherd.data.tokenizers import Tokenizer

_CITIES = (
    "Aarhus", "Bergen", "Cork", "Dijon", "Evora", "Faro", "Ghent", "Haifa", "Izmir", "Jena", "Kyoto",
    "Lund", "Malmo", "Nantes", "Oulu", "Porto", "Quito", "Riga", "Split", "Turin", "Utrecht", "Vaasa",
    "Winnipeg", "Xalapa", "Yerevan", "Zagreb",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Needle:
    """A sentence, what is asked about it, and the answer that is looked for.

    Attributes:
      sentence: stands in the text.
      question: comes at its end.
      answer: must stand in what the model says, as a word of its own.
    """

    sentence: str
    question: str
    answer: str


def magic_number(seed: int) -> Needle:
    """Return a needle that nobody can know: a city's number of five digits, by the seed."""
    random = np.random.default_rng((0x6E6565, seed))
    city, number = str(random.choice(_CITIES)), int(random.integers(10_000, 100_000))
    return Needle(
        f"The magic number of {city} is {number}.",
        f"What is the magic number of {city}? Answer with the number alone.",
        str(number),
    )


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Where the text comes from.

    Attributes:
      source: a text file (any source that `resolve` takes); None takes Python's language reference.
    """

    source: str | None = None

    def text(self) -> str:
        """Return the whole text.

        Raises:
          JaxherdError: it cannot be read, or is empty.
        """
        if self.source is None:
            return "\n\n".join(document.text for document in python_topics())
        path = pathlib.Path(resolve(self.source))
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise JaxherdError(f"{str(path)!r} cannot be read as a haystack ({error}).") from error
        if not text.strip():
            raise JaxherdError(f"{str(path)!r} is empty: a haystack needs text.")
        return text

    def fingerprint(self) -> str:
        """Return what tells this text from others."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]


class HaystackPrompts:
    """Makes prompts of exact lengths; a text is tokenised once."""

    def __init__(self, haystack: Haystack, tokenizer: Tokenizer, *, chat: bool):
        """Tokenise.

        Args:
          haystack: the text.
          tokenizer: of the model.
          chat: put text and question into a user's message of its chat format, else one after the
            other as plain text.
        """
        self._tokenizer, self._chat = tokenizer, chat
        self._ids = tokenizer.encode(haystack.text())
        self._ends = _sentence_ends(tokenizer, self._ids)

    def prompt(self, length: int, depth: float, needle: Needle) -> list[int]:
        """Return a prompt of `length` tokens at most, and short of it by a sentence's piece at most.

        Args:
          length: of the prompt; the text begins anew where it is shorter.
          depth: where the needle stands, 0 for the beginning of the text and 1 for its end.
          needle: what is hidden.
        Raises:
          JaxherdError: the length leaves no room for any text, or the depth is none.
        """
        if not 0 <= depth <= 1:
            raise JaxherdError(f"a depth must lie from 0 to 1, got {depth}.")
        head, tail = self._frame(needle)
        hidden = self._tokenizer.encode(f" {needle.sentence} ")
        room = length - len(head) - len(tail) - len(hidden)
        if room < 1:
            raise JaxherdError(
                f"{length} tokens leave no room for a haystack: question and needle take {length - room}."
            )
        text = (self._ids * (room // len(self._ids) + 1))[:room]
        place = self._end_near(round(depth * room), room)
        return [*head, *text[:place], *hidden, *text[place:], *tail]

    def _frame(self, needle: Needle) -> tuple[list[int], list[int]]:
        """Return the tokens before and after the text."""
        question = f"\n\n{needle.question}"
        if not self._chat:
            begin = self._tokenizer.bos_id
            head = [begin] if begin is not None and self._tokenizer.adds_bos else []
            return head, self._tokenizer.encode(f"{question}\nAnswer:")
        # The text goes between the two halves of an empty message: a mark tells where that is.
        mark = "@@@"
        whole = encode_chat(self._tokenizer, [{"role": "user", "content": f"{mark}{question}"}])
        for first in range(len(whole)):
            for last in range(first + 1, min(first + 8, len(whole)) + 1):
                if self._tokenizer.decode(whole[first:last]) == mark:
                    return whole[:first], whole[last:]
        raise JaxherdError(
            "the chat format changes what users write, so that no text can be put in."
        )

    def _end_near(self, wanted: int, room: int) -> int:
        """Return the end of a sentence nearest to a place; the ends of the text are such places."""
        size = len(self._ids)
        turn = wanted // size
        places = [0, room]
        for start in (turn - 1, turn, turn + 1):
            places += [p for p in self._near(wanted - start * size, start * size) if 0 <= p <= room]
        return min(places, key=lambda place: (abs(place - wanted), place))

    def _near(self, wanted: int, start: int) -> list[int]:
        at = int(np.searchsorted(self._ends, wanted))
        return [start + int(end) for end in self._ends[max(0, at - 1) : at + 1]]


def _sentence_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> np.ndarray:
    """Return the places after tokens that end a sentence."""
    ends = {i for i in set(ids) if tokenizer.id_bytes(i).rstrip().endswith((b".", b"!", b"?"))}
    return np.array([place + 1 for place, i in enumerate(ids) if i in ends], np.int64)
