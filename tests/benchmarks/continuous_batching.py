"""Throughput of the paged engine against the generator that serves one request at a time.

    python tests/benchmarks/continuous_batching.py [--requests 64] [--slots 32] [--alone 8]

Requests are prompts and answers of mixed lengths, drawn once.  Both sides have the same weights and
threads, decode greedily and have compiled everything before the clock starts (one warm-up round).
The engine serves all requests; the generator takes every n-th of them, `--alone` in all, since its
rate does not depend on how many wait.  They run by turns.  Prints one JSON object: new tokens per
second of each (median, and all runs), the ratio, where the engine's time goes in the last run, and
how many of the tokens that both chose agree.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--alone", type=int, default=8)
    parser.add_argument("--decode-steps", type=int, default=16)
    parser.add_argument("--page-size", type=int, default=None)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxherd.core.host_memory import keep_freed_memory

    keep_freed_memory()  # as `jaxherd run --on cpu` does

    import numpy as np

    import jaxherd
    from jaxherd.inference.generate import Generator, Request
    from jaxherd.inference.paged_engine import PagedEngine

    module = jaxherd.load(a.source, dtype=a.dtype)
    random = np.random.default_rng(a.seed)
    requests = [
        Request(
            tuple(random.integers(100, 20_000, random.integers(8, 129)).tolist()),
            int(random.integers(16, 129)),
        )
        for _ in range(a.requests)
    ]
    engine = PagedEngine(
        module, slots=a.slots, decode_steps=a.decode_steps, page_size=a.page_size,
        cache_tokens=320 * a.slots, max_length=320, reuse_prefixes=False,
    )  # fmt: skip
    generator = Generator(module)

    def together():
        """Return (seconds, tokens of each, seconds by part, calls by part)."""
        numbers = [engine.add(request) for request in requests]
        tokens = {number: [] for number in numbers}
        parts, calls = {"prefill": 0.0, "decode": 0.0}, {"prefill": 0, "decode": 0}

        def timed(name, function):
            def run(*args):
                at = time.perf_counter()
                result = function(*args)
                parts[name] += time.perf_counter() - at
                calls[name] += 1
                return result

            return run

        plain = engine._prefill, engine._decode
        engine._prefill, engine._decode = timed("prefill", plain[0]), timed("decode", plain[1])
        begin = time.perf_counter()
        while not engine.idle:
            for event in engine.step():
                tokens[event.id] += event.tokens
        seconds = time.perf_counter() - begin
        engine._prefill, engine._decode = plain
        engine.check()
        return seconds, [tokens[number] for number in numbers], parts, calls

    chosen = list(range(0, a.requests, max(1, a.requests // a.alone)))[: a.alone]

    def alone():
        begin = time.perf_counter()
        tokens = [generator.run([requests[i]])[0].tokens for i in chosen]
        return time.perf_counter() - begin, tokens

    begin = time.perf_counter()
    together()
    first = time.perf_counter() - begin
    # Longest first, so that every bucket is compiled.
    alone()
    # By turns, so that what else the machine does falls on both.
    rounds = [(together(), alone()) for _ in range(a.repeat)]
    rates = [(sum(map(len, x[1])) / x[0], sum(map(len, y[1])) / y[0]) for x, y in rounds]
    rate, rate_alone = (statistics.median(r[i] for r in rates) for i in (0, 1))
    (seconds, tokens, parts, calls), (_, tokens_alone) = rounds[-1]
    pairs = [(x, y) for i, row in zip(chosen, tokens_alone) for x, y in zip(tokens[i], row)]
    report = {
        "dtype": a.dtype,
        "threads": a.threads,
        "requests": a.requests,
        "slots": a.slots,
        "decode_steps": a.decode_steps,
        "page_size": engine.page_size,
        "new_tokens": sum(map(len, tokens)),
        "prompt_tokens": sum(len(request.tokens) for request in requests),
        "engine_tokens_per_second": round(rate, 2),
        "generator_tokens_per_second": round(rate_alone, 2),
        "ratio": round(rate / rate_alone, 2),
        "runs": [[round(x, 2) for x in pair] for pair in rates],
        "first_round_seconds_with_compile": round(first, 1),
        "engine_seconds": round(seconds, 2),
        "seconds_by_part": {name: round(value, 2) for name, value in parts.items()},
        "calls_by_part": calls,
        "equal_tokens": f"{sum(x == y for x, y in pairs)} of {len(pairs)}",
        "counters": dataclasses.asdict(engine.counters()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
