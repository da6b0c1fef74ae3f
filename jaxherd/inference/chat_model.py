"""A model as a partner of conversation: messages in, its next answer out."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError
from jaxherd.data.chat import can_chat, encode_chat
from jaxherd.inference.generate import Generator
from jaxherd.inference.guards.guard import Guard
from jaxherd.inference.requests import Request, Result
from jaxherd.inference.sampling import Sampling

Messages = Sequence[Mapping[str, Any]]


class TooLong(JaxherdError):
    """A conversation that has outgrown the model's sequence."""


class ChatModel:
    """Answers conversations in the tokenizer's chat format, one at a time.

    Equal conversations get equal answers.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        guard: Guard | None = None,
        prepare: bool = True,
    ):
        """Prepare; arguments as of `Generator` and `Request`.

        Raises:
          JaxherdError: the tokenizer has no chat format.
        """
        if not can_chat(tokenizer):
            raise JaxherdError("this model has no chat template, so that nobody can talk with it.")
        self._tokenizer = tokenizer
        self._new, self._sampling, self._seed = max_new_tokens, sampling, seed
        self._generator = Generator(
            module, tokenizer, stop_ids=stop_ids, guard=guard, prepare=prepare
        )

    def __call__(self, messages: Messages) -> Result:
        """Return the model's answer; what a guard vetoes has the reason "content_filter".

        Raises:
          TooLong: the conversation and an answer are more than the model's sequence.
        """
        tokens = tuple(encode_chat(self._tokenizer, messages))
        if len(tokens) + self._new > self._generator.max_length:
            raise TooLong(
                f"a conversation of {len(tokens)} tokens and an answer of {self._new} are more than the "
                f"model's {self._generator.max_length}."
            )
        request = Request(tokens, self._new, self._sampling, self._seed)
        return self._generator.run([request])[0]
