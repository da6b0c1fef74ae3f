"""Generation: prompts in, tokens or streamed text out.

A `Generator` holds a model in the form that decodes fastest here.  Prompts are padded to a few
bucket lengths and the cache to a few sizes, so that programs are compiled once each; long prompts
go through in pieces.  Decoding runs several steps on the device between looks from the host.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.inference import steps
from jaxherd.inference.guards.guard import Conversation, Guard
from jaxherd.inference.guards.held_text import HeldText
from jaxherd.inference.images import PromptImages, check_images
from jaxherd.inference.requests import (
    GuardVeto,
    Request,
    Result,
    Row,
    bucket,
    row_keys,
    stop_tokens,
    withheld,
)
from jaxherd.inference.sampling import RowSampling, Sampling
from jaxherd.inference.serving_form import serving_form
from jaxherd.models.decoder import Decoder

_SMALLEST_PIECE, _SMALLEST_CACHE = 16, 128


class Generator:
    """A model ready to generate."""

    def __init__(
        self,
        module: Decoder,
        tokenizer: Any = None,
        *,
        stop_ids: Sequence[int] | None = None,
        max_length: int | None = None,
        prefill_chunk: int = 512,
        decode_steps: int = 16,
        dtype: Any = None,
        prepare: bool = True,
        guard: Guard | None = None,
    ):
        """Prepare a model.

        Args:
          module: a decoder.
          tokenizer: for text and stop strings; its stop tokens end a row.
          stop_ids: end a row; the tokenizer's when None.
          max_length: longest prompt and continuation together; the model's own when None.
          prefill_chunk: prompts go through in pieces of at most this many tokens.
          decode_steps: tokens between two looks from the host.
          dtype: of the weights, see `serving_form`.
          prepare: bring the model into the form that decodes fastest here, which copies it and
            takes longer to compile; False serves it as it is.
          guard: judges the text of prompts and answers; needs a tokenizer.  What it vetoes has the
            reason "content_filter" and neither tokens nor text.
        Raises:
          JaxherdError: a number below 1, too many stop tokens, or a guard without a tokenizer.
        """
        for name, value in (("prefill_chunk", prefill_chunk), ("decode_steps", decode_steps)):
            if value < 1:
                raise JaxherdError(f"{name} must be at least 1, got {value}.")
        if guard is not None and tokenizer is None:
            raise JaxherdError("a guard reads text: give a tokenizer as well.")
        self.stop_ids, self._stop_S = stop_tokens(stop_ids, tokenizer)
        if prepare:
            module = serving_form(module, dtype=dtype)
        self.module, self.tokenizer, self.guard = module, tokenizer, guard
        self.max_length = min(max_length or module.config.max_length, module.config.max_length)
        self.prefill_chunk, self.decode_steps = prefill_chunk, decode_steps

    def run(self, requests: Sequence[Request], *, key: jax.Array | None = None) -> list[Result]:
        """Return the result of every request; they run as one batch."""
        results: list[Result | None] = [None] * len(requests)
        for row, _, _, result in self._events(requests, key):
            if result is not None:
                results[row] = result
        return [result for result in results if result is not None]

    def stream(self, request: Request, *, key: jax.Array | None = None) -> Iterator[str]:
        """Yield pieces of text as they become certain; needs a tokenizer.

        Raises:
          GuardVeto: the guard vetoes the prompt, or what of the answer was not shown yet.
        """
        if self.tokenizer is None:
            raise JaxherdError("streaming text needs a tokenizer.")
        for _, _, text, result in self._events([request], key):
            if text:
                yield text
            if result is not None and result.veto is not None:
                raise GuardVeto(result.veto)

    def check(self, requests: Sequence[Request]) -> None:
        """Raise JaxherdError if a request cannot be served; nothing is compiled."""
        if not requests:
            raise JaxherdError("there is no prompt.")
        for request in requests:
            request.check(self.module.config.vocab_size, self.max_length, self.tokenizer)
            check_images(self.module.config, request)

    def _events(
        self, requests: Sequence[Request], key: jax.Array | None
    ) -> Iterator[tuple[int, list[int], str, Result | None]]:
        """Yield (row, new tokens, new text, result once the row has ended)."""
        self.check(requests)
        guard = self.guard
        if guard is None:
            yield from self._decoded(requests, key)
            return
        asked = [self._conversation(request) for request in requests]
        verdicts = [guard.pre(conversation) for conversation in asked]
        for row, verdict in enumerate(verdicts):
            if verdict.vetoed:
                yield row, [], "", withheld(verdict.sentence("prompt"))
        left = [row for row, verdict in enumerate(verdicts) if not verdict.vetoed]
        held = {row: HeldText(guard, asked[row]) for row in left}
        ended: set[int] = set()
        for number, new, text, result in self._decoded([requests[row] for row in left], key):
            row = left[number]
            if row in ended:
                continue
            shown = held[row].push(text)
            if result is not None and not held[row].vetoed:
                shown += held[row].finish()
            verdict = held[row].verdict
            if held[row].vetoed and verdict is not None:
                ended.add(row)
                new, shown, result = [], "", withheld(verdict.sentence("answer"))
            yield row, new, shown, result
            if len(ended) == len(left):
                return

    def _conversation(self, request: Request) -> Conversation:
        """Return a prompt as the guard reads it: the text that the model sees."""
        return [{"role": "user", "content": self.tokenizer.decode(request.tokens)}]

    def _decoded(
        self, requests: Sequence[Request], key: jax.Array | None
    ) -> Iterator[tuple[int, list[int], str, Result | None]]:
        """Yield events of checked requests that may run."""
        if not requests:
            return
        rows = [Row(request, self.tokenizer, self.stop_ids) for request in requests]
        keys = row_keys(key, [request.seed for request in requests])
        sampling = RowSampling.create([request.sampling for request in requests], keys)
        lengths_B = jnp.asarray([len(r.tokens) for r in requests], jnp.int32)
        budget_B = jnp.asarray([r.max_new_tokens for r in requests], jnp.int32)
        cache, last_BD = self._prefill(requests, lengths_B)
        state = steps.start(self.module, last_BD, lengths_B, budget_B, self._stop_S, sampling)
        chosen_BK = state.token_B[:, None]
        while True:
            # The state is donated to the next call, so what the host needs is fetched first.
            finished_B = np.asarray(state.done_B).tolist()
            for number, tokens in enumerate(np.asarray(chosen_BK).tolist()):
                if rows[number].result is not None:
                    continue
                new, text = rows[number].push([t for t in tokens if t >= 0], finished_B[number])
                yield number, new, text, rows[number].result
            if all(row.result is not None for row in rows):
                return
            ended_B = jnp.asarray([row.result is not None for row in rows])
            state = dataclasses.replace(state, done_B=state.done_B | ended_B)
            cache, state, chosen_BK = steps.decode(
                self.module, cache, state, self._stop_S, sampling, steps=self.decode_steps
            )

    def _capacity(self, requests: Sequence[Request]) -> int:
        longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
        return min(bucket(longest, _SMALLEST_CACHE), self.max_length)

    def _prefill(self, requests: Sequence[Request], lengths_B: jax.Array):
        prompts = [request.tokens for request in requests]
        batch, longest = len(prompts), max(len(prompt) for prompt in prompts)
        images = PromptImages.encode(self.module, requests)
        cache = self.module.init_cache(batch, self._capacity(requests))
        last_BD = jnp.zeros((batch, self.module.config.embed_dim), self.module.dtype)
        for begin in range(0, longest, self.prefill_chunk):
            here = min(self.prefill_chunk, longest - begin)
            width = min(bucket(here, _SMALLEST_PIECE), self.prefill_chunk)
            tokens = np.zeros((batch, width), np.int32)
            positions = np.full((batch, width), -1, np.int32)
            for row, prompt in enumerate(prompts):
                piece = prompt[begin : begin + here]
                tokens[row, : len(piece)] = piece
                positions[row, : len(piece)] = np.arange(begin, begin + len(piece))
            cache, last_BD = steps.prefill(
                self.module, cache, last_BD, tokens, positions, lengths_B,
                features=None if images is None else images.piece(begin, here, width),
                cache_is_empty=begin == 0,
            )  # fmt: skip
        return cache, last_BD


def generate(
    module: Decoder,
    prompt_tokens: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    top_k: int = 0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] = (),
    images: Any = None,
    tokenizer: Any = None,
    guard: Guard | None = None,
) -> Any:
    """Return the tokens that continue the prompts.

    Args:
      module: a decoder.
      prompt_tokens: a list of ints, a list of such lists (lengths may differ), or an integer
        array [T] or [B, T].
      max_new_tokens: how many to choose; fewer when a token of `stop_ids` comes first.
      temperature, top_k, top_p, min_p: see `jaxherd.inference.sampling`; temperature 0 is greedy.
      key: of the sampling; row i uses it folded with i.
      images: tiles [N, Y, X, C] with colours in [-1, 1] that fill the placeholders of one prompt in
        order (`jaxherd.data.images` makes both); for several prompts a list with the tiles, or
        None, of each.
      tokenizer: for the guard.
      guard: judges prompts and answers (`jaxherd.inference.guards`); prompts that it vetoes do not
        reach the model.
    Returns:
      The new tokens, without the prompt: a list for one prompt, a list of lists for several.  It is
      empty where the guard vetoed, and never otherwise.
    Raises:
      JaxherdError: a prompt that is empty, holds no tokens of the model, or is too long; images
        that do not fit the model or the prompt.
    """
    prompts, single = _prompts(prompt_tokens)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    tiles = [images] if single else _tiles(images, len(prompts))
    requests = [
        Request(tuple(prompt), max_new_tokens, sampling, seed=row, images=tiles[row])
        for row, prompt in enumerate(prompts)
    ]
    # For one call the faster form would take longer to compile than it saves.
    generator = Generator(module, tokenizer, stop_ids=stop_ids, prepare=False, guard=guard)
    found = [result.tokens for result in generator.run(requests, key=key)]
    return found[0] if single else found


def _prompts(prompt_tokens: Any) -> tuple[list[list[int]], bool]:
    if isinstance(prompt_tokens, np.ndarray | jax.Array):
        array = np.asarray(prompt_tokens)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise JaxherdError(
                f"prompt_tokens must be integers [T] or [B, T], not {array.dtype} {array.shape}."
            )
        prompt_tokens = array.tolist()
    prompts = list(prompt_tokens)
    single = not prompts or isinstance(prompts[0], int | np.integer)
    rows = [prompts] if single else prompts
    try:
        return [[_token(t) for t in row] for row in rows], single
    except TypeError:
        raise JaxherdError("prompt_tokens must be a list of ints or of lists of ints.") from None


def _tiles(images: Any, count: int) -> list[Any]:
    if images is None:
        return [None] * count
    if not isinstance(images, list | tuple) or len(images) != count:
        raise JaxherdError(f"images must be a list of {count}, the tiles or None of each prompt.")
    return list(images)


def _token(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer | np.ndarray | jax.Array):
        raise TypeError
    return int(value)
