"""The routes: who asks, what they send, and the answer in one body or as an event stream."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from jaxherd.inference.server import errors
from jaxherd.inference.server.access import Hosts, Keys
from jaxherd.inference.server.errors import ApiError
from jaxherd.inference.server.fields import parse_json
from jaxherd.inference.server.protocol import (
    ChatRequest,
    CompletionRequest,
    read_chat,
    read_completion,
)
from jaxherd.inference.server.replies import Replies
from jaxherd.inference.server.service import Answer, Service

_log = logging.getLogger(__name__)

# Comments keep a silent stream from being taken for dead.
_HEARTBEAT = 15.0
# Beyond the deadline, for a client that reads slowly to take the last bytes.
_LAST_BYTES = 5.0
# A body that is too large is read to its end for so long, or the answer might never be read.
_DISCARD = 2.0


def build_app(service: Service, keys: Keys, hosts: Hosts) -> Any:
    """Return the ASGI application; needs starlette (see `run.require_http`)."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    started = int(time.time())

    def told(error: ApiError) -> Any:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    async def on_api_error(request: Any, error: Exception) -> Any:
        assert isinstance(error, ApiError)
        return told(error)

    async def on_http_error(request: Any, error: Exception) -> Any:
        status = getattr(error, "status_code", 500)
        what = {404: "there is nothing at this path", 405: "this path takes another method"}
        message = f"{what.get(status, 'the request cannot be served')}: see GET /v1/models."
        return told(ApiError(status, message, headers=getattr(error, "headers", None)))

    async def on_fault(request: Any, error: Exception) -> Any:
        return told(errors.broken())

    async def health(request: Any) -> Any:
        hosts.check(request.headers.get("host"))
        state = "failed" if service.failed else "draining" if service.draining else "ok"
        body: dict[str, Any] = {"status": state}
        with contextlib.suppress(ApiError):
            keys.check(request.headers.get("authorization"))
            body |= {"model": service.name, "engine": dataclasses.asdict(service.thread.counters)}
            if service.guarding is not None:
                body["guard"] = {
                    "name": service.guarding.guard.name,
                    **dataclasses.asdict(service.guarding.counts),
                }
        return JSONResponse(body, 200 if state == "ok" else 503)

    def allow(request: Any) -> None:
        hosts.check(request.headers.get("host"))
        keys.check(request.headers.get("authorization"))

    def described() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": started, "owned_by": "jaxherd"}

    async def models(request: Any) -> Any:
        allow(request)
        return JSONResponse({"object": "list", "data": [described()]})

    async def one_model(request: Any) -> Any:
        allow(request)
        service.check_model(request.path_params["name"])
        return JSONResponse(described())

    async def answer(request: Any, read: Callable, kind: Any) -> Any:
        deadline = asyncio.get_running_loop().time() + service.limits.request_seconds
        allow(request)
        _check_content_type(request.headers.get("content-type"))
        service.check_open()
        service.arrive()
        try:
            body = await _body(request, service.limits.body_bytes, service.limits.body_seconds)
            options, asked = await asyncio.to_thread(_understand, service, read, body)
        finally:
            service.arrived()
        opened = service.open(asked, options.n)
        replies = Replies(kind, service.name, options.include_usage)
        if options.stream:
            return _EventStream(_frames(opened, replies, deadline), opened, deadline)
        try:
            return JSONResponse(await _whole(request, opened, replies, deadline))
        finally:
            opened.close()

    async def chat(request: Any) -> Any:
        return await answer(request, read_chat, "chat")

    async def completions(request: Any) -> Any:
        return await answer(request, read_completion, "completion")

    return Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", one_model, methods=["GET"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_error,
            Exception: on_fault,
        },
    )


def _check_content_type(value: str | None) -> None:
    """Raise ApiError unless the body says that it is JSON.

    A web page cannot send that to another origin without asking first, so no page can make a
    browser spend this machine's time.
    """
    if (value or "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: send 'Content-Type: application/json'.")


async def _body(request: Any, limit: int, seconds: float) -> bytes:
    from starlette.requests import ClientDisconnect

    length = request.headers.get("content-length", "")
    body, size, stream = bytearray(), 0, request.stream()
    # No-one is told to go on (100 Continue) with a body that will not be taken.
    if length.isdecimal() and int(length) > limit and "expect" in request.headers:
        raise errors.too_large(limit)
    try:
        async with asyncio.timeout(seconds):
            async for part in stream:
                size += len(part)
                if size > limit:
                    break
                body += part
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {seconds:g} s.",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise errors.bad_request("the client went away.") from None
    if size > limit:
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(_DISCARD):
                async for _ in stream:
                    pass
        raise errors.too_large(limit)
    return bytes(body)


def _understand(service: Service, read: Callable, body: bytes) -> tuple[Any, Any]:
    """Return the options and what the engine is asked for; it takes time, so not on the loop."""
    asked: ChatRequest | CompletionRequest = read(
        parse_json(body), service.limits, service.defaults
    )
    service.check_model(asked.options.model)
    return asked.options, service.encode(asked)


async def _whole(request: Any, answer: Answer, replies: Replies, deadline: float) -> dict[str, Any]:
    """Return the body of an answer that is not streamed."""

    async def collect() -> dict[str, Any]:
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        refusals: dict[int, str] = {}
        async for piece in answer.pieces(deadline, _HEARTBEAT):
            if piece is not None:
                texts[piece.index] = texts.get(piece.index, "") + piece.text
                if piece.reason is not None:
                    reasons[piece.index] = piece.reason
                if piece.refusal is not None:
                    # Of an answer that nobody has begun to read all is withheld.
                    texts[piece.index], refusals[piece.index] = "", piece.refusal
        order = sorted(texts)
        return replies.whole(
            [texts[i] for i in order],
            [reasons[i] for i in order],
            answer.usage,
            [refusals.get(i) for i in order],
        )

    body = await _unless_gone(request.receive, collect())
    # Nobody reads this one.
    return {} if body is None else body


async def _frames(answer: Answer, replies: Replies, deadline: float) -> AsyncIterator[bytes]:
    """Yield the events of a stream."""
    opened: set[int] = set()
    try:
        async for piece in answer.pieces(deadline, _HEARTBEAT):
            if piece is None:
                yield b": still at it\n\n"
                continue
            if piece.index not in opened:
                opened.add(piece.index)
                if (first := replies.opening(piece.index)) is not None:
                    yield _event(first)
            if piece.text or piece.reason is not None:
                for body in replies.piece(piece.index, piece.text, piece.reason, piece.refusal):
                    yield _event(body)
    except ApiError as error:
        yield _event(error.body())
        return
    if (last := replies.closing(answer.usage)) is not None:
        yield _event(last)
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    # JSON has no raw line ends, so an event is always one line.
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


class _EventStream:
    """A response whose events go out as they come, and whose answer ends with the client."""

    def __init__(self, frames: AsyncIterator[bytes], answer: Answer, deadline: float):
        self._frames, self._answer, self._deadline = frames, answer, deadline

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            # Only a client that does not read what it asked for comes to this time-out.
            async with asyncio.timeout_at(self._deadline + _LAST_BYTES):
                await _unless_gone(receive, self._send(send))
        except TimeoutError:
            _log.warning("a client did not read its stream to the end")
        finally:
            self._answer.close()

    async def _send(self, send: Any) -> bool:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            # Proxies (nginx) would collect events otherwise.
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for frame in self._frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


async def _unless_gone(receive: Callable[[], Awaitable[Any]], work: Any) -> Any:
    """Return what `work` gives, or None once the client has gone; `work` is cancelled then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
