"""An answer on its way to a reader, held back until a guard has seen it."""

from jaxherd.data.folded_text import fold_with_places
from jaxherd.inference.guards.guard import Conversation, Guard, Verdict

# New characters between two looks, and the share of the text that they are at least: the cost of all
# looks together stays a fixed multiple of that of the last.
_LEAST, _SHARE = 64, 16


class HeldText:
    """Passes on what no finding can concern any more, whatever comes later.

    A guard that needs the whole answer (`reach` None) holds everything to its end.  After a veto
    nothing comes any more; what was passed on before had no part in what was found.
    """

    def __init__(self, guard: Guard, conversation: Conversation):
        self._guard, self._conversation = guard, conversation
        self._text, self._shown, self._judged = "", 0, 0
        self.verdict: Verdict | None = None

    @property
    def vetoed(self) -> bool:
        """Whether the answer is withheld from here on."""
        return self.verdict is not None and self.verdict.vetoed

    def push(self, text: str) -> str:
        """Add text; return what may be shown now."""
        if self.vetoed:
            return ""
        self._text += text
        new = len(self._text) - self._judged
        if self._guard.reach is None or new < max(_LEAST, len(self._text) // _SHARE):
            return ""
        return self._look(self._guard.reach)

    def finish(self) -> str:
        """Return what was held back, once the answer is complete."""
        return "" if self.vetoed else self._look(0)

    def _look(self, reach: int) -> str:
        complete = reach == 0
        self.verdict = self._guard.post(self._conversation, self._text, complete=complete)
        self._judged = len(self._text)
        if self.verdict.vetoed:
            return ""
        end = len(self._text)
        if not complete:
            places = fold_with_places(self._text).places
            end = places[-reach] if len(places) >= reach else 0
        begin, self._shown = self._shown, max(self._shown, end)
        return self._text[begin : self._shown]
