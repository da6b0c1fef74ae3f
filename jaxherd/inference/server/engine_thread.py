"""The one thread that calls the engine.

Other threads put orders into a queue and go on; the thread takes them between two steps of the
engine and hands what came of each request to the sink that came with it.  So nobody but this
thread ever waits for the device.
"""

import dataclasses
import itertools
import logging
import queue
import threading
from collections.abc import Callable

from jaxherd.inference.paged_engine import PagedEngine
from jaxherd.inference.requests import Counters, Event, Request

_log = logging.getLogger(__name__)


class EngineStopped(Exception):
    """The engine takes no requests any more: it was stopped, or failed."""


# What a sink is given: events, and at last the result inside one or an exception.
Sink = Callable[[Event | Exception], object]


@dataclasses.dataclass(frozen=True)
class _Add:
    ticket: int
    request: Request
    sink: Sink


@dataclasses.dataclass(frozen=True)
class _Cancel:
    ticket: int


class _Stop:
    pass


class EngineThread:
    """Runs an engine until `stop`.

    Each sink is called in this thread, must not block, and hears of its request until an event
    with a result (`cancelled` after `cancel`) or an exception; one that raises is cancelled.
    """

    def __init__(self, engine: PagedEngine):
        """Prepare; `start` begins."""
        self.engine = engine
        # Not None once a step failed: the engine is unusable then.
        self.failure: BaseException | None = None
        self._orders: queue.SimpleQueue[_Add | _Cancel | _Stop] = queue.SimpleQueue()
        self._tickets = itertools.count()
        # Of the engine's numbers, and back: only this thread touches them.
        self._sinks: dict[int, Sink] = {}
        self._number_of: dict[int, int] = {}
        self._ticket_of: dict[int, int] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._counters = engine.counters()
        self._thread = threading.Thread(target=self._run, name="jaxherd-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def counters(self) -> Counters:
        """What the engine has done and holds, as of its last step."""
        return self._counters

    def submit(self, request: Request, sink: Sink) -> int:
        """Queue a request and return its ticket; any thread may call.

        Raises:
          EngineStopped: it would never be served.
        """
        ticket = next(self._tickets)
        with self._lock:
            if self._closed:
                raise EngineStopped("the engine has stopped")
            self._orders.put(_Add(ticket, request, sink))
        return ticket

    def cancel(self, ticket: int) -> None:
        """End a request soon; of one that has ended nothing happens.  Any thread may call."""
        self._orders.put(_Cancel(ticket))

    def stop(self, timeout: float | None = None) -> bool:
        """Cancel what is left, end the thread and return whether it ended in time."""
        self._orders.put(_Stop())
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._take_orders():
                if not self.engine.idle:
                    for event in self.engine.step():
                        self._tell(event.id, event)
                self._counters = self.engine.counters()
        except BaseException as error:
            _log.exception("the engine failed")
            self.failure = error
        self._close()

    def _take_orders(self) -> bool:
        """Carry out what has been ordered; wait for an order if there is nothing else to do."""
        wait = self.engine.idle
        while True:
            try:
                order = self._orders.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if isinstance(order, _Stop):
                return False
            if isinstance(order, _Add):
                self._add(order)
            else:
                self._cancel(order.ticket)

    def _add(self, order: _Add) -> None:
        try:
            number = self.engine.add(order.request)
        except ValueError as error:
            order.sink(error)
            return
        self._sinks[number] = order.sink
        self._number_of[order.ticket], self._ticket_of[number] = number, order.ticket

    def _cancel(self, ticket: int) -> None:
        number = self._number_of.get(ticket)
        result = None if number is None else self.engine.cancel(number)
        if number is not None and result is not None:
            self._tell(number, Event(number, [], "", result))

    def _tell(self, number: int, event: Event) -> None:
        sink = self._sinks.get(number)
        if sink is None:
            return
        if event.result is not None:
            self._forget(number)
        try:
            sink(event)
        except Exception:
            # Whoever listened is gone, such as an event loop that was closed.
            if event.result is None:
                self._forget(number)
                self.engine.cancel(number)

    def _forget(self, number: int) -> None:
        del self._sinks[number], self._number_of[self._ticket_of.pop(number)]

    def _close(self) -> None:
        """Let nobody in, and tell everybody who is."""
        with self._lock:
            self._closed = True
        while True:
            try:
                order = self._orders.get(block=False)
            except queue.Empty:
                break
            if isinstance(order, _Add):
                self._end(order.sink)
        for number, sink in list(self._sinks.items()):
            if self.failure is None:
                self.engine.cancel(number)
            self._forget(number)
            self._end(sink)
        if self.failure is None:
            self._counters = self.engine.counters()

    def _end(self, sink: Sink) -> None:
        try:
            sink(EngineStopped("the engine has stopped"))
        except Exception:
            _log.debug("a listener is gone", exc_info=True)
