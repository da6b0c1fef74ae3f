"""A tiny random decoder behind the real server on a real socket, and a plain client."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from typing import Any

import jax
import pytest

import jaxherd
from jaxherd.data.chat import encode_chat
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.inference.paged_engine import PagedEngine
from jaxherd.inference.sampling import Sampling
from jaxherd.inference.server.access import Hosts, Keys, listen
from jaxherd.inference.server.engine_thread import EngineThread
from jaxherd.inference.server.limits import Limits
from jaxherd.inference.server.run import HttpServer
from jaxherd.inference.server.service import Service
from jaxherd.layers.attention import AttentionConfig
from jaxherd.layers.feed_forward import FeedForwardConfig
from jaxherd.models.decoder import DecoderConfig, LayerConfig

TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}:{{ m['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant:{% endif %}"
)


class Words(ByteTokenizer):
    """Bytes with a chat template and nothing that stops, since a random model would at once."""

    chat_template = TEMPLATE
    stop_ids = ()


@pytest.fixture(scope="session")
def module():
    full = AttentionConfig(2, 1, 8)
    sliding = dataclasses.replace(full, kind="sliding_window", size=5)
    layers = tuple(LayerConfig(a, FeedForwardConfig(16)) for a in (full, sliding))
    config = DecoderConfig(259, 16, layers, tie_embeddings=True, max_length=256, init_std=0.3)
    return config.build(jax.random.key(0))


def engine_of(module, **options) -> PagedEngine:
    given: dict[str, Any] = dict(
        slots=3, page_size=8, prefill_chunk=32, prefill_rows=1, decode_steps=3, cache_tokens=768,
        prepare=False, stop_ids=(),
    )  # fmt: skip
    return PagedEngine(module, Words(), **(given | options))


class Handle:
    """A running server and a client of it."""

    def __init__(self, engine, limits=Limits(), keys=(), grace_seconds=10.0, tokens=None):
        self.engine = engine
        self.gate = threading.Event()
        self.gate.set()
        self.stepped = threading.Semaphore(0)
        step = engine.step

        def held_back():
            self.stepped.release()
            self.gate.wait()
            return step()

        engine.step = held_back
        listener = listen("127.0.0.1", 0, has_keys=False, allow_open=False)
        self.port = listener.getsockname()[1]
        self.thread = EngineThread(engine)
        self.service = Service(
            self.thread, name="tiny", limits=limits, defaults=Sampling(temperature=0.0)
        )
        hosts = Hosts.of(listener, open=bool(keys))
        self.server = HttpServer(
            self.service, listener, keys=Keys(keys), hosts=hosts, grace_seconds=grace_seconds
        )
        self.failure: BaseException | None = None
        ready = threading.Event()
        self._runner = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._runner.start()
        assert ready.wait(30), "the server did not start"

    def _run(self, ready) -> None:
        try:
            self.server.run(ready.set)
        except BaseException as error:
            self.failure = error

    def stop(self, timeout: float = 30) -> None:
        self.gate.set()
        self.server.stop()
        self._runner.join(timeout)
        assert not self._runner.is_alive(), "the server did not end"

    def wait_held(self) -> None:
        """Wait until the engine stands before a step."""
        assert self.stepped.acquire(timeout=30)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(self, method, path, body=None, headers=None):
        """Return (status, headers, parsed body)."""
        with contextlib.closing(self.connect()) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            given = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, given | (headers or {}))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), json.loads(answer.read())

    def post(self, path, body, headers=None):
        return self.request("POST", path, body, headers)

    def events(self, path, body, headers=None):
        """Yield the events of a stream as objects, and the word DONE."""
        with contextlib.closing(self.connect()) as connection:
            given = {"Content-Type": "application/json"} | (headers or {})
            connection.request("POST", path, json.dumps(body | {"stream": True}), given)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            assert answer.getheader("content-type", "").startswith("text/event-stream")
            while line := answer.readline():
                if line.startswith(b"data: "):
                    told = line.removeprefix(b"data: ").strip()
                    yield "DONE" if told == b"[DONE]" else json.loads(told)
                else:
                    assert line == b"\n" or line.startswith(b":"), line

    def raw(self, data: bytes) -> socket.socket:
        """Return a connection on which these bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def head(self, path: str, length: int, *headers: str) -> bytes:
        """Return the head of a request with a body of so many bytes."""
        lines = [
            f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
            f"Content-Length: {length}", *headers, "", "",
        ]  # fmt: skip
        return "\r\n".join(lines).encode()

    def until(self, condition, seconds: float = 30) -> None:
        """Wait for a condition on the engine's counters."""
        end = time.monotonic() + seconds
        while not condition(self.thread.counters):
            assert time.monotonic() < end, self.thread.counters
            time.sleep(0.01)


@pytest.fixture(scope="session")
def make_engine(module):
    """Return a function that makes an engine; options as of `PagedEngine`."""
    return lambda **options: engine_of(module, **options)


@pytest.fixture
def serve(module):
    """Return a function that starts a server; at the end each must have all its pages back."""
    started: list[Handle] = []

    def start(*, engine=None, **options) -> Handle:
        started.append(Handle(engine or engine_of(module), **options))
        return started[-1]

    yield start
    for handle in started:
        handle.stop()
        if handle.failure is None:
            handle.engine.check()
            assert handle.engine.idle
            assert not any(handle.engine.counters().pages_held.values())


@pytest.fixture(scope="session")
def offline(module):
    """Return a function that gives (prompt, tokens, text) of `jaxherd.generate`, greedy."""
    words, known = Words(), {}

    def answer(asked, count: int = 20):
        key = (str(asked), count)
        if key not in known:
            if isinstance(asked, str):
                prompt = words.encode(asked, add_bos=True)
            else:
                prompt = encode_chat(words, asked)
            tokens = jaxherd.generate(module, prompt, max_new_tokens=count)
            known[key] = prompt, tokens, words.decode(tokens)
        return known[key]

    return answer
