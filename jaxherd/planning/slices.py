"""The table of slices in `tpu/slices.md`, made from the chip table.

python -m jaxherd.planning.slices > tpu/slices.md
"""

from jaxherd.core.targets import CHIPS, known_targets, parse_target

_HEADER = """# Slices

Made by `python -m jaxherd.planning.slices` from `jaxherd/core/chips.py`, where each figure's source
is. Peak and bandwidth are the data sheet's; HBM is what the compiler lets a program use.

"""


def slices_markdown(max_chips: int = 1024) -> str:
    """Return the chips and the slices up to `max_chips` chips as Markdown tables."""
    lines = [_HEADER + "## Chips", ""]
    lines.append(
        "| chip | HBM GiB | bf16 TFLOP/s | int8 | fp8 | HBM GB/s | links x GB/s one way | "
        "JAX devices | TensorCores | SparseCores |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for chip in CHIPS.values():
        if chip.kind == "cpu":
            continue
        peaks = " | ".join(f"{chip.peak(dtype) / 1e12:.0f}" for dtype in ("bf16", "int8", "fp8"))
        lines.append(
            f"| {chip.name} | {chip.hbm_gib:.2f} | {peaks} | {chip.hbm_bytes_per_s / 1e9:.0f} | "
            f"{chip.ici_links} x {chip.ici_bytes_per_s_per_link / 1e9:.0f} | "
            f"{chip.devices_per_chip} | {chip.tensor_cores} | {chip.sparse_cores} |"
        )
    lines += ["", "## TPU slices", ""]
    lines.append("| name | accelerator type | chips | devices | workers | HBM GiB | bf16 PFLOP/s |")
    lines.append("|---|---|---|---|---|---|---|")
    for family in ("v5e", "v6e", "v5p", "tpu7x"):
        for name in known_targets(family, max_chips):
            target = parse_target(name)
            kind = target.accelerator_type if target.default_topology else "by topology"
            lines.append(
                f"| {name} | {kind} | {target.chips} | {target.devices} | {target.hosts} | "
                f"{target.chips * target.chip.hbm_gib:.0f} | "
                f"{target.chips * target.chip.peak('bf16') / 1e15:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(slices_markdown(), end="")
