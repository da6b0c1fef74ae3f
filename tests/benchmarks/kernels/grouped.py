"""grouped_matmul and grouped_swiglu beside megablox, `jax.lax.ragged_dot` and tokamax.

Shape: M,K,N,G; 8192,5120,8192,16 (Scout's experts in training) by default.  See compare.py.
"""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from jaxherd.kernels import QuantizedMatrix
from jaxherd.kernels.grouped_matmul import pallas_tpu
from jaxherd.kernels.grouped_matmul.schedule import most_visits
from jaxherd.kernels.grouped_matmul.tiles import gradient_tiles, limits_of
from jaxherd.planning import mosaic

DEFAULT = (8192, 5120, 8192, 16)
_BYTES = {"int8": 1.0, "packed_int4": 0.5, "int4": 0.5, "float8_e4m3fn": 1.0}


def case(what, M, K, N, G, chip, code=None, group=None):
    """Return (function, shapes) of one line, for the child process."""
    limits, half = limits_of(chip), jnp.bfloat16
    x, sizes, score = ((M, K), "bfloat16"), ((G,), "int32"), ((M,), "float32")
    dy, y = ((M, N), "bfloat16"), ((G, K, N), "bfloat16")

    def weights(arrays):
        if code is None:
            return tuple(arrays)
        packed = code == "packed_int4"
        return tuple(
            QuantizedMatrix(v, s, packed=packed) for v, s in zip(arrays[::2], arrays[1::2])
        )

    w = [y]
    if code is not None:
        stored = (G, K // 2, N) if code == "packed_int4" else (G, K, N)
        kind = "int8" if code == "packed_int4" else code
        w = [(stored, kind), ((G, K // (group or K), N), "float32")]

    if what == "ours":
        return (lambda x, s, *w: pallas_tpu._product(x, *weights(w), s, limits, False)), [
            x,
            sizes,
            *w,
        ]
    if what == "ours dx":
        call = lambda dy, s, w: pallas_tpu._product(dy, w, s, limits, False, transposed=True)  # noqa: E731
        return call, [dy, sizes, y]
    if what == "ours dw":
        like = jax.ShapeDtypeStruct((G, K, N), half)
        call = lambda x, dy, s: pallas_tpu._weight_gradient(x, dy, s, like, limits, False)  # noqa: E731
        return call, [x, dy, sizes]
    if what == "ours swiglu products":

        def products(x, sizes, score, gate, up):
            return pallas_tpu._gated(x, (gate, up), sizes, score, limits, False, None, True)

        return products, [x, sizes, score, *w, *w]
    if what == "ours swiglu":

        def swiglu(x, sizes, score, *arrays):
            gate, up = weights(arrays)
            return pallas_tpu.grouped_swiglu(x, gate, up, sizes, score, limits, False)

        return swiglu, [x, sizes, score, *w, *w]

    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    tiling = megablox_tiling(M, K, N)
    if what == "megablox gmm":
        return (lambda x, s, w: gmm(x, w, s, half, tiling)), [x, sizes, y]
    if what == "megablox gmm dx":
        tiling = megablox_tiling(M, N, K)
        return (lambda dy, s, w: gmm(dy, w, s, half, tiling, transpose_rhs=True)), [dy, sizes, y]
    if what == "megablox tgmm":
        call = lambda x, dy, s: tgmm(  # noqa: E731
            x.swapaxes(0, 1), dy, s, half, tiling, num_actual_groups=G
        )
        return call, [x, dy, sizes]
    if what == "megablox swiglu":

        def two(x, s, score, gate, up):
            u = x * score[:, None].astype(x.dtype)
            return jax.nn.silu(gmm(u, gate, s, half, tiling)) * gmm(u, up, s, half, tiling)

        return two, [x, sizes, score, y, y]
    if what == "ragged_dot":
        return (lambda x, s, w: jax.lax.ragged_dot(x, w, s)), [x, sizes, y]
    if what.startswith("tokamax"):
        return _on(chip, _tokamax(what, tiling, M, K, N)), {
            "tokamax gmm": [x, sizes, y],
            "tokamax gmm dx": [dy, sizes, y],
            "tokamax tgmm": [x, dy, sizes],
        }[what]
    raise ValueError(what)


def _on(chip, function):
    """Return it traced as if the chip were the default device: tokamax asks which one that is."""

    def traced(*arguments):
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=mosaic.TOPOLOGIES[chip]
        ).devices
        with jax.default_device(devices[0]):
            return function(*arguments)

    return traced


def _tokamax(what, tiling, M, K, N):
    """Return its kernels under megablox's tiles; its public function asks for a TPU at hand."""
    from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as kernels

    precision, half = jax.lax.DotAlgorithmPreset.BF16_BF16_F32, jnp.bfloat16
    if what == "tokamax gmm":
        return lambda x, s, w: kernels.gmm(x, w, s, precision, half, tiling)
    if what == "tokamax gmm dx":
        tiling = megablox_tiling(M, N, K)
        return lambda dy, s, w: kernels.gmm(dy, w, s, precision, half, tiling, transpose_rhs=True)
    return lambda x, dy, s: kernels.tgmm(x.swapaxes(0, 1), dy, s, precision, half, tiling)


def megablox_tiling(M, K, N):
    """Return the tiles that `implementation="megablox"` gives it for large matrices."""
    return (min(512, M), min(1024, K), min(1024, N))


def _passes(sizes, chunk):
    """Return how often a chunk of rows meets a matrix under this routing."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    return int(np.where(sizes > 0, -(-ends // chunk) - starts // chunk, 0).sum())


def _abstract(M, K, N, G, code, group):
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    if code is None:
        return x, jax.ShapeDtypeStruct((G, K, N), jnp.bfloat16)
    packed = code == "packed_int4"
    values = jax.ShapeDtypeStruct(
        (G, K // 2 if packed else K, N), jnp.int8 if packed else jnp.dtype(code)
    )
    scales = jax.ShapeDtypeStruct((G, K // (group or K), N), jnp.float32)
    return x, QuantizedMatrix(values, scales, packed=packed)


def entries(shape, chip):
    """Return the lines of the table."""
    from compare import Entry

    M, K, N, G = shape or DEFAULT
    limits, macs, touched = limits_of(chip), M * K * N, min(M, G)
    common = {"M": M, "K": K, "N": N, "G": G, "chip": chip}
    m, k, n = megablox_tiling(M, K, N)
    visits = most_visits(M, touched, m) - 1
    sizes = np.random.default_rng(0).multinomial(M, np.full(G, 1 / G))

    def up(a, b):
        return -(-a // b)

    def ours(what, label, matrices=1, inner=K, columns=N, code=None, group=None, transposed=False, results=1):  # fmt: skip
        each = 2.0 if code is None else _BYTES[code]
        x, *w = _abstract(M, inner, columns, G, code, group)
        if transposed:
            w = [jax.ShapeDtypeStruct((G, columns, inner), w[0].dtype)]
        t = pallas_tpu.tiles_of(x, tuple(w) * matrices, limits, transposed, results)
        step = t.row_chunk * min(t.inner_chunk, t.inner) * min(t.columns, columns)
        if t.inner_chunk >= inner:
            # Without a loop over K both products stand in one region.
            step *= matrices
        passes = _passes(sizes, t.row_chunk) * t.row_chunk / M
        w_bytes = touched * inner * columns * each * matrices
        if group:
            w_bytes += touched * inner // group * columns * 4 * matrices
        moved = up(columns, t.columns) * M * inner * 2 + w_bytes + results * M * columns * 2
        floor = (M * inner + results * M * columns) * 2 + w_bytes
        arguments = {"what": what, **common, "code": code, "group": group}
        return Entry(label, arguments, ("grouped",), (step,), macs * matrices, moved, floor,
                     passes)  # fmt: skip

    def theirs(what, label, count=1, extra=0.0, inner=K, columns=N, x_factor=1):
        a, b, c = megablox_tiling(M, inner, columns)
        moved = count * (up(columns, c) * M * inner * 2 + visits * inner * columns * 2)
        moved += count * M * columns * 2 + extra
        floor = (M * inner + M * columns + count * touched * inner * columns) * 2
        arguments = {"what": what, **common}
        return Entry(label, arguments, ("gmm", "ragged"), (a * b * c,) * count, macs * count,
                     moved, floor, _passes(sizes, a) * a / M)  # fmt: skip

    def dw_theirs(what, label):
        moved = 2 * (up(N, n) * M * K + up(K, k) * M * N) + dw_bytes
        return Entry(label, {"what": what, **common}, ("gmm", "ragged"), (m * k * n,), macs, moved,
                     dw_floor, _passes(sizes, m) * m / M)  # fmt: skip

    public = importlib.util.find_spec("tokamax") is not None
    if not public:
        print("tokamax is not installed: no lines for it.", file=sys.stderr)

    found = [
        ours("ours", "ours: x w"),
        theirs("megablox gmm", "megablox gmm"),
        *([theirs("tokamax gmm", "tokamax gmm")] if public else []),
        Entry("jax.lax.ragged_dot", {"what": "ragged_dot", **common}, ("ragged",), (), macs, 0, 1),
    ]  # fmt: skip
    g = gradient_tiles(M, K, N, limits)
    dw_bytes = 2 * touched * K * N
    dw_floor = (M * K + M * N) * 2 + dw_bytes
    found += [
        ours("ours dx", "ours: dx = dy w^T", inner=N, columns=K, transposed=True),
        theirs("megablox gmm dx", "megablox gmm, transposed", inner=N, columns=K),
        *(
            [theirs("tokamax gmm dx", "tokamax gmm, transposed", inner=N, columns=K)]
            if public
            else []
        ),
        Entry("ours: dw", {"what": "ours dw", **common}, ("grouped",),
              (g.row_chunk * g.inner * g.columns,), macs,
              2 * (up(N, g.columns) * M * K + up(K, g.inner) * M * N) + dw_bytes, dw_floor,
              _passes(sizes, g.row_chunk) * g.row_chunk / M),
        dw_theirs("megablox tgmm", "megablox tgmm"),
        *([dw_theirs("tokamax tgmm", "tokamax tgmm")] if public else []),
        ours("ours swiglu", "ours: swiglu, score inside", matrices=2),
        ours("ours swiglu products", "ours: swiglu and its products", matrices=2, results=3),
        # The score writes and reads x, the activation reads two results and writes one.
        theirs("megablox swiglu", "2 megablox gmm + elementwise", count=2,
               extra=2 * 2 * M * K + 3 * 2 * M * N),
    ]  # fmt: skip
    for code, group in (("int8", None), ("packed_int4", None), ("packed_int4", 128),
                        ("float8_e4m3fn", None)):  # fmt: skip
        label = f"ours: {code} weights" + (f", groups of {group}" if group else "")
        found.append(ours("ours", label, code=code, group=group))
    return found
