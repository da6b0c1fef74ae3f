"""How a prompt and its answer become tokens: the same way in fine-tuning, sampling and scoring."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.chat import encode_answer, encode_chat
from jaxherd.data.tokenizers import Tokenizer

# A text, or messages (mappings with role and content) of which the assistant is to give the next.
Prompt = str | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """The form of all conversations of an experiment.

    Attributes:
      kind: "plain", the text after the token that begins texts (where the tokenizer has one), the
        answer before the one that ends them; "chat", the tokenizer's chat template, a text being
        the user's message.
      system: a system message that goes before all others; of "chat".
    """

    kind: Literal["plain", "chat"] = "plain"
    system: str | None = None

    def __post_init__(self):
        if self.kind not in ("plain", "chat"):
            raise JaxherdError(f"kind={self.kind!r}: {nearest(self.kind, ('plain', 'chat'))}")
        if self.system is not None and self.kind != "chat":
            raise JaxherdError("A system message needs kind='chat'.")

    def prompt_ids(self, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
        """Return the tokens before the answer.

        Raises JaxherdError for messages in plain text, or if there is no chat template.
        """
        if self.kind == "chat":
            return encode_chat(tokenizer, self._messages(prompt))
        begin = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        return [*begin, *tokenizer.encode(_text(prompt))]

    def answer_ids(self, tokenizer: Tokenizer, prompt: Prompt, answer: str) -> list[int]:
        """Return the tokens of the answer, with the one that ends it.

        Raises JaxherdError as `prompt_ids`, or if nothing would end the answer.
        """
        if self.kind == "chat":
            return encode_answer(tokenizer, self._messages(prompt), answer)
        if tokenizer.eos_id is None:
            raise JaxherdError(
                "The tokenizer has no token that ends a text, so that no answer would end: use "
                "kind='chat' or another tokenizer."
            )
        return [*tokenizer.encode(answer), tokenizer.eos_id]

    def _messages(self, prompt: Prompt) -> list[Mapping[str, Any]]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *messages]


def _text(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise JaxherdError("Messages need the prompt format kind='chat'.")
    return prompt
