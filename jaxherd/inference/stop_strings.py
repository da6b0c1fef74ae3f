"""Ending a text at a stop string, which may span any number of tokens."""

from collections.abc import Sequence

from jaxherd.core.errors import JaxherdError


class StopStrings:
    """Passes text on as soon as it can no longer be the beginning of a stop string."""

    def __init__(self, strings: Sequence[str]):
        if any(not isinstance(s, str) or not s for s in strings):
            raise JaxherdError("a stop string must be a text that is not empty.")
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; return what is safe to show.  After a match (`found`) nothing more comes."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(self._held.find(s), -len(s), s) for s in self._strings if s in self._held]
        if places:
            at, _, self.found = min(places)
            shown, self._held = self._held[:at], ""
            return shown
        keep = self._partial()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """Return the text that was held back, when generation ended without a match."""
        shown, self._held = self._held, ""
        return shown

    def _partial(self) -> int:
        """Return the length of the longest suffix that begins a stop string."""
        longest = max((len(s) for s in self._strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            suffix = self._held[-length:]
            if any(s.startswith(suffix) for s in self._strings):
                return length
        return 0
