"""`jaxherd serve` under load: many streaming clients among some that behave badly.

    python tests/benchmarks/serve_load.py [--clients 64] [--slots 32] [--alone 8]

Starts the server as a process of its own on a free port of this machine and asks it for greedy
streams, first one at a time (`--alone` of them), then all `--clients` at once, among clients that
send what is malformed or too large and clients that vanish from their stream.  Meanwhile and at
the end it checks:

- each stream's text is the text that `Generator` gives offline for the same prompt, one at a time;
- whoever behaves badly is told so by the right status, and cancelled if it vanished;
- when all are gone no page is held, and SIGTERM ends the server with status 0.

Prints one JSON object: tokens per second of both ways and their ratio, waiting times for the first
piece, what each sort of client got, and the pages.  The exit status is 1 if a check failed.

Two greedy texts may part where two tokens are equally likely up to rounding, since sums are ordered
differently in a batch; such a stream counts as different, and the report shows where it parted.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time

STREAM = "/v1/completions"
JSON = {"Content-Type": "application/json"}
BODY_MIB = 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--alone", type=int, default=8)
    parser.add_argument("--malformed", type=int, default=16)
    parser.add_argument("--oversized", type=int, default=8)
    parser.add_argument("--vanishing", type=int, default=16)
    parser.add_argument("--decode-steps", type=int, default=8)
    parser.add_argument("--longest", type=int, default=128, help="most new tokens")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    asks = prompts(a)
    wanted = offline(a.source, asks)
    with server(a) as (port, process):
        report = run(a, port, asks, wanted)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        report["exit_status"], report["last_words"] = process.returncode, out.strip()
    report["failed_checks"] = failed(a, report)
    print(json.dumps(report, ensure_ascii=False))
    return 1 if report["failed_checks"] else 0


def prompts(a) -> list[dict]:
    """Return what the good clients ask for: mixed lengths, some that begin alike."""
    import numpy as np

    random = np.random.default_rng(a.seed)
    words = [
        "river",
        "stone",
        "lantern",
        "evening",
        "music",
        "window",
        "journey",
        "silver",
        "garden",
        "winter",
        "story",
    ]
    common = "You are telling a long and patient story to a child who cannot sleep. "
    asks = []
    for number in range(a.clients):
        text = " ".join(random.choice(words, random.integers(4, 40)))
        asks.append(
            {
                "prompt": f"{common if number % 3 == 0 else ''}{number}: {text}, and then",
                "max_tokens": int(random.integers(min(16, a.longest), a.longest + 1)),
            }
        )
    return asks


def offline(source: str, asks: list[dict]) -> list[str]:
    """Return the greedy text of each prompt, one at a time."""
    from jaxherd.core.host_memory import keep_freed_memory

    keep_freed_memory()
    import jaxherd
    from jaxherd.inference.generate import Generator, Request
    from jaxherd.weights.load import generation_defaults

    words = jaxherd.load_tokenizer(source)
    stop_ids = generation_defaults(source).eos_ids or words.stop_ids
    generator = Generator(jaxherd.load(source), words, stop_ids=stop_ids)
    texts = []
    for ask in asks:
        tokens = words.encode(ask["prompt"], add_bos=words.adds_bos)
        texts.append(generator.run([Request(tuple(tokens), ask["max_tokens"])])[0].text or "")
    return texts


@contextlib.contextmanager
def server(a):
    """Yield (port, process) of a server that is ready."""
    command = [
        sys.executable, "-m", "jaxherd.cli.main", "serve", a.source, "--name", "m", "--port", "0",
        "--slots", str(a.slots), "--queue", str(2 * (a.clients + a.vanishing)),
        "--max-body-mib", str(BODY_MIB), "--decode-steps", str(a.decode_steps),
        "--cache-tokens", str(512 * a.slots), "--max-length", "512",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "JAXHERD_API_KEY"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = re.search(r"http://127\.0\.0\.1:(\d+)/v1", process.stdout.readline())
        assert told, "the server did not start"
        yield int(told[1]), process
    finally:
        process.kill()


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=1200)


def stream(port: int, ask: dict) -> dict:
    """Return the text of a stream, its tokens, and when its first piece came."""
    begin, first, text, tokens, ended = time.perf_counter(), 0.0, "", 0, False
    body = {"model": "m", "temperature": 0, "stream": True} | ask
    body["stream_options"] = {"include_usage": True}
    with contextlib.closing(connect(port)) as connection:
        connection.request("POST", STREAM, json.dumps(body), JSON)
        answer = connection.getresponse()
        while line := answer.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    first = first or time.perf_counter() - begin
                    text += choice["text"]
            ended = ended or line.startswith(b"data: [DONE]")
    return {"text": text, "tokens": tokens, "first": first, "done": ended}


def malformed(port: int, number: int) -> str:
    """Send something wrong; return whether the answer was the right one."""
    kinds = [
        (b"{", JSON, STREAM, 400),
        (b'{"model": "m", "prompt": "x", "tempature": 1}', JSON, STREAM, 400),
        (b'{"model": "m", "prompt": "x", "temperature": 9}', JSON, STREAM, 400),
        (b'{"model": "other", "prompt": "x"}', JSON, STREAM, 404),
        (b'{"model": "m", "prompt": "x"}', {"Content-Type": "text/plain"}, STREAM, 415),
        (b"{}", JSON, "/v1/nothing", 404),
    ]
    body, headers, path, wanted = kinds[number % len(kinds)]
    return status_of(port, body, headers, path, wanted)


def oversized(port: int, number: int) -> str:
    """Send too much; in every second case as tokens that do not fit the model."""
    if number % 2:
        body = json.dumps({"model": "m", "prompt": [1] * 10_000}).encode()
        return status_of(port, body, JSON, STREAM, 400)
    return status_of(port, b" " * (BODY_MIB * 2**20 + 1), JSON, STREAM, 413)


def status_of(port: int, body: bytes, headers: dict, path: str, wanted: int) -> str:
    with contextlib.closing(connect(port)) as connection:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        told = json.loads(answer.read())
        right = answer.status == wanted and "message" in told["error"]
        return "right" if right else f"{answer.status} instead of {wanted}"


def vanish(port: int, number: int) -> str:
    """Begin a stream and go away, at once or after the first piece."""
    body = {"model": "m", "prompt": f"Go on, {number}:", "max_tokens": 300, "stream": True}
    connection = connect(port)
    connection.request("POST", STREAM, json.dumps(body), JSON)
    answer = connection.getresponse()
    if number % 2:
        answer.readline()
    answer.close()
    connection.close()
    return "went away"


def health(port: int) -> dict:
    with contextlib.closing(connect(port)) as connection:
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())["engine"]


def run(a, port: int, asks: list[dict], wanted: list[str]) -> dict:
    """Return the report of both ways."""
    few = [asks[i] for i in range(0, a.clients, max(1, a.clients // a.alone))][: a.alone]
    # Everything once, so that every program is compiled before the clock starts; prompts are cached
    # then, for both ways.
    together(a, port, asks)
    for ask in few:
        stream(port, ask)
    begin = time.perf_counter()
    alone = [stream(port, ask) for ask in few]
    seconds_alone = time.perf_counter() - begin
    settled(port)
    before = health(port)
    seconds, found, bad = together(a, port, asks)
    after = settled(port)
    rate = sum(one["tokens"] for one in found) / seconds
    rate_alone = sum(one["tokens"] for one in alone) / seconds_alone
    waits = sorted(one["first"] for one in found)
    parted = [
        {"client": i, "offline": text[at : at + 30], "stream": one["text"][at : at + 30], "at": at}
        for i, (one, text) in enumerate(zip(found, wanted))
        if one["text"] != text
        for at in [len(os.path.commonprefix([one["text"], text]))]
    ]
    return {
        "clients": a.clients,
        "slots": a.slots,
        "tokens": sum(one["tokens"] for one in found),
        "tokens_per_second": round(rate, 2),
        "tokens_per_second_alone": round(rate_alone, 2),
        "ratio": round(rate / rate_alone, 2),
        "first_piece_seconds": {
            "alone": round(statistics.median(one["first"] for one in alone), 2),
            "median": round(statistics.median(waits), 2),
            "worst": round(waits[-1], 2),
        },
        "whole_streams": sum(one["done"] for one in found),
        "equal_to_offline": a.clients - len(parted),
        "parted": parted,
        "bad_clients": bad,
        "cancelled": after["cancelled"] - before["cancelled"],
        "finished": after["finished"] - before["finished"],
        "reused_tokens": after["reused_tokens"] - before["reused_tokens"],
        "pages": after["pages"],
        "pages_held": after["pages_held"],
        "pages_cached": after["pages_cached"],
    }


def settled(port: int) -> dict:
    """Return the counters once nothing is under way, or after a minute as they are."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        now = health(port)
        if not (now["running"] or now["waiting"] or any(now["pages_held"].values())):
            break
        time.sleep(0.1)
    return now


