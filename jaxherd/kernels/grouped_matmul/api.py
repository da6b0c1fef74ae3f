"""Entries to the grouped products; `implementation` says which code runs.

Axis letters: M rows, K inner, G groups, N columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.platform import chip, platform
from jaxherd.kernels.grouped_matmul import blocked, reference
from jaxherd.kernels.grouped_matmul.tiles import limits_of
from jaxherd.kernels.quantized_matmul.reference import activation_codes
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix

IMPLEMENTATIONS = ("reference", "blocked", "ragged_dot", "megablox", "pallas_tpu", "pallas_gpu")
_NEEDS = {"megablox": "tpu", "pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_GKN: Float[Array, "G K N"] | QuantizedMatrix,
    group_sizes_G: Int[Array, "G"],
    *,
    expected_rows: int | None = None,
    across: tuple[str, ...] = (),
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Multiply consecutive groups of rows by their own matrices, dropping nothing.

    y[m] = x[m] w[g(m)], where the first `group_sizes[0]` rows belong to group 0, and so on.  Rows
    past the sum of the sizes belong to no group and give zeros, whatever they hold.

    `implementation` is one of

    - "reference": the definition, G times the work; any platform.
    - "blocked": a loop of XLA products over blocks of rows; any platform.
    - "ragged_dot": XLA's own; any platform.
    - "megablox": jax's Pallas kernel; TPU.
    - "pallas_tpu": ours.  By the compiler's account 0.92 of megablox's bundles per tile forward on
      v5e and v5p, and a matrix is read once per group instead of once per tile of rows (README.md
      beside this file has the table).
    - "pallas_gpu": ours, through Triton; compiled for H100, not timed.
    - None: pallas_tpu on TPU, blocked elsewhere.

    Args:
      x_MK: rows sorted by group.
      w_GKN: one matrix a group; a code is dequantised inside pallas_tpu, before the product
        elsewhere, and is a constant to the gradient.  Where it asks for rounded `activations`, x
        is rounded by rows first and has no gradient.
      group_sizes_G: rows of each group; zero is allowed; the sum is at most M.
      expected_rows: what the sum of the sizes is expected to be; M by default.  It changes no
        result: our Pallas kernels tell XLA and the planner what they cost with so many rows.
      across: mesh axes over which K is split, inside `shard_map`: rows are rounded by their whole
        maximum.
      implementation: see above.
      interpret: run a Pallas implementation in interpret mode, for tests on CPU.
    Returns:
      [M, N] in the dtype of `x_MK`, accumulated in float32.  Products of float32 operands have the
      platform's default precision.
    Raises:
      JaxherdError: an unknown implementation, one that this platform cannot run, shapes that do
        not fit each other, or more expected rows than there are.
    """
    name = _choose("grouped_matmul", implementation, interpret)
    _check("grouped_matmul", x_MK, [w_GKN], group_sizes_G, expected_rows)
    args = (group_sizes_G, interpret, expected_rows)
    if isinstance(w_GKN, QuantizedMatrix) and w_GKN.activations is not None:
        codes_MK, scales_M1 = _rounded(x_MK, w_GKN.activations, group_sizes_G, across)
        return _scaled(_product(name, codes_MK, w_GKN, *args), scales_M1)
    return _product(name, x_MK, w_GKN, *args)


