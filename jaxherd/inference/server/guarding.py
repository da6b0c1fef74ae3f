"""The guard of a server: what it makes of requests and answers, and how often it vetoed."""

import dataclasses
import threading
from collections.abc import Sequence

from jaxherd.inference.guards.guard import Conversation, Guard, Verdict
from jaxherd.inference.guards.held_text import HeldText


@dataclasses.dataclass(frozen=True)
class GuardCounts:
    """What a guard has done.

    Attributes:
      prompts, answers: judged to their end.
      vetoed_prompts, vetoed_answers: of those.
    """

    prompts: int = 0
    vetoed_prompts: int = 0
    answers: int = 0
    vetoed_answers: int = 0


class Guarding:
    """A guard with its counts; any thread may call."""

    def __init__(self, guard: Guard):
        self.guard = guard
        self._lock = threading.Lock()
        self._counts = GuardCounts()

    @property
    def counts(self) -> GuardCounts:
        """What the guard has done so far."""
        return self._counts

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Judge the prompts of a request."""
        verdicts = [self.guard.pre(conversation) for conversation in conversations]
        vetoed = sum(verdict.vetoed for verdict in verdicts)
        self._add(prompts=len(verdicts), vetoed_prompts=vetoed)
        return verdicts

    def hold(self, conversation: Conversation) -> "Held":
        """Return what keeps one answer back."""
        return Held(self, HeldText(self.guard, conversation))

    def ended(self, vetoed: bool) -> None:
        """Count an answer that was judged to its end."""
        self._add(answers=1, vetoed_answers=int(vetoed))

    def _add(self, **more: int) -> None:
        with self._lock:
            old = self._counts
            self._counts = dataclasses.replace(
                old, **{name: getattr(old, name) + count for name, count in more.items()}
            )


class Held:
    """One answer that is held back."""

    def __init__(self, guarding: Guarding, text: HeldText):
        self._guarding, self._text, self._ended = guarding, text, False

    def push(self, text: str, ended: bool) -> tuple[str, bool]:
        """Add text; return what may be shown now, and whether the answer is vetoed."""
        shown = self._text.push(text)
        if ended and not self._text.vetoed:
            shown += self._text.finish()
        vetoed = self._text.vetoed
        if (ended or vetoed) and not self._ended:
            self._ended = True
            self._guarding.ended(vetoed)
        return ("" if vetoed else shown), vetoed

    @property
    def sentence(self) -> str:
        """Why it was vetoed."""
        verdict = self._text.verdict
        assert verdict is not None
        return verdict.sentence("answer")
