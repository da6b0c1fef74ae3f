"""Bytes and held-out loss of one model with its weights kept in several ways.

    python tests/benchmarks/quantised_model.py [SOURCE] [--corpus python+shakespeare] [--batches 4]

Rows of 512 tokens of the recipes' held-out part, four a batch.  Everything is computed in float32 on
the CPU, also for "bfloat16", whose weights are rounded to it: what differs is the weights alone.
Prints a Markdown table; the loss is in nats a token, and its difference to that of the source's own
numbers.
"""

import argparse

from bits_per_byte import measure

WAYS = ("float32", "bfloat16", "as_stored", "int8", "int8_group32", "int4_group32", "int4")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--corpus", default="python+shakespeare")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    a = parser.parse_args()

    from jaxherd.cli import common

    common.local_devices("cpu")
    import jax.numpy as jnp

    import jaxherd
    from jaxherd.core.modules import cast_floating
    from jaxherd.models.quantise import bytes_by_dtype

    print("| weights | MB | held by | nats a token | against float32 | bits a byte |")
    print("|---|---|---|---|---|---|")
    first = None
    for way in a.only:
        if way in ("float32", "bfloat16"):
            module = jaxherd.load(a.source, dtype=way)
        else:
            module = jaxherd.load(a.source, quantise=way)
        sizes = bytes_by_dtype(module)
        held = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items())
        found = measure(cast_floating(module, jnp.float32), a.source, a.corpus, a.batches)
        loss = found["nats_per_token"]
        first = loss if first is None else first
        print(
            f"| {way} | {sum(sizes.values()) / 1e6:.1f} | {held} | {loss:.4f} | {loss - first:+.4f} | "
            f"{found['bits_per_byte']:.4f} |",
            flush=True,
        )
    print(f"\n{found['tokens']:.0f} tokens of {a.corpus}")


if __name__ == "__main__":
    main()
