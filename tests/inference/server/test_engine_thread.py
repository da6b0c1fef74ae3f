"""The thread that calls the engine, without HTTP."""

import queue
import threading
from typing import Any

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.inference.requests import Event, Request
from jaxherd.inference.server.engine_thread import EngineStopped, EngineThread


class Sink:
    """Collects what it is told; `end` waits for the last of it."""

    def __init__(self):
        self.items: queue.Queue = queue.Queue()
        self.tokens: list[int] = []

    def __call__(self, item):
        self.items.put(item)

    def end(self) -> Any:
        while True:
            item = self.items.get(timeout=30)
            if isinstance(item, Exception):
                return item
            self.tokens += item.tokens
            if item.result is not None:
                return item.result


@pytest.fixture
def thread(make_engine):
    thread = EngineThread(make_engine())
    thread.start()
    yield thread
    assert thread.stop(30.0)
    if thread.failure is None:
        thread.engine.check()
        assert not any(thread.counters.pages_held.values()) and thread.engine.idle


def test_results_and_cancels(thread, make_engine):
    requests = [Request((i, 1, 2), 10 + i) for i in range(5)]
    sinks = [Sink() for _ in requests]
    tickets = [thread.submit(r, s) for r, s in zip(requests, sinks)]
    results = [sink.end() for sink in sinks]
    assert [r.tokens for r in results] == [r.tokens for r in make_engine().run(requests)]
    assert [sink.tokens for sink in sinks] == [result.tokens for result in results]
    long = Sink()
    ticket = thread.submit(Request((5,), 200), long)
    first = long.items.get(timeout=30)
    assert isinstance(first, Event) and first.tokens
    thread.cancel(ticket)
    result = long.end()
    assert result.reason == "cancelled" and len(result.tokens) < 200
    # Those that ended, and one that never was.
    for ended in (*tickets, ticket, 10**6):
        thread.cancel(ended)
    again = Sink()
    thread.submit(requests[0], again)
    assert again.end().tokens == results[0].tokens


def test_a_request_that_cannot_be(thread):
    sink = Sink()
    thread.submit(Request((), 3), sink)
    error = sink.end()
    assert isinstance(error, JaxherdError) and "empty" in str(error)


def test_a_listener_that_is_gone(thread):
    """Its request is cancelled; others do not notice."""
    told = threading.Event()

    def gone(item):
        told.set()
        raise RuntimeError("the event loop is closed")

    other = Sink()
    thread.submit(Request((1, 2), 200), gone)
    thread.submit(Request((3, 4), 30), other)
    assert len(other.end().tokens) == 30 and told.is_set()
    assert thread.counters.cancelled == 1 and thread.failure is None


def test_stop_tells_everybody(make_engine):
    engine = make_engine()
    gate, step = threading.Event(), engine.step
    engine.step = lambda: gate.wait() and step()
    thread = EngineThread(engine)
    thread.start()
    sinks = [Sink() for _ in range(5)]
    for sink in sinks:
        thread.submit(Request((1, 2), 200), sink)
    stopper = threading.Thread(target=thread.stop)
    stopper.start()
    gate.set()
    stopper.join(30)
    assert [type(sink.end()) for sink in sinks] == [EngineStopped] * 5
    with pytest.raises(EngineStopped):
        thread.submit(Request((1,), 1), Sink())
    engine.check()
    assert not any(engine.counters().pages_held.values()) and thread.stop(1.0)


def test_a_step_that_fails(make_engine, caplog):
    engine = make_engine()

    def fails():
        raise RuntimeError("no memory")

    engine.step = fails
    thread = EngineThread(engine)
    thread.start()
    sink = Sink()
    thread.submit(Request((1, 2), 5), sink)
    assert isinstance(sink.end(), EngineStopped)
    thread.stop(30.0)
    assert isinstance(thread.failure, RuntimeError) and "the engine failed" in caplog.text
    with pytest.raises(EngineStopped):
        thread.submit(Request((1,), 1), sink)
