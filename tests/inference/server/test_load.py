"""Clients that go away, queues that are full, time that is up, and the end of the server."""

import contextlib
import json
import threading

import pytest

from jaxherd.inference.server.limits import Limits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"model": "tiny", "prompt": "On and on", "max_tokens": 200}


def read_some(connection, least: int) -> bytes:
    data = b""
    while len(data) < least:
        data += (part := connection.recv(4096))
        assert part, data
    return data


def begin(handle, ask, *, stream: bool):
    """Return a raw connection on which a request was sent."""
    body = json.dumps(ask | {"stream": stream}).encode()
    return handle.raw(handle.head(TEXT, len(body)) + body)


def test_a_client_that_vanishes_from_its_stream(serve):
    handle = serve()
    connection = begin(handle, LONG, stream=True)
    assert b"data: " in read_some(connection, 400)
    handle.until(lambda c: sum(c.pages_held.values()) > 0)
    connection.close()
    handle.until(lambda c: c.cancelled == 1)
    handle.until(lambda c: not any(c.pages_held.values()))
    assert handle.thread.counters.new_tokens < 200 and handle.thread.counters.finished == 0
    handle.engine.check()


def test_clients_that_vanish_while_they_wait(serve):
    """One whose whole answer is being made, and one that is still in the queue."""
    handle = serve()
    handle.gate.clear()
    running = [begin(handle, LONG | {"n": 3}, stream=False)]
    handle.wait_held()
    waiting = begin(handle, LONG, stream=False)
    handle.gate.set()
    handle.until(lambda c: c.waiting == 1 and c.running == 3)
    waiting.close()
    handle.until(lambda c: c.cancelled == 1 and c.waiting == 0)
    assert handle.thread.counters.running == 3
    running[0].close()
    handle.until(lambda c: c.cancelled == 4)
    handle.until(lambda c: not any(c.pages_held.values()))
    handle.until(lambda _: handle.service.idle)


def test_a_full_queue(serve):
    handle = serve(limits=Limits(waiting=1, retry_after=7, choices=4))
    handle.gate.clear()
    inside = begin(handle, LONG | {"n": 3}, stream=True)
    handle.wait_held()
    # More than would ever fit is no matter of waiting.
    assert serve(limits=Limits(waiting=0)).post(TEXT, LONG | {"n": 4})[0] == 400
    # Two more do not fit into one place; one does; then none.
    status, headers, told = handle.post(TEXT, LONG | {"n": 2})
    assert status == 429 and told["error"]["code"] == "queue_full" and headers["retry-after"] == "7"
    waiting = begin(handle, LONG | {"max_tokens": 2}, stream=False)
    handle.until(lambda _: handle.service._under_way == 4)
    status, headers, told = handle.post(TEXT, LONG)
    assert status == 429 and headers["retry-after"] == "7"
    # Turned away before its body is read.
    with contextlib.closing(handle.raw(handle.head(TEXT, 10_000))) as connection:
        assert b" 429 " in connection.recv(100)
    handle.gate.set()
    assert b"text_completion" in read_some(waiting, 200)
    inside.close()
    waiting.close()
    handle.until(lambda _: handle.service.idle)
    assert handle.post(TEXT, LONG | {"max_tokens": 1})[0] == 200


def test_time_that_is_up(serve):
    handle = serve(limits=Limits(request_seconds=1.0))
    handle.gate.clear()
    status, headers, told = handle.post(TEXT, LONG)
    assert status == 503 and told["error"]["code"] == "request_timeout"
    assert "retry-after" in headers
    [event] = handle.events(TEXT, LONG)
    assert event["error"]["code"] == "request_timeout", "and no DONE"
    handle.gate.set()
    handle.until(lambda c: c.cancelled == 2 and not any(c.pages_held.values()))


def test_a_client_that_does_not_read(serve, monkeypatch):
    """Its request ends in time although the answer cannot leave."""
    from jaxherd.inference.server import app

    monkeypatch.setattr(app, "_LAST_BYTES", 0.5)
    handle = serve(limits=Limits(request_seconds=1.5, choices=128), grace_seconds=0.0)
    # Frames that fill the socket's buffers: many answers of long pieces.
    monkeypatch.setattr(app, "_event", lambda body: b"data: " + b"x" * 300_000 + b"\n\n")
    connection = begin(handle, LONG | {"n": 20}, stream=True)
    handle.until(lambda c: c.running > 0)
    handle.until(lambda _: handle.service.idle)
    handle.until(lambda c: not any(c.pages_held.values()))
    connection.close()


def test_the_end_waits_for_those_under_way(serve, offline):
    handle = serve()
    texts: list[str] = []

    def read():
        events = list(handle.events(TEXT, LONG))
        assert events.pop() == "DONE"
        texts.append("".join(event["choices"][0]["text"] for event in events))

    handle.gate.clear()
    reader = threading.Thread(target=read)
    reader.start()
    handle.wait_held()
    # A connection that is open already is told; a new one is not taken.
    with contextlib.closing(handle.connect()) as kept:
        kept.request("GET", "/health")
        assert kept.getresponse().read()
        handle.server.stop()
        handle.until(lambda _: handle.service.draining)
        handle.gate.set()
        with contextlib.suppress(ConnectionError):
            kept.request("POST", TEXT, json.dumps(LONG), {"Content-Type": "application/json"})
            assert kept.getresponse().status == 503
    reader.join(30)
    assert texts == [offline("On and on", 200)[2]]
    handle.stop()
    with pytest.raises(ConnectionError):
        handle.request("GET", "/health")
    assert handle.failure is None


@pytest.mark.parametrize("how", ["grace is over", "told twice"])
def test_the_end_without_grace(serve, how):
    handle = serve(grace_seconds=0.3 if how == "grace is over" else 1000.0)
    events: list = []
    statuses: list[int] = []
    handle.gate.clear()
    clients = [
        threading.Thread(target=lambda: events.extend(handle.events(TEXT, LONG))),
        threading.Thread(target=lambda: statuses.append(handle.post(TEXT, LONG)[0])),
    ]
    for client in clients:
        client.start()
    handle.until(lambda _: handle.service._under_way == 2)
    handle.server.stop()
    if how == "told twice":
        handle.server.stop()
    for client in clients:
        client.join(30)
    handle.gate.set()
    assert statuses == [503]
    assert events[-1]["error"]["code"] == "shutting_down"
    handle.stop()
    assert handle.failure is None and handle.thread.counters.cancelled == 2


def test_an_engine_that_breaks(serve, make_engine, caplog):
    engine = make_engine()
    step, calls = engine.step, []

    def breaks():
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of memory on the device")
        return step()

    engine.step = breaks
    handle = serve(engine=engine)
    events = list(handle.events(TEXT, LONG))
    assert events[-1]["error"]["type"] == "server_error"
    assert "out of memory" not in json.dumps(events), "the log says it, not the answer"
    handle.stop()
    assert isinstance(handle.failure, RuntimeError) and "out of memory" in str(handle.failure)
    assert "the engine failed" in caplog.text
