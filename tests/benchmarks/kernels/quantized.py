"""Quantised products: our kernels, XLA's forms and bf16, by the TPU compiler's own account.

    python tests/benchmarks/kernels/quantized.py [--chips v5e v6e] [--only NAME ...] [--markdown]

Every row is compiled by the same libtpu in this run.  Columns: `compute`, the compiler's estimated
cycles of all operations of the program (they price instructions, hardly memory); `MB`, the HBM bytes
(of our kernels from their blocks; of XLA's programs operands and results once and temporaries twice); `floor`, the cycles which those bytes take at full bandwidth;
`cycles`, the larger of the two; the ratios are to XLA's bf16 product.  Our kernel is given rounded
activations: the profile takes minutes over the pass that rounds 4096 x 4096 of them.
Estimates of a compiler, not measurements.  `compare.py quantized` gives the kernels' bundles.
"""

import argparse
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError
from jaxherd.core.platform import chip
from jaxherd.kernels import quantized_matmul
from jaxherd.kernels.quantized_matmul import pallas_tpu
from jaxherd.kernels.quantized_matmul.arg_specs import ARG_SPECS

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
SPECS = (
    "int8_int8_4096", "int8_int8_decode_16", "int4_int8_decode_16", "scout_int4_up_decode_16",
    "scout_int4_down_decode_1", "pro_channel_up_decode_8", "pro_g32_up_decode_1",
    "maverick_fp8_up_decode_64", "maverick_fp8_down_decode_64",
)  # fmt: skip
CONTESTANTS = ("bf16", "xla", "qwix", "ours")


def case(name: str, contestant: str):
    """One program: (function, abstract arguments)."""
    spec = ARG_SPECS[name]
    x, w = spec.abstract()
    shapes = [(x.shape, x.dtype.name)]
    if contestant == "bf16":

        def dense(x, w):
            return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)

        return dense, [*shapes, (w.shape, "bfloat16")]
    leaves, tree = jax.tree.flatten(w)
    if contestant == "ours" and spec.activations is not None:
        shapes = [(x.shape, spec.activations), ((spec.rows, 1), "float32")]

        def product_of_codes(codes, scales, *leaves):
            matrix = jax.tree.unflatten(tree, leaves)
            return pallas_tpu.matmul(codes, matrix, scales, chip=chip(), out_dtype=x.dtype)

        return product_of_codes, shapes + [(leaf.shape, leaf.dtype.name) for leaf in leaves]
    shapes += [(leaf.shape, leaf.dtype.name) for leaf in leaves]

    def call(x, *leaves):
        matrix = jax.tree.unflatten(tree, leaves)
        if contestant == "qwix":
            return _qwix(x, matrix, spec.activations)
        return quantized_matmul(
            x, matrix, activations=spec.activations,
            implementation={"ours": "pallas_tpu", "xla": "xla"}[contestant],
        )  # fmt: skip

    return call, shapes


def _qwix(x, w, activations):
    import qwix

    from jaxherd.kernels.quantized_matmul.formats import to_qwix

    if activations is not None:
        x = qwix.quantize(x, jnp.dtype(activations), channelwise_axes=[0])
    return qwix.dot_general(x, to_qwix(w), (((1,), (0,)), ((), ()))).astype(jnp.bfloat16)


def moved_bytes(name: str, on: str) -> float:
    """What our kernel moves by its blocks."""
    spec = ARG_SPECS[name]
    x, w = spec.abstract()
    out = jax.ShapeDtypeStruct((spec.rows, spec.columns), x.dtype)
    if spec.activations is not None:
        x = jax.ShapeDtypeStruct(x.shape, jnp.dtype(spec.activations))
    form = pallas_tpu.form_of(x, w, chip=on, activations=spec.activations)
    return pallas_tpu.hbm_bytes(x, w, form, out)


def entries(shape, on):
    """The lines of `compare.py quantized`; the shapes are those of `arg_specs.py`."""
    from compare import Entry

    del shape
    found = []
    for name in SPECS:
        spec = ARG_SPECS[name]
        x, w = spec.abstract()
        t = pallas_tpu.form_of(x, w, chip=on, activations=spec.activations).tiles
        total = spec.rows * spec.inner * spec.columns
        once = w.nbytes + 2 * spec.rows * (spec.inner + spec.columns)
        found.append(Entry(
            name, {"name": name, "contestant": "ours"}, ("quantized_matmul",), (t.m * t.k * t.n,),
            total, moved_bytes(name, on), once, dtype="int8" if spec.activations else "bf16",
        ))  # fmt: skip
    return found


def _short(error: str) -> str:
    """What the child said after the case's name."""
    return " ".join(error.split("did not compile", 1)[-1].split())[:90]


def rows(chips, names, contestants):
    from jaxherd.planning.cycles import estimate

    here = f"{pathlib.Path(__file__).resolve()}:case"
    for on in chips:
        for name in names:
            base = None
            for contestant in contestants:
                moved = moved_bytes(name, on) if contestant == "ours" else None
                arguments = {"name": name, "contestant": contestant}
                try:
                    found = estimate(on, here, arguments, moved=moved)
                except JaxherdError as error:
                    yield on, name, contestant, _short(str(error))
                    continue
                base = base or found
                yield on, name, contestant, (found, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=["v5e"], choices=CHIPS)
    parser.add_argument("--only", nargs="+", default=SPECS, choices=list(ARG_SPECS))
    parser.add_argument("--by", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--markdown", action="store_true")
    chosen = parser.parse_args()
    line = functools.partial(print, flush=True)
    separator = " | " if chosen.markdown else "  "
    header = ("chip", "product", "by", "compute", "MB", "floor", "cycles", "ratio", "bytes ratio")
    import libtpu

    line(f"libtpu {libtpu.__version__}, jax {jax.__version__}; estimated cycles of one device")
    line(separator.join(header))
    if chosen.markdown:
        line(" | ".join("---" for _ in header))
    for on, name, contestant, result in rows(chosen.chips, chosen.only, chosen.by):
        if isinstance(result, str):
            line(separator.join((on, name, contestant, f"not priced: {result}")))
            continue
        found, base = result
        # A program whose matrix product is priced at nothing has only its floor to show.
        compute = f"{found.compute:,}" if found.compute > 0 else "not priced"
        line(separator.join((
            on, name, contestant, compute, f"{found.bytes / 1e6:.1f}", f"{found.floor:,.0f}",
            f"{found.cycles:,.0f}", f"{found.cycles / base.cycles:.2f}",
            f"{found.bytes / base.bytes:.2f}",
        )))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
