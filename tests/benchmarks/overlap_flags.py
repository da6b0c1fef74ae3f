"""What hides the gathers of an FSDP scan?  Compile it with every option set, per generation.

    python tests/benchmarks/overlap_flags.py [--targets v5e:4x4 v5p:4x4x4 ...] [--markdown]

Nothing runs: each line is the TPU compiler's schedule read by `jaxherd.planning`.  The program is a
scan over two-matrix MLP layers with remat, forward and backward, weights sharded over all chips.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def build(target, layers: int, width: int, hidden: int, tokens_per_device: int):
    """Return (jitted step, abstract arguments, mesh, model FLOPs, tokens)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxherd.core.targets import abstract_devices

    devices = np.array(abstract_devices(target)).reshape(1, -1)
    mesh = Mesh(devices, ("data", "fsdp"))

    def place(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def layer(x_TD, weights):
        up_DF, down_FD = (jax.lax.with_sharding_constraint(w, place()) for w in weights)
        return x_TD + jax.nn.silu(x_TD @ up_DF) @ down_FD, None

    def loss(weights, x_TD):
        y_TD, _ = jax.lax.scan(jax.checkpoint(layer), x_TD, weights)
        return jnp.mean(y_TD.astype(jnp.float32) ** 2)

    def step(weights, x_TD):
        value, gradients = jax.value_and_grad(loss)(weights, x_TD)
        return jax.tree.map(lambda w, g: w - (0.1 * g).astype(w.dtype), weights, gradients), value

    # Sharded on the first matrix dimension: gathers on a minor one become all-reduces.
    up = jax.ShapeDtypeStruct((layers, width, hidden), jnp.bfloat16, sharding=place(None, "fsdp"))
    down = jax.ShapeDtypeStruct((layers, hidden, width), jnp.bfloat16, sharding=place(None, "fsdp"))
    tokens = tokens_per_device * target.devices
    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16, sharding=place(("data", "fsdp")))
    outputs = ((up.sharding, down.sharding), None)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=outputs)
    flops = 6.0 * layers * 2 * width * hidden * tokens
    return jitted, ((up, down), x), mesh, flops, tokens


def main() -> None:
    """Compile every set and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--targets", nargs="+", default=["v5e:4x4", "v5p:4x4x4", "v6e:4x4", "tpu7x:4x4x4"]
    )
    parser.add_argument("--sets", nargs="+", default=None)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=8192, help="per device")
    arguments = parser.parse_args()

    from jaxherd.core.targets import parse_target
    from jaxherd.planning.compile import compile_plan
    from jaxherd.planning.flags import FLAG_SETS, options_for

    print(
        "| slice | options | step (estimate) | on links | exposed | non-matmul | HBM GiB | compile |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.targets:
        target = parse_target(name)
        for flags in FLAG_SETS.values():
            if target.family not in flags.families:
                continue
            if arguments.sets and flags.name not in arguments.sets:
                continue
            jitted, args, mesh, flops, tokens = build(
                target, arguments.layers, arguments.width, arguments.hidden, arguments.tokens
            )
            plan = compile_plan(
                jitted,
                args,
                target=target,
                mesh=mesh,
                flops_per_step=flops,
                tokens_per_step=tokens,
                experiment=f"fsdp-scan/{flags.name}",
                compiler_options=options_for(target, flags.name),
            )
            print(
                f"| {target.name} | {flags.name} | {1e3 * plan.estimated_step_seconds:.2f} ms "
                f"| {1e3 * plan.collective_seconds:.2f} ms "
                f"| {100 * (plan.exposed_collective_share or 0):.0f}% "
                f"| {100 * (plan.non_matmul_share or 0):.0f}% "
                f"| {plan.hbm_gib_per_chip:.2f} | {plan.compile_seconds:.0f} s |",
                flush=True,
            )
            for row in plan.collectives:
                print(
                    f"  <!-- {row.op} {row.axes} n={row.group_size} x{row.count:g} "
                    f"{1e3 * row.seconds:.2f} ms exposed {1e3 * row.exposed_seconds:.2f} ms "
                    f"{'async ' + row.unit if row.asynchronous else 'sync'} -->",
                    flush=True,
                )


if __name__ == "__main__":
    main()
