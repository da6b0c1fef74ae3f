"""Attention with a zero slot (MelodyFlow's), by splash and by XLA, on the TPU compiler's own account.

    python tests/benchmarks/kernels/zero_slot.py [--chips v5e v6e] [--only SUBSTRING ...] [--rows 4]

Every line is one attention of one layer, as `models/velocity_transformer.py` calls it: 752 frames that
see themselves (self) or a text (cross), and one zero key and value more; clips end in padding.  Both
sides are compiled by the same libtpu in this run; nothing runs.  All figures are per clip:

- kernel: cycles of splash's kernels, one for each bundle, all bundles of a kernel's code for each step
  of its grid (an upper bound: some regions are passed over);
- XLA: the compiler's estimated cycles of its own operations, of which it prices those that are bound
  by memory about twice too slow; operations that it does not price count by their bytes;
- HBM: the cycles that all bytes between operations and HBM take at the full bandwidth, with what
  splash's grid reads again;
- cycles: the larger of kernel + XLA and HBM; least: the same with no more of XLA than its products:
  whatever is between the two, no side takes less;
- temp MB: the program's temporary memory.
"""

import argparse
import os
import pathlib

# Read when the compiler is loaded.
os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)  # fmt: skip

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxherd.core.chips import CHIPS
from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels import AttentionMask, attention
from jaxherd.kernels.attention import splash
from jaxherd.planning import mosaic
from jaxherd.planning.costs import CostModel
from jaxherd.planning.hlo import Module, parse_hlo

FRAMES, HEAD = 752, 64
# Heads of the 400M and the 1B model; what is attended to: the frames, or texts of so many tokens.
HEADS = {"400M": 16, "1B": 24}
KEYS = {"self": FRAMES, "cross_32": 32, "cross_127": 127, "cross_255": 255}
HERE = f"{pathlib.Path(__file__).resolve()}:case"


def case(by: str, heads: int, keys: int, rows: int, backward: bool):
    """Return (function, shapes) of one program, for the child process."""

    def call(q, k, v, seen_q, seen_k):
        behind = ((0, 0), (0, 1), (0, 0), (0, 0))
        k, v = jnp.pad(k, behind), jnp.pad(v, behind)
        seen_k = jnp.pad(seen_k, ((0, 0), (0, 1)), constant_values=1)
        mask = AttentionMask(
            jnp.where(seen_q > 0, jnp.arange(FRAMES), -1),
            jnp.where(seen_k > 0, jnp.arange(keys + 1), -1),
            kind="bidirectional",
        )
        return attention(q, k, v, mask=mask, implementation=by)

    def gradients(q, k, v, dy, seen_q, seen_k):
        out, back = jax.vjp(lambda q, k, v: call(q, k, v, seen_q, seen_k), q, k, v)
        return out, *back(dy)

    def own(q, k, v, *rest):
        *dy, seen = rest
        return (gradients if backward else call)(q, k, v, *dy, seen, seen)

    wide = ((rows, FRAMES, heads, HEAD), "bfloat16")
    narrow = ((rows, keys, heads, HEAD), "bfloat16")
    ids = [((rows, FRAMES), "int32")] + ([((rows, keys), "int32")] if keys != FRAMES else [])
    shapes = [wide, narrow, narrow, *([wide] if backward else []), *ids]
    if keys == FRAMES:
        return own, shapes
    return (gradients if backward else call), shapes


def compiled(chip: str, arguments: dict) -> tuple[Module, float]:
    """Return (the scheduled program, its temporary bytes)."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=mosaic.TOPOLOGIES[chip]
    ).devices
    partitioner = Partitioner.create(Layout("one"), devices[:1])
    function, shapes = case(**arguments)

    def run(*arrays):
        with partitioner.activate():
            return function(*arrays)

    inputs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.replicated())
        for shape, dtype in shapes
    ]
    program = jax.jit(run).lower(*inputs).compile()
    return parse_hlo(program.as_text()), program.memory_analysis().temp_size_in_bytes


def measure(chip: str, by: str, heads: int, keys: int, rows: int, backward: bool) -> dict:
    """Return the figures of one program, per clip."""
    arguments = {"by": by, "heads": heads, "keys": keys, "rows": rows, "backward": backward}
    module, temporary = compiled(chip, arguments)
    device = CHIPS[chip]
    prices = CostModel(module, device)
    plain = products = moved = 0.0
    for instruction, computation, times in module.schedule():
        cost = prices.cost(instruction, computation)
        moved += times * cost.hbm_bytes
        if not cost.kernel:
            plain += times * cost.seconds * device.clock_hz
            products += times * cost.matmul_seconds * device.clock_hz
    kernel = 0.0
    if by == "splash":
        code, _ = mosaic.look(chip, HERE, arguments)
        block_q, block_kv = splash.block_size(FRAMES), splash.block_size(keys + 1)
        steps_q, steps_kv = -(-FRAMES // block_q), -(-(keys + 1) // block_kv)
        kernel = float(sum(x.bundles for x in code) * heads * rows * steps_q * steps_kv)
        # Lanes of 128 in memory; keys and values again for each further block of queries.
        moved += heads * rows * (steps_q - 1) * steps_kv * block_kv * 128 * 2 * 2 * len(code)
    hbm = moved / (device.hbm_bytes_per_s / device.devices_per_chip) * device.clock_hz
    found = {
        "kernel": kernel, "xla": plain, "hbm": hbm, "cycles": max(kernel + plain, hbm),
        "least": max(kernel + products, hbm), "temp": temporary / 1e6,
    }  # fmt: skip
    return {name: value / rows for name, value in found.items()}


def main() -> None:
    """Compile both sides of every line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"], choices=["v5e", "v5p", "v6e"])
    parser.add_argument("--only", nargs="+", default=[""], help="lines that hold one of these")
    parser.add_argument("--rows", type=int, default=4, help="clips of the batch")
    chosen = parser.parse_args()
    import libtpu

    print(f"libtpu {libtpu.__version__}, jax {jax.__version__}; estimates for one device, a clip\n")
    print(
        "| chip | attention | by | kernel | XLA | HBM | cycles | ratio | least | ratio | temp MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for chip in chosen.chips:
        for model, heads in HEADS.items():
            for product, keys in KEYS.items():
                for backward in (False, True):
                    label = f"{model} {product}" + (", gradients" if backward else "")
                    if not any(part in label for part in chosen.only):
                        continue
                    lines(chip, label, heads, keys, chosen.rows, backward)


def lines(chip, label, heads, keys, rows, backward) -> None:
    """Print both sides of one attention."""
    base: dict = {}
    for by in ("xla", "splash"):
        try:
            row = measure(chip, by, heads, keys, rows, backward)
        except JaxherdError as error:
            print(f"| {chip} | {label} | {by} | {str(error)[-120:]} | | | | | | | |", flush=True)
            continue
        base = base or row
        print(
            f"| {chip} | {label} | {by} | {row['kernel']:,.0f} | {row['xla']:,.0f} "
            f"| {row['hbm']:,.0f} | {row['cycles']:,.0f} | {row['cycles'] / base['cycles']:.2f} "
            f"| {row['least']:,.0f} | {row['least'] / base['least']:.2f} | {row['temp']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
