"""`jaxherd serve`: a model behind OpenAI's HTTP API."""

import os
import pathlib
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError


def main(
    source: tyro.conf.Positional[str],
    /,
    port: int = 8000,
    host: str = "127.0.0.1",
    name: str | None = None,
    api_key_file: Path | None = None,
    allow_open: bool = False,
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    slots: int = 16,
    queue: int = 64,
    cache_tokens: int | None = None,
    max_length: int | None = None,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int = 1024,
    max_choices: int = 8,
    max_body_mib: float = 8.0,
    request_seconds: float = 600.0,
    grace_seconds: float = 30.0,
    decode_steps: int = 8,
    warm_up: bool = True,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantise: str | None = None,
    tokenizer: Path | None = None,
    guard: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    on: str = "cpu",
) -> int:
    """Serve a model over HTTP, as OpenAI's chat and text completions; many requests at once.

    Example: jaxherd serve smollm2-135m-instruct --port 8000

    then, from another terminal:

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d
    '{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hi!"}]}'

    Endpoints: GET /health, GET /v1/models, POST /v1/chat/completions, POST /v1/completions, with
    "stream": true as server-sent events.  Only this machine is served unless there is an API key:
    one a line in --api-key-file, or the variable JAXHERD_API_KEY.  Put a proxy with TLS in front
    before other machines use it.  SIGTERM or Ctrl-C lets running requests finish; twice does not.

    Args:
        source: an alias (smollm2-135m-instruct), a Hugging Face folder, a GGUF file, or any source.
        port: of the server; 0 takes a free one and prints it.
        host: address to listen on; other than this machine's own needs an API key.
        name: of the model in requests; the source's last part if not given.
        api_key_file: keys that clients must send, one a line.
        allow_open: serve other machines without an API key.
        allow_host: a further name under which a server without a key answers.
        slots: requests that run at once.
        queue: requests that wait for a slot; more get 429.
        cache_tokens: tokens that all running requests hold together; if not given 1,024 a slot, and at
            least the longest request.
        max_length: longest prompt and answer together; the model's own if not given.
        max_prompt_tokens: longest prompt.
        max_new_tokens: longest answer, and that of a chat that does not ask for a length.
        max_choices: answers that one request may ask for.
        max_body_mib: largest request.
        request_seconds: longest time of one request.
        grace_seconds: for running requests at the end.
        decode_steps: tokens between two looks from the host: fewer come sooner, more cost less.
        warm_up: compile the commonest programs before the first request.
        dtype: of the weights; the source's own if not given.
        quantise: keep weights in few bits: int8, int8_group32, int4, int4_group32; of Llama 4
            int4_mixed, int4_mixed_offline, fp8_mixed; as_stored keeps the file's own codes.
        tokenizer: file or folder, if the source has none.
        guard: "builtin", a .toml or .json file of rules, or the folder of a trained guard; may be
            given several times.  What it vetoes ends with finish_reason "content_filter".
        on: cpu, gpu or tpu.
    """
    from jaxherd.inference.guards import load_guards
    from jaxherd.inference.server import access
    from jaxherd.inference.server.limits import Limits
    from jaxherd.inference.server.run import HttpServer, require_http

    if not 0 <= port < 65536:
        raise JaxherdError(f"--port must be from 0 to 65535, got {port}.")
    if not 0 <= grace_seconds <= 86400:
        raise JaxherdError(f"--grace-seconds must be from 0 to a day, got {grace_seconds:g}.")
    require_http()
    limits = Limits(
        body_bytes=int(max_body_mib * 2**20),
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        choices=max_choices,
        waiting=queue,
        request_seconds=request_seconds,
        connections=slots + queue + 256,
    )
    guards = load_guards(guard)
    keys = access.read_keys(api_key_file, os.environ.get("JAXHERD_API_KEY"))
    # What can be wrong about the address is told before the model is loaded.
    listener = access.listen(host, port, has_keys=bool(keys), allow_open=allow_open)
    try:
        common.local_devices(on)
        _check_alone()
        engine, defaults = _load(
            source, tokenizer, dtype, quantise, slots=slots, cache_tokens=cache_tokens,
            max_length=max_length, decode_steps=decode_steps,
        )  # fmt: skip
        if warm_up:
            _warm_up(engine)
        server = _server(
            HttpServer, engine, name or _name(source), limits, defaults, listener, keys,
            access.Hosts.of(listener, open=bool(keys) or allow_open, extra=allow_host),
            grace_seconds, guards,
        )  # fmt: skip
        before = engine.counters()
        asks = "with an API key" if keys else "without an API key"
        told = f"serving {server.name} at {server.url} ({asks}); Ctrl-C ends"
        server.run(lambda: print(told, flush=True))
    finally:
        listener.close()
    engine.check()
    after = engine.counters()
    if server.guarding is not None:
        print(_guard_line(server.guarding), flush=True)
    print(
        f"stopped: {after.finished - before.finished} answers finished, {after.cancelled} "
        f"cancelled, {after.new_tokens - before.new_tokens} tokens chosen, "
        f"{sum(after.pages_held.values())} pages held.",
        flush=True,
    )
    return 0


def _check_alone() -> None:
    """Raise JaxherdError on a slice of several machines, whose workers would have to act as one."""
    import jax

    if jax.process_count() > 1:
        raise JaxherdError(
            f"serving runs on one machine, and this slice has {jax.process_count()} workers: serve "
            "on a slice of one machine."
        )


def _load(
    source: str, tokenizer: Path | None, dtype: str | None, quantise: str | None, **sizes: Any
):  # fmt: skip
    """Return the engine and the sampling where a request does not say."""
    import jaxherd
    from jaxherd.data.tokenizers import load_tokenizer
    from jaxherd.inference.paged_engine import PagedEngine
    from jaxherd.inference.sampling import Sampling
    from jaxherd.weights.load import generation_defaults

    words = load_tokenizer(tokenizer) if tokenizer else jaxherd.load_tokenizer(source)
    given = generation_defaults(source)
    sampling = Sampling(
        temperature=1.0 if given.temperature is None else given.temperature,
        top_p=1.0 if given.top_p is None else given.top_p,
        top_k=given.top_k or 0,
    )
    # The engine serves text alone, so a vision tower need not be read.
    module = jaxherd.load(source, dtype=dtype, text_only=True, quantise=quantise)
    stop_ids = given.eos_ids or words.stop_ids
    return PagedEngine(module, words, stop_ids=stop_ids, **sizes), sampling


def _warm_up(engine: Any) -> None:
    """Compile what a short request needs; longer prompts compile theirs when they come."""
    from jaxherd.inference.requests import Request

    engine.run([Request((0,) * min(17, engine.max_length - 2), 2)])


def _guard_line(guarding: Any) -> str:
    c = guarding.counts
    return (
        f"guard {guarding.guard.name}: vetoed {c.vetoed_prompts} of {c.prompts} prompts and "
        f"{c.vetoed_answers} of {c.answers} answers."
    )


def _server(kind, engine, name, limits, defaults, listener, keys, hosts, grace_seconds, guard):
    from jaxherd.inference.server.engine_thread import EngineThread
    from jaxherd.inference.server.service import Service

    service = Service(
        EngineThread(engine), name=name, limits=limits, defaults=defaults, guard=guard
    )
    return kind(service, listener, keys=keys, hosts=hosts, grace_seconds=grace_seconds)


def _name(source: str) -> str:
    """Return a model's name: an alias as it is, of a path its last part without the ending."""
    return pathlib.PurePath(source).name.removesuffix(".gguf") or source
