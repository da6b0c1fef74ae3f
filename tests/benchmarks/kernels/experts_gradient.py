"""What do the gradients of a layer of experts cost under remat?

    python tests/benchmarks/kernels/experts_gradient.py [--chips v5p v6e] [--shape 16384,5120,8192,1]

Nothing runs: the gradients of silu(x gate) * (x up) down are compiled for one device of each chip, and
XLA's account of the program is printed; of Pallas kernels it is what they state.  Shape: M, K, N, G;
by default one of Scout's experts with the receive buffer of an uneven load, all rows counted.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from jaxherd.kernels import grouped_matmul, grouped_swiglu
from jaxherd.planning.mosaic import compile_in_child

DEFAULT = "16384,5120,8192,1"


def case(M, K, N, G):
    """Return (gradients, shapes), for the child process."""

    @jax.checkpoint
    def experts(x, gate, up, down, sizes):
        hidden = grouped_swiglu(x, gate, up, sizes, implementation="pallas_tpu")
        return grouped_matmul(hidden, down, sizes, implementation="pallas_tpu")

    def loss(*arguments):
        return (experts(*arguments).astype(jnp.float32) ** 2).sum()

    shapes = ((M, K), (G, K, N), (G, K, N), (G, N, K))
    return jax.grad(loss, (0, 1, 2, 3)), [*((s, "bfloat16") for s in shapes), ((G,), "int32")]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e"])
    parser.add_argument("--shape", default=DEFAULT, help="M,K,N,G")
    arguments = parser.parse_args()
    shape = dict(zip("MKNG", map(int, arguments.shape.split(","))))
    print(json.dumps(shape))
    print("| chip | products | TFLOP | GB | temporaries GB |")
    print("|---|---|---|---|---|")
    for chip in arguments.chips:
        found = compile_in_child(chip, f"{__file__}:case", shape, "", 540)
        one = 2 * shape["M"] * shape["K"] * shape["N"]
        print(
            f"| {chip} | {found['flops'] / one:.1f} | {found['flops'] / 1e12:.2f} | "
            f"{found['bytes'] / 1e9:.1f} | {found['temp_bytes'] / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main()
