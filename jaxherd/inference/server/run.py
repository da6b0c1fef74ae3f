"""Running the server: one event loop, one engine thread, and an orderly end.

SIGTERM or SIGINT begins the end: nobody new is let in, those under way have `grace_seconds` to
finish, what is left then is told so; a second signal does not wait.  At the end no page is held.
"""

import asyncio
import contextlib
import importlib.util
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from jaxherd.core.errors import missing_extra
from jaxherd.inference.server import errors
from jaxherd.inference.server.access import Hosts, Keys
from jaxherd.inference.server.app import build_app
from jaxherd.inference.server.service import Service

_log = logging.getLogger(__name__)

# For the last bytes to leave once the grace is over.
_LAST_BYTES = 5
# For the engine's step that runs, which may compile.
_LAST_STEP = 300.0
_TICK = 0.05


class HttpServer:
    """A service on a socket."""

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        *,
        keys: Keys,
        hosts: Hosts,
        grace_seconds: float = 30.0,
    ):
        """Prepare.

        Args:
          service: its engine thread not started yet.
          listener: bound (`access.listen`); it is closed at the end.
          keys, hosts: who may ask.
          grace_seconds: for requests under way when the end begins.
        Raises:
          MissingExtraError: starlette or uvicorn is not installed.
        """
        require_http()
        self._service, self._listener, self._grace = service, listener, grace_seconds
        self._app = build_app(service, keys, hosts)
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None

    @property
    def name(self) -> str:
        """Of the model."""
        return self._service.name

    @property
    def guarding(self) -> Any:
        """The guard with its counts, or None."""
        return self._service.guarding

    @property
    def url(self) -> str:
        """Where clients find the API."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal or `stop`.

        Args:
          ready: called once connections are taken.
        Raises:
          the engine's own exception, if it failed; RuntimeError if it hangs.
        """
        try:
            asyncio.run(self._main(ready))
        finally:
            self._listener.close()
            # Also when the loop broke: nobody is left to hear of what the engine does.
            ended = self._service.thread.stop(_LAST_STEP)
        if not ended:
            raise RuntimeError(f"the engine did not end its step within {_LAST_STEP:g} s")
        if self._service.thread.failure is not None:
            raise self._service.thread.failure

    def stop(self) -> None:
        """Begin the end, from any thread; called again, end without grace."""
        if self._loop is not None:
            # A loop that is closed has ended already.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._signal)

    def _signal(self) -> None:
        self._signals += 1
        if self._wake is not None:
            self._wake.set()

    async def _main(self, ready: Callable[[], None]) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        in_main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT) if in_main else ():
            self._loop.add_signal_handler(number, self._signal)
        service = self._service
        service.thread.start()
        server = _uvicorn_server(self._app, service.limits.connections, self._grace)
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(_TICK)
        if server.started:
            ready()
        while not (self._signals or service.failed or serving.done()):
            with contextlib.suppress(TimeoutError):
                # The engine's thread does not tell when it fails: look now and then.
                await asyncio.wait_for(self._wake.wait(), 0.5)
        service.draining, server.should_exit = True, True
        await self._drain()
        service.abort(errors.stopping(service.limits.retry_after))
        await serving

    async def _drain(self) -> None:
        """Wait until nothing is under way, grace is over, or somebody insists."""
        assert self._loop is not None
        end = self._loop.time() + self._grace
        while not self._service.idle and not self._service.failed and self._signals < 2:
            if self._loop.time() >= end:
                _log.warning("requests under way were ended after %g s of grace", self._grace)
                return
            await asyncio.sleep(_TICK)


def require_http() -> None:
    """Raise MissingExtraError unless starlette and uvicorn are installed."""
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise missing_extra(name, "serve", "Serving")


def _uvicorn_server(app: Any, connections: int, grace: float) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals alone: uvicorn would raise them again at the end, which kills."""

        @contextlib.contextmanager
        def capture_signals(self):
            yield

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=connections,
        # Grace is kept by `_drain`; this is for connections that hang after it.
        timeout_graceful_shutdown=int(grace) + _LAST_BYTES,
        timeout_keep_alive=5,
    )
    return Server(config)
