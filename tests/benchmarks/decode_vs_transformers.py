"""Decoding speed of jaxherd and of transformers' `generate` with its cache, on the same weights.

    python tests/benchmarks/decode_vs_transformers.py --oracle PYTHON [--dtype float32] [--repeat 5]

`--oracle` is an interpreter with torch and transformers.  Both sides load the same weights (saved
from the SmolLM2-135M alias), take the same prompt, decode greedily with the same number of
threads, and run by turns, so that what else the machine does falls on both.  Prints one JSON
object: tokens per second (median, and all runs), the ratio, and whether the tokens agree.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ORACLE = """
import json, sys, time, torch, transformers
folder, dtype, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(threads)
dtype = getattr(torch, dtype)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
print("ready", flush=True)
for line in sys.stdin:
    prompt, new = json.loads(line)
    ids = torch.tensor([prompt])
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                             min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)
    seconds = time.perf_counter() - begin
    print(json.dumps([seconds, out[0, len(prompt):].tolist()]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--oracle", default=os.environ.get("JAXHERD_ORACLE_PYTHON", sys.executable))
    parser.add_argument("--source", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    a = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxherd.core.host_memory import keep_freed_memory

    keep_freed_memory()  # as `jaxherd run --on cpu` does

    import jaxherd
    from jaxherd.inference.generate import Generator, Request

    module = jaxherd.load(a.source, dtype=a.dtype)
    prompt = [(37 * i + 11) % 1000 + 100 for i in range(a.prompt_tokens)]
    request = Request(tuple(prompt), a.new_tokens)
    generator = Generator(module)

    def ours() -> tuple[float, list[int]]:
        begin = time.perf_counter()
        tokens = generator.run([request])[0].tokens
        return time.perf_counter() - begin, tokens

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        jaxherd.save(module, folder, format="hf")
        command = [a.oracle, "-c", ORACLE, str(folder), a.dtype, str(a.threads)]
        oracle = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert oracle.stdin is not None and oracle.stdout is not None
        while oracle.stdout.readline().strip() != "ready":
            if oracle.poll() is not None:
                raise SystemExit("the oracle did not start")

        def theirs() -> tuple[float, list[int]]:
            print(json.dumps([prompt, a.new_tokens]), file=oracle.stdin, flush=True)
            seconds, tokens = json.loads(oracle.stdout.readline())
            return seconds, tokens

        begin = time.perf_counter()
        ours()
        first = time.perf_counter() - begin
        theirs()
        runs = [(ours(), theirs()) for _ in range(a.repeat)]
        oracle.stdin.close()
        oracle.wait()
    rates = [[a.new_tokens / side[0] for side in pair] for pair in runs]
    mine, other = (statistics.median(r[i] for r in rates) for i in (0, 1))
    same = sum(x == y for x, y in zip(runs[-1][0][1], runs[-1][1][1]))
    report = {
        "dtype": a.dtype,
        "threads": a.threads,
        "prompt_tokens": a.prompt_tokens,
        "new_tokens": a.new_tokens,
        "jaxherd_tokens_per_second": round(mine, 2),
        "transformers_tokens_per_second": round(other, 2),
        "ratio": round(mine / other, 3),
        "median_of_ratios": round(statistics.median(x / y for x, y in rates), 3),
        "first_call_seconds_with_compile": round(first, 2),
        "equal_tokens": same,
        "runs": [[round(x, 2) for x in pair] for pair in rates],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
