"""Training speed of jaxherd and of transformers on torch, on the same weights and tokens.

    python tests/benchmarks/train_vs_transformers.py --oracle PYTHON [--model smollm2|scout]
        [--dtype float32] [--repeat 5]

`--oracle` is an interpreter with torch and transformers.  Both sides start from the same weights
(drawn here, saved as a Hugging Face folder), see the same tokens, use AdamW with global clipping
and the same number of threads, and step by turns.  Prints one JSON object: tokens per second
(median and all runs), the ratio, and the losses of both sides, which must agree.
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
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
print("ready", flush=True)
for line in sys.stdin:
    tokens = torch.tensor(json.loads(line))
    begin = time.perf_counter()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    value = loss.item()
    print(json.dumps([time.perf_counter() - begin, value]), flush=True)
"""


def model_config(name: str):
    """Return the config: SmolLM2-135M, or a Scout of four layers and 16 experts."""
    from jaxherd.models import presets

    if name == "smollm2":
        return presets.smollm2_135m()
    return presets.llama4_text(
        vocab_size=4096,
        embed_dim=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        expert_dim=512,
        dense_dim=1024,
        chunk_size=64,
        max_length=1024,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--oracle", default=os.environ.get("JAXHERD_ORACLE_PYTHON", sys.executable))
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "scout"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    a = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxherd.core.host_memory import keep_freed_memory

    keep_freed_memory()  # as `jaxherd run --on cpu` does

    import jax
    import numpy as np

    import jaxherd
    from jaxherd.core.layouts import Layout
    from jaxherd.core.modules import split
    from jaxherd.core.sharding import Partitioner
    from jaxherd.data.packing import row_spec
    from jaxherd.training.objectives import NextToken
    from jaxherd.training.optimizers import Optimizer, Schedule
    from jaxherd.training.step import Program, StepConfig

    config = model_config(a.model)
    module = jax.jit(config.build)(jax.random.key(0))
    partitioner = Partitioner.create(Layout("single"), jax.devices()[:1])
    spec = row_spec(a.batch, a.length)
    program = Program(
        config,
        NextToken(),
        Optimizer(schedule=Schedule(peak=1e-4, kind="constant", warmup_steps=0)),
        partitioner,
        total_steps=1000,
        config=StepConfig(compute_dtype=a.dtype),
        batch_shardings={n: partitioner.sharding(f.axes) for n, f in spec.items()},
    )
    state = program.init(0, split(module)[1])
    rng = np.random.default_rng(0)

    def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0
        positions = np.broadcast_to(np.arange(a.length, dtype=np.int32), tokens.shape)
        ones = np.ones(tokens.shape, np.int32)
        return {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=1),
            "loss_weights": weights,
            "positions": positions,
            "segment_ids": ones,
            "target_bytes": ones,
        }

    def ours(tokens: np.ndarray) -> tuple[float, float]:
        nonlocal state
        begin = time.perf_counter()
        state, sums = program.step(state, batch_of(tokens), None)
        total, weight = (float(x) for x in sums["nll"])
        jax.block_until_ready(state)
        return time.perf_counter() - begin, total / weight

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        jaxherd.save(module, folder, format="hf")
        command = [a.oracle, "-c", ORACLE, str(folder), a.dtype, str(a.threads)]
        oracle = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert oracle.stdin is not None and oracle.stdout is not None
        while oracle.stdout.readline().strip() != "ready":
            if oracle.poll() is not None:
                raise SystemExit("the oracle did not start")

        def theirs(tokens: np.ndarray) -> tuple[float, float]:
            print(json.dumps(tokens.tolist()), file=oracle.stdin, flush=True)
            seconds, loss = json.loads(oracle.stdout.readline())
            return seconds, loss

        runs = []
        for _ in range(a.repeat + 1):
            tokens = rng.integers(0, config.vocab_size, (a.batch, a.length), dtype=np.int32)
            runs.append((ours(tokens), theirs(tokens)))
        oracle.stdin.close()
        oracle.wait()
    count = a.batch * a.length
    rates = [[count / side[0] for side in pair] for pair in runs[1:]]
    mine, other = (statistics.median(r[i] for r in rates) for i in (0, 1))
    report = {
        "model": a.model,
        "dtype": a.dtype,
        "threads": a.threads,
        "batch": [a.batch, a.length],
        "jaxherd_tokens_per_second": round(mine, 1),
        "transformers_tokens_per_second": round(other, 1),
        "ratio": round(mine / other, 3),
        "median_of_ratios": round(statistics.median(x / y for x, y in rates), 3),
        "losses": [[round(side[1], 4) for side in pair] for pair in runs],
        "runs": [[round(x, 1) for x in pair] for pair in rates],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
