"""What share of the peak does the TPU compiler grant its own large matrix products?

    python tests/benchmarks/matmul_share.py

Nothing runs: a bfloat16 product is compiled for each chip and the estimated cycles of its program are
read; the share is the cycles at the peak over those.  The first line of each chip is what
`jaxherd.planning.costs.SHARES` prices Pallas kernels by.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# M, K, N: Scout's experts, there and back, and its attention's projection.
SHAPES = ((8192, 5120, 8192), (8192, 8192, 5120), (8192, 5120, 5120))


def share(chip_name: str, rows: int, inner: int, columns: int) -> float:
    """Compile one product for one device of a chip and return the share."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxherd.core.chips import CHIPS
    from jaxherd.planning.hlo import parse_hlo
    from jaxherd.planning.mosaic import TOPOLOGIES

    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip_name]
    ).devices
    place = NamedSharding(Mesh(np.array(devices[:1]), ("one",)), PartitionSpec())

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    compiled = jax.jit(jnp.matmul).lower(array(rows, inner), array(inner, columns)).compile()
    module = parse_hlo(compiled.as_text())
    cycles = sum(line.estimated_cycles or 0 for line, _, _ in module.schedule())
    chip = CHIPS[chip_name]
    flops_per_cycle = chip.peak("bf16") / chip.devices_per_chip / chip.clock_hz
    return 2 * rows * inner * columns / flops_per_cycle / cycles


def main() -> None:
    """Print a table."""
    from jaxherd.planning.mosaic import TOPOLOGIES

    print("| chip | M, K, N | share of peak |")
    print("|---|---|---|")
    for chip in TOPOLOGIES:
        for shape in SHAPES:
            print(f"| {chip} | {', '.join(map(str, shape))} | {share(chip, *shape):.3f} |")


if __name__ == "__main__":
    main()
