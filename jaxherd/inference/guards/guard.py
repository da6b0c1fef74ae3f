"""What a guard is: it looks at a prompt before the model does and at an answer before its reader does.

Source: llama4.md 11 (Llama Guard before and after the model; LlamaFirewall's chain of scanners).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxherd.core.errors import JaxherdError
from jaxherd.inference.guards.hazards import described

# Mappings with role and content, a text.
Conversation = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a guard makes of a text.

    Attributes:
      vetoed: whether it must not pass.
      scores: by hazard class, from 0 to 1; classes that are not named were not found.
      guard: which one says so.
      reasons: what was found, for a log; never the text itself.
    """

    vetoed: bool
    scores: Mapping[str, float]
    guard: str
    reasons: tuple[str, ...] = ()

    def sentence(self, what: str) -> str:
        """Return one sentence about a vetoed `what` ("prompt" or "answer")."""
        worst = sorted(self.scores, key=lambda code: (-self.scores[code], code))
        found = f" ({described(worst[0])})" if worst else ""
        return f"the {what} was vetoed by the guard {self.guard!r}{found}."


@runtime_checkable
class Guard(Protocol):
    """Anything that can veto; several threads may ask it at once."""

    @property
    def name(self) -> str:
        """In verdicts, logs and counts."""
        ...

    @property
    def reach(self) -> int | None:
        """How many characters of folded text a finding may depend on.

        Characters of an answer that have so many behind them can be shown while more is written: no
        later finding concerns them.  None where the whole answer is needed.
        """
        ...

    def pre(self, conversation: Conversation) -> Verdict:
        """Judge a prompt."""
        ...

    def post(self, conversation: Conversation, answer: str, *, complete: bool = True) -> Verdict:
        """Judge an answer to a prompt.

        Of one that is not complete, what more text could undo does not count.
        """
        ...


class GuardChain:
    """Guards one after the other; the first veto decides, and later ones are not asked."""

    def __init__(self, guards: Sequence[Guard]):
        if not guards:
            raise JaxherdError("a chain of guards needs at least one.")
        self._guards = tuple(guards)

    @property
    def name(self) -> str:
        """The guards' names."""
        return "+".join(guard.name for guard in self._guards)

    @property
    def reach(self) -> int | None:
        """The longest of the guards'."""
        found = [guard.reach for guard in self._guards]
        return None if None in found else max(reach for reach in found if reach is not None)

    def pre(self, conversation: Conversation) -> Verdict:
        """Judge a prompt; of a pass the scores are the highest of all guards."""
        return self._first(lambda guard: guard.pre(conversation))

    def post(self, conversation: Conversation, answer: str, *, complete: bool = True) -> Verdict:
        """Judge an answer likewise."""
        return self._first(lambda guard: guard.post(conversation, answer, complete=complete))

    def _first(self, ask: Any) -> Verdict:
        scores: dict[str, float] = {}
        reasons: tuple[str, ...] = ()
        for guard in self._guards:
            verdict = ask(guard)
            if verdict.vetoed:
                return verdict
            reasons += verdict.reasons
            for code, score in verdict.scores.items():
                scores[code] = max(score, scores.get(code, 0.0))
        return Verdict(False, scores, self.name, reasons)


def texts_of(conversation: Conversation) -> list[str]:
    """Return the text of every message; parts that are no text are left out."""
    found = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, str):
            found.append(content)
        elif isinstance(content, Sequence):
            parts = (part.get("text") for part in content if isinstance(part, Mapping))
            found.append("".join(part for part in parts if isinstance(part, str)))
    return found
