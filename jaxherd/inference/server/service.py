"""From a checked request to the engine and back, on an event loop that never waits for the device.

The engine's thread hands events to the loop, which sorts them into the answers they belong to.
The counts of what is under way are the loop's own, so no lock guards them.
"""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError
from jaxherd.data.chat import can_chat, encode_chat
from jaxherd.inference.guards.guard import Conversation, Guard
from jaxherd.inference.requests import Event, Request
from jaxherd.inference.sampling import Sampling
from jaxherd.inference.server import errors
from jaxherd.inference.server.engine_thread import EngineStopped, EngineThread
from jaxherd.inference.server.errors import ApiError, bad_request
from jaxherd.inference.server.guarding import Guarding, Held
from jaxherd.inference.server.images import ImageReader, NoImages
from jaxherd.inference.server.limits import Limits
from jaxherd.inference.server.messages import images_of
from jaxherd.inference.server.protocol import ChatRequest, CompletionRequest, Options
from jaxherd.inference.server.replies import Usage


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of one choice; `reason` says why it ended, once it has.

    `refusal` is the guard's sentence where that is "content_filter": then the choice has no content,
    and what was shown before is all that there will be.
    """

    index: int
    text: str
    reason: str | None
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the engine is asked for, choice by choice.

    Attributes:
      requests: the choices.
      refusals: why a prompt is not given to the engine, for each choice; None where it is.
      conversations: of each choice, for the guard; empty without one.
    """

    requests: list[Request]
    refusals: list[str | None]
    conversations: list[Conversation]


class Service:
    """What is served: a model under a name, with limits.

    All methods but `encode` are the event loop's.
    """

    def __init__(
        self,
        thread: EngineThread,
        *,
        name: str,
        limits: Limits = Limits(),
        defaults: Sampling = Sampling(temperature=1.0),
        images: ImageReader | None = None,
        guard: Guard | None = None,
    ):
        """Prepare.

        Args:
          thread: not started yet; its engine has a tokenizer.
          name: of the model, as requests must give it.
          defaults: of the sampling, where a request does not say.
          images: what reads images; None refuses them.
          guard: judges prompts before the engine has them, and answers before clients do.
        """
        if thread.engine.tokenizer is None:
            raise JaxherdError("serving text needs a tokenizer.")
        self.thread, self.name, self.limits, self.defaults = thread, name, limits, defaults
        self.draining = False
        self._images = images or NoImages()
        self.guarding = None if guard is None else Guarding(guard)
        self._tokenizer = thread.engine.tokenizer
        self._room = thread.engine.slots + limits.waiting
        self._answers: set[Answer] = set()
        # Choices that the engine has, and requests that have not got so far.
        self._under_way, self._arriving = 0, 0

    @property
    def failed(self) -> bool:
        """Whether the engine is broken."""
        return self.thread.failure is not None

    def check_open(self) -> None:
        """Raise ApiError while no request can be taken: before its body is read."""
        if self.failed:
            raise errors.broken()
        if self.draining:
            raise errors.stopping(self.limits.retry_after)
        if self._under_way + self._arriving >= self._room:
            raise errors.queue_full(self.limits.retry_after)

    def arrive(self) -> None:
        """Count a request that is being read; `check_open` comes before, `arrived` after."""
        self._arriving += 1

    def arrived(self) -> None:
        """Say that a request has been read."""
        self._arriving -= 1

    def check_model(self, name: str) -> None:
        """Raise ApiError unless it is the model that is served."""
        if name != self.name:
            raise errors.no_model(name[:80], self.name)

    def encode(self, request: ChatRequest | CompletionRequest) -> Asked:
        """Return what the engine is asked for, choice by choice; any thread may call.

        Raises:
          ApiError: the prompt does not fit the model, the limits or the chat template.
        """
        options = request.options
        if isinstance(request, ChatRequest):
            prompts = [self._chat(request.messages)]
        else:
            prompts = [self._plain(prompt) for prompt in request.prompts]
        seed = secrets.randbits(32) if options.seed is None else options.seed
        requests = []
        for tokens in prompts:
            length = self._new_tokens(len(tokens), options)
            for _ in range(options.n):
                made = Request(tokens, length, options.sampling, seed + len(requests), options.stop)
                requests.append(made)
        for made in requests[:: options.n]:
            try:
                self.thread.engine.check_request(made)
            except JaxherdError as error:
                raise bad_request(str(error)) from None
        return self._judged(request, requests)

    def _judged(self, asked: ChatRequest | CompletionRequest, requests: list[Request]) -> Asked:
        """Ask the guard about every prompt."""
        if self.guarding is None:
            return Asked(requests, [None] * len(requests), [])
        conversations: list[Conversation]
        if isinstance(asked, ChatRequest):
            conversations = [asked.messages]
        else:
            conversations = [
                [{"role": "user", "content": self._as_text(prompt)}] for prompt in asked.prompts
            ]
        refusals = [
            verdict.sentence("prompt") if verdict.vetoed else None
            for verdict in self.guarding.judge(conversations)
        ]
        n = asked.options.n
        return Asked(
            requests,
            [refusal for refusal in refusals for _ in range(n)],
            [conversation for conversation in conversations for _ in range(n)],
        )

    def _as_text(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _chat(self, messages: list[dict[str, Any]]) -> tuple[int, ...]:
        if not can_chat(self._tokenizer):
            raise bad_request("this model has no chat template: use /v1/completions.")
        laid_out = {id(i): tuple(self._images.image_token_ids(i)) for i in images_of(messages)}
        try:
            tokens = encode_chat(
                self._tokenizer,
                messages,
                image_token_ids=lambda part: laid_out[id(part["image"])],
            )
        except JaxherdError as error:
            raise bad_request(str(error), "messages") from None
        return tuple(tokens)

    def _plain(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        words = self._tokenizer
        return tuple(words.encode(prompt, add_bos=bool(getattr(words, "adds_bos", False))))

    def _new_tokens(self, prompt: int, options: Options) -> int:
        length, most = self.thread.engine.max_length, self.limits.prompt_tokens
        if most is not None and prompt > most:
            raise bad_request(
                f"the prompt has {prompt} tokens and this server takes {most}: shorten it.",
                code="context_length_exceeded",
            )
        if prompt >= length or prompt + (options.max_tokens or 0) > length:
            asked = f" and {options.max_tokens} new ones" if options.max_tokens else ""
            raise bad_request(
                f"{prompt} tokens of prompt{asked} are more than the model's {length}: shorten "
                "either.",
                code="context_length_exceeded",
            )
        return options.max_tokens or min(self.limits.new_tokens, length - prompt)

    def open(self, asked: Asked, n: int) -> "Answer":
        """Hand requests to the engine and return their answer; whoever takes it must close it.

        Args:
          asked: those with a refusal are not handed over.
          n: so many of them after each other share a prompt.
        Raises:
          ApiError: too many are under way or asked for, or the server takes none any more.
        """
        if self.draining or self.failed:
            self.check_open()
        requests = [r for r, refusal in zip(asked.requests, asked.refusals) if refusal is None]
        if len(requests) > self._room:
            raise bad_request(
                f"{len(requests)} answers at once are more than the {self._room} that this server "
                "has room for: ask for fewer.",
                "n",
            )
        if self._under_way + len(requests) > self._room:
            raise errors.queue_full(self.limits.retry_after)
        answer = Answer(self, asked, n)
        self._answers.add(answer)
        self._under_way += len(requests)
        return answer

    def abort(self, error: ApiError) -> None:
        """End every answer with an error."""
        for answer in list(self._answers):
            answer.fail(error)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._under_way and not self._arriving and not self._answers

    def _ended(self) -> None:
        self._under_way -= 1

    def _closed(self, answer: "Answer") -> None:
        self._answers.discard(answer)


class Answer:
    """The choices of one request as they come."""

    def __init__(self, service: Service, asked: Asked, n: int):
        """Submit the requests; by `Service.open` alone."""
        requests: Sequence[Request] = asked.requests
        self._service, self._requests, self._n = service, requests, n
        self._refusals = asked.refusals
        self._held: list[Held] = []
        if service.guarding is not None:
            self._held = [service.guarding.hold(talk) for talk in asked.conversations]
        self._queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._completion = 0
        self._cached = [0] * len(requests)
        self._tickets: dict[int, int] = {}
        for index, request in enumerate(requests):
            if asked.refusals[index] is not None:
                continue
            try:
                self._tickets[index] = service.thread.submit(request, self._sink(index))
            except EngineStopped as error:
                self._loop.call_soon(self._take, index, error)

    def _sink(self, index: int):
        return lambda item: self._loop.call_soon_threadsafe(self._take, index, item)

    def _take(self, index: int, item: Event | Exception) -> None:
        """Sort in what the engine's thread handed over; on the loop."""
        if isinstance(item, Exception) or item.result is not None:
            self._tickets.pop(index, None)
            self._service._ended()
        self._queue.put_nowait((index, item))

    async def pieces(self, deadline: float, heartbeat: float) -> AsyncIterator[Piece | None]:
        """Yield pieces as they come, and None when nothing came for `heartbeat` seconds.

        Args:
          deadline: on the loop's clock.
        Raises:
          ApiError: time is up, the engine broke, or the server shuts down.
        """
        left = set(range(len(self._requests)))
        for index, refusal in enumerate(self._refusals):
            if refusal is not None:
                left.discard(index)
                yield Piece(index, "", "content_filter", refusal)
        while left:
            now = self._loop.time()
            try:
                async with asyncio.timeout_at(min(deadline, now + heartbeat)):
                    index, item = await self._queue.get()
            except TimeoutError:
                if self._loop.time() >= deadline:
                    limits = self._service.limits
                    raise errors.timed_out(limits.request_seconds, limits.retry_after) from None
                yield None
                continue
            if isinstance(item, Exception):
                raise self._explained(item)
            self._completion += len(item.tokens)
            self._cached[index] = max(self._cached[index], item.reused_tokens)
            if index not in left:
                continue  # vetoed: what the engine had made meanwhile is of no use
            reason = None if item.result is None else item.result.reason
            piece = Piece(index, item.text, reason)
            if self._held:
                # A look takes time in proportion to the text, so not on the loop.
                piece = await asyncio.to_thread(self._guarded, piece)
            if piece.reason is not None:
                left.discard(index)
                if piece.refusal is not None and index in self._tickets:
                    self._service.thread.cancel(self._tickets[index])
            yield piece

    def _guarded(self, piece: Piece) -> Piece:
        """Return what the guard lets through."""
        held = self._held[piece.index]
        text, vetoed = held.push(piece.text, piece.reason is not None)
        if vetoed:
            return Piece(piece.index, "", "content_filter", held.sentence)
        return dataclasses.replace(piece, text=text)

    def _explained(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, JaxherdError):
            return bad_request(str(error))
        if self._service.failed:
            return errors.broken()
        return errors.stopping(self._service.limits.retry_after)

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        return Usage(
            sum(len(request.tokens) for request in self._requests[:: self._n]),
            # Further answers to a prompt share what the first computed, which is no saving.
            sum(self._cached[:: self._n]),
            self._completion,
        )

    def fail(self, error: ApiError) -> None:
        """End the answer: whoever reads it meets the error after what is there."""
        self._queue.put_nowait((0, error))
        self._cancel()

    def close(self) -> None:
        """Cancel what has not ended, so that its pages return."""
        self._cancel()
        self._service._closed(self)

    def _cancel(self) -> None:
        for ticket in self._tickets.values():
            self._service.thread.cancel(ticket)