def together(a, port: int, asks: list[dict]):
    """Return (seconds, answers, what bad clients met) of all clients at once."""
    sorts = {"malformed": malformed, "oversized": oversized, "vanishing": vanish}
    total = a.clients + sum(getattr(a, name) for name in sorts)
    start = threading.Barrier(total + 1)

    def at_once(function, *arguments):
        start.wait()
        return function(*arguments)

    with concurrent.futures.ThreadPoolExecutor(total) as pool:
        good = [pool.submit(at_once, stream, port, ask) for ask in asks]
        others = {
            name: [pool.submit(at_once, function, port, n) for n in range(getattr(a, name))]
            for name, function in sorts.items()
        }
        start.wait()
        begin = time.perf_counter()
        found = [one.result() for one in good]
        seconds = time.perf_counter() - begin
        met: dict[str, dict[str, int]] = {}
        for name, futures in others.items():
            results = [future.result() for future in futures]
            met[name] = {told: results.count(told) for told in sorted(set(results))}
    return seconds, found, met


def failed(a, report: dict) -> list[str]:
    """Return the checks that failed."""
    bad = report["bad_clients"]
    checks = {
        "every stream ended": report["whole_streams"] == a.clients,
        "every text is the offline one": report["equal_to_offline"] == a.clients,
        "malformed requests were told so": bad["malformed"].get("right", 0) == a.malformed,
        "oversized requests were told so": bad["oversized"].get("right", 0) == a.oversized,
        # One whose answer was short may have had all of it before it was missed.
        "vanished clients were cancelled": report["cancelled"] > 0 or not a.vanishing,
        "every request is accounted for": report["cancelled"] + report["finished"]
        == a.clients + a.vanishing,
        "no page is held": not any(report["pages_held"].values()),
        "the server ended with status 0": report["exit_status"] == 0,
        "the server held no page at its end": "0 pages held" in report["last_words"],
    }
    return [name for name, holds in checks.items() if not holds]


if __name__ == "__main__":
    sys.exit(main())