def grouped_swiglu(
    x_MK: Float[Array, "M K"],
    gate_GKN: Float[Array, "G K N"] | QuantizedMatrix,
    up_GKN: Float[Array, "G K N"] | QuantizedMatrix,
    group_sizes_G: Int[Array, "G"],
    *,
    row_scale_M: Float[Array, "M"] | None = None,
    expected_rows: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Return the hidden layer of gated experts: silu(u gate[g]) * (u up[g]) with u = s x.

    s is a factor of each row, as Llama 4's router score on the expert input (llama4.md section 3).
    The definition rounds s x to the dtype of x, then each product to it.  pallas_tpu reads x once
    for both products, and s meets their float32 sums: s (x w) = (s x) w.  The others multiply
    first and make two grouped products.

    Args:
      x_MK: rows sorted by group.
      gate_GKN, up_GKN: as `w_GKN` of `grouped_matmul`.
      group_sizes_G: rows of each group; rows past their sum give zeros.
      row_scale_M: s, or None for 1.
      expected_rows, implementation, interpret: see `grouped_matmul`.
    Returns:
      [M, N] in the dtype of `x_MK`.
    Raises:
      JaxherdError: as `grouped_matmul`.
    """
    name = _choose("grouped_swiglu", implementation, interpret)
    _check("grouped_swiglu", x_MK, [gate_GKN, up_GKN], group_sizes_G, expected_rows)
    args = (group_sizes_G, interpret, expected_rows)
    scales_M1 = None
    if isinstance(gate_GKN, QuantizedMatrix) and gate_GKN.activations is not None:
        if row_scale_M is not None:
            x_MK = _multiplied(x_MK, row_scale_M, group_sizes_G)
        x_MK, scales_M1 = _rounded(x_MK, gate_GKN.activations, group_sizes_G, ())
        row_scale_M = scales_M1[:, 0]
    if name == "pallas_tpu":
        from jaxherd.kernels.grouped_matmul import pallas_tpu

        return pallas_tpu.grouped_swiglu(
            x_MK, gate_GKN, up_GKN, group_sizes_G, row_scale_M, limits_of(chip()), interpret,
            expected_rows,
        )  # fmt: skip
    if scales_M1 is not None:
        # Codes are exact in the dtype of x, their products with a scale need not be.
        gate_MN, up_MN = (
            _scaled(_product(name, x_MK, w, *args), scales_M1) for w in (gate_GKN, up_GKN)
        )
        return jax.nn.silu(gate_MN) * up_MN
    if row_scale_M is not None:
        x_MK = _multiplied(x_MK, row_scale_M, group_sizes_G)
    gate_MN = _product(name, x_MK, gate_GKN, *args)
    return jax.nn.silu(gate_MN) * _product(name, x_MK, up_GKN, *args)


def _multiplied(x_MK, row_scale_M, group_sizes_G):
    # What stands in the tail would reach the gradients of both through their product.
    used_M = jnp.arange(x_MK.shape[0]) < group_sizes_G.sum()
    x_MK = jnp.where(used_M[:, None], x_MK, 0)
    return x_MK * jnp.where(used_M, row_scale_M, 0)[:, None].astype(x_MK.dtype)


def _rounded(x_MK, activations: str, group_sizes_G, across: tuple[str, ...]):
    """Return (codes in the dtype of x, scales); the scales of the tail, which may hold anything, are 0."""
    codes_MK, scales_M1 = activation_codes(_constant(x_MK), activations, across)
    used_M1 = (jnp.arange(x_MK.shape[0]) < group_sizes_G.sum())[:, None]
    return codes_MK.astype(x_MK.dtype), jnp.where(used_M1, scales_M1, 0)


def _scaled(y_MN, scales_M1):
    return (y_MN.astype(jnp.float32) * scales_M1).astype(y_MN.dtype)


@jax.custom_vjp
def _constant(x_MK):
    return x_MK


def _constant_forward(x_MK):
    raise JaxherdError(
        "grouped_matmul: rounded activations have no gradient; train with plain weights, or with "
        "codes whose `activations` are None."
    )


_constant.defvjp(_constant_forward, lambda saved, dy: (dy,))


def _product(name: str, x_MK, w_GKN, group_sizes_G, interpret: bool, expected_rows) -> Any:
    if name == "pallas_tpu":
        from jaxherd.kernels.grouped_matmul import pallas_tpu

        return pallas_tpu.grouped_matmul(
            x_MK, w_GKN, group_sizes_G, limits_of(chip()), interpret, expected_rows
        )
    if isinstance(w_GKN, QuantizedMatrix):
        # The definition multiplies the exact values of the code; the others what x's dtype holds.
        w_GKN = w_GKN.dequantize(jnp.float32 if name == "reference" else x_MK.dtype)
        w_GKN = jax.lax.stop_gradient(w_GKN)
    if name == "reference":
        return reference.grouped_matmul(x_MK, w_GKN, group_sizes_G)
    if name == "blocked":
        return blocked.grouped_matmul(x_MK, w_GKN, group_sizes_G, False)
    if name == "ragged_dot":
        y_MN = jax.lax.ragged_dot(x_MK, w_GKN, group_sizes_G.astype(jnp.int32))
        return _zero_tail(y_MN, group_sizes_G)
    if name == "pallas_gpu":
        from jaxherd.kernels.grouped_matmul import pallas_gpu

        return pallas_gpu.grouped_matmul(x_MK, w_GKN, group_sizes_G, interpret, expected_rows)
    from jaxherd.kernels.grouped_matmul import megablox

    return _zero_tail(
        megablox.grouped_matmul(x_MK, w_GKN, group_sizes_G, interpret), group_sizes_G
    )  # fmt: skip


def _choose(function: str, implementation: str | None, interpret: bool) -> str:
    here = platform()
    if implementation is None:
        return "pallas_tpu" if here == "tpu" else "blocked"
    if implementation not in IMPLEMENTATIONS:
        raise JaxherdError(
            f"{function}: no implementation {implementation!r}; "
            + nearest(implementation, IMPLEMENTATIONS)
        )
    needs = _NEEDS.get(implementation, here)
    if needs != here and not interpret:
        raise JaxherdError(
            f"{function}: {implementation!r} runs on {needs} and this program is for {here}; take "
            "'blocked', or interpret=True to try it."
        )
    return implementation


def _check(function: str, x_MK, weights: list[Any], group_sizes_G, expected_rows=None) -> None:
    w_GKN = weights[0]
    if expected_rows is not None and not 0 <= expected_rows <= x_MK.shape[0]:
        raise JaxherdError(
            f"{function}: {expected_rows} rows are expected of a matrix with {x_MK.shape[0]}; give "
            "0 to all of them."
        )
    if len(w_GKN.shape) != 3 or w_GKN.shape[1] != x_MK.shape[1]:
        raise JaxherdError(
            f"{function}: x has K = {x_MK.shape[1]} and the matrices the shape "
            f"{tuple(w_GKN.shape)}, which should be [groups, K, N]."
        )
    if w_GKN.shape[0] != group_sizes_G.shape[0]:
        raise JaxherdError(
            f"{function}: {group_sizes_G.shape[0]} group sizes for {w_GKN.shape[0]} matrices."
        )
    kinds = {
        (w.code, w.packed, w.blocks, w.activations) if isinstance(w, QuantizedMatrix) else w.dtype
        for w in weights
    }
    if len({tuple(w.shape) for w in weights}) > 1 or len(kinds) > 1:
        raise JaxherdError(
            f"{function}: gate and up differ in shape or kind: "
            + " and ".join(f"{type(w).__name__} {tuple(w.shape)}" for w in weights)
            + "; give both the same."
        )


def _zero_tail(y_MN, group_sizes_G):
    """Kernels leave rows of no group uninitialised: a select, never a product, makes them zero."""
    rows_M1 = jnp.arange(y_MN.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(rows_M1 < group_sizes_G.sum(), y_MN, 0)
