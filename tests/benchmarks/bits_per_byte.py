"""Bits per byte of a causal language model on held-out text.

    python tests/benchmarks/bits_per_byte.py [SOURCE] [--corpus python+shakespeare] [--batches 24]

The held-out part is that of the recipes, tokenised by the model's own tokenizer in rows of 512
tokens.  Prints one JSON object.
"""

import argparse
import json
from typing import Any


def measure(module: Any, source: str, corpus: str, batches: int) -> dict[str, Any]:
    """Return what a model loses on held-out text, by token and by byte."""
    import jax

    from jaxherd.data.packed_text import PackedText, TokenizerFile
    from jaxherd.training import metrics
    from jaxherd.training.objectives import NextToken
    from jaxherd.weights.load import resolve_model

    data = PackedText(
        corpus=corpus,
        tokenizer_config=TokenizerFile(str(resolve_model(source))),
        sequence_length=512,
        batch_size=4,
        max_eval_batches=batches,
    )
    objective = NextToken()
    step = jax.jit(lambda m, b: objective(m, b, jax.random.key(0))[1])
    total = None
    for batch in data.build(split="heldout", seed=0):
        sums = step(module, batch)
        total = sums if total is None else metrics.add(total, sums)
    assert total is not None
    found = {name: float(value) for name, value in metrics.means(jax.device_get(total)).items()}
    return {
        "tokens": float(total["nll"][1]),
        "bits_per_byte": round(found["bits_per_byte"], 4),
        "nats_per_token": round(found["nll"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--corpus", default="python+shakespeare")
    parser.add_argument("--batches", type=int, default=24)
    a = parser.parse_args()

    from jaxherd.cli import common

    common.local_devices("cpu")
    import jaxherd

    found = measure(jaxherd.load(a.source), a.source, a.corpus, a.batches)
    print(json.dumps({"source": a.source, "corpus": a.corpus, **found}))


if __name__ == "__main__":
    main()
