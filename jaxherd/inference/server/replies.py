"""The bodies of answers, whole and in pieces, in OpenAI's shapes."""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
      prompt: of its prompts, each counted once however many answers it has.
      cached: of those, taken over from what was computed before.
      completion: chosen, stop tokens included.
    """

    prompt: int
    cached: int
    completion: int

    def body(self) -> dict[str, Any]:
        """Return the `usage` of an answer."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclasses.dataclass(frozen=True)
class Replies:
    """Makes the bodies of one answer, which share an id, a time and the model's name."""

    kind: Literal["chat", "completion"]
    model: str
    include_usage: bool
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(
        self,
        texts: Sequence[str],
        reasons: Sequence[str],
        usage: Usage,
        refusals: Sequence[str | None] | None = None,
    ) -> dict[str, Any]:
        """Return the answer in one body; `refusals` says why a choice was withheld, where it was."""
        choices = []
        for i, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            content: dict[str, Any] = {"text": text}
            if self.kind == "chat":
                refusal = refusals[i] if refusals else None
                message = {"role": "assistant", "content": text, "refusal": refusal}
                content = {"message": message}
            choices.append(self._choice(i, content, reason))
        return self._frame(choices, piece=False) | {"usage": usage.body()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the piece that begins a choice's message; completions have none."""
        if self.kind == "completion":
            return None
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._piece([self._choice(index, {"delta": delta}, None)])

    def piece(
        self, index: int, text: str, reason: str | None, refusal: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the pieces of new text, and of a choice's end once it has a reason."""
        if self.kind == "completion":
            return [self._piece([self._choice(index, {"text": text}, reason)])]
        pieces: list[tuple[dict[str, Any], str | None]] = []
        pieces += [({"content": text}, None)] if text else []
        pieces += [({"refusal": refusal}, None)] if refusal is not None else []
        pieces += [({}, reason)] if reason is not None else []
        return [self._piece([self._choice(index, {"delta": d}, r)]) for d, r in pieces]

    def closing(self, usage: Usage) -> dict[str, Any] | None:
        """Return the piece with the counts, if it was asked for."""
        if not self.include_usage:
            return None
        return self._frame([], piece=True) | {"usage": usage.body()}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # A stream that ends with the counts says null until then.
        return self._frame(choices, piece=True) | ({"usage": None} if self.include_usage else {})

    def _choice(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def _frame(self, choices: list[dict[str, Any]], *, piece: bool) -> dict[str, Any]:
        if self.kind == "completion":
            prefix, name = "cmpl", "text_completion"
        else:
            prefix, name = "chatcmpl", "chat.completion.chunk" if piece else "chat.completion"
        return {
            "id": f"{prefix}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }
