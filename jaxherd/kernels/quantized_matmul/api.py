"""One entry to products with quantised weights; `implementation` says which code runs."""

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core import sharding
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.platform import chip, platform
from jaxherd.kernels.quantized_matmul import reference
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
ACTIVATIONS = ("int8", "float8_e4m3fn")
_PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def quantized_matmul(
    x_MK: Float[Array, "M K"],
    quantized_w_KN: QuantizedMatrix,
    *,
    activations: str | None = None,
    across: tuple[str, ...] = (),
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Multiply activations by a quantised matrix.

    y[m, n] = sum_k x[m, k] w[k, n], with w as `QuantizedMatrix` defines it; with `activations`, x
    is first rounded to codes with one scale a row, set by the row itself (`quantize_rows`).

    The gradient with respect to x is dy W^T (for `activations=None` alone).  The matrix is a
    constant: its scales get no gradient from any implementation.

    Args:
      x_MK: activations.
      quantized_w_KN: one matrix.
      activations: "int8" or "float8_e4m3fn" (whose row maximum is bounded by 1200, as in Llama 4's
        fp8_mixed, llama4.md section 9); None takes what the matrix asks for.
      across: mesh axes over which K is split, inside `shard_map`: rows are rounded by their whole
        maximum.  The sum over the axes is the caller's.
      implementation: "reference" (the definition, in float32), "xla", "pallas_tpu", "pallas_gpu",
        or None: pallas_tpu on a TPU that holds the whole matrix (one device, or inside
        `shard_map`) where that kernel takes the operands, else xla.
      interpret: run a Pallas implementation in interpret mode, for tests on CPU.
    Returns:
      [M, N] in the dtype of `x_MK`, accumulated in float32 (int8 by int8: in int32).
    Raises:
      JaxherdError: an unknown or here impossible implementation, inner dimensions that differ, a
        matrix whose parts do not fit, a gradient through quantised activations.
    """
    w = quantized_w_KN
    w.check()
    activations = w.activations if activations is None else activations
    if w.ndim != 2:
        raise JaxherdError(
            f"quantized_matmul: the weights {w.shape} are a stack; pick one matrix or use vmap."
        )
    if x_MK.shape[1] != w.shape[0]:
        raise JaxherdError(
            f"quantized_matmul: x has K = {x_MK.shape[1]} and the weights {w.shape[0]}."
        )
    if activations not in (None, *ACTIVATIONS):
        raise JaxherdError(
            f"quantized_matmul: no activations {activations!r}; "
            + nearest(str(activations), ACTIVATIONS)
        )
    if implementation is None:
        possible = platform() == "tpu" and _obstacle("pallas_tpu", x_MK, w, interpret) is None
        implementation = "pallas_tpu" if possible else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise JaxherdError(
            f"quantized_matmul: no implementation {implementation!r}; "
            + nearest(implementation, IMPLEMENTATIONS)
        )
    obstacle = _obstacle(implementation, x_MK, w, interpret)
    if obstacle is not None:
        raise JaxherdError(f"quantized_matmul: {implementation} cannot run: {obstacle}.")
    w = jax.lax.stop_gradient(w)
    if implementation == "reference":
        run = functools.partial(reference.reference, activations=activations, across=across)
    elif implementation == "xla":
        run = functools.partial(reference.xla, activations=activations, across=across)
    else:
        static = (implementation, chip(), interpret)
        if activations is None:
            return _kernel_product(x_MK, w, static)
        run = functools.partial(
            _kernel_product_of_codes, activations=activations, static=static, across=across
        )
    return run(x_MK, w) if activations is None else _no_gradient(x_MK, w, run)


def _obstacle(implementation: str, x_MK, w: QuantizedMatrix, interpret: bool) -> str | None:
    """Return why this implementation cannot run here with these operands, or None."""
    if implementation not in _PLATFORMS:
        return None
    wanted = _PLATFORMS[implementation]
    if platform() != wanted and not interpret:
        return f"this is a {platform()}, not a {wanted}; use 'xla', or interpret=True in a test"
    if x_MK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x_MK.dtype}; cast it to bfloat16 or float32, or use 'xla'"
    partitioner = sharding.active()
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
    if partitioner is not None and partitioner.mesh.size > 1 and not inside and not interpret:
        return (
            f"the mesh has {partitioner.mesh.size} devices, over which XLA cannot split a kernel; "
            "call it inside jax.shard_map, or use 'xla'"
        )
    reason = _module(implementation).supports(w)
    return None if reason is None else f"it does not take {reason}; use 'xla'"


def _module(implementation: str) -> ModuleType:
    return importlib.import_module(f"jaxherd.kernels.quantized_matmul.{implementation}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_product(x_MK, w: QuantizedMatrix, static: tuple[str, str | None, bool]):
    implementation, name, interpret = static
    return _module(implementation).matmul(x_MK, w, chip=name, interpret=interpret)


def _kernel_forward(x_MK, w, static):
    return _kernel_product(x_MK, w, static), w


def _kernel_backward(static, w, dy_MN):
    implementation, name, interpret = static
    dx_MK = _module(implementation).matmul(
        dy_MN, w, chip=name, interpret=interpret, transposed=True
    )
    return dx_MK, None


_kernel_product.defvjp(_kernel_forward, _kernel_backward)


def _kernel_product_of_codes(x_MK, w, activations: str, static, across: tuple[str, ...]):
    implementation, name, interpret = static
    codes, scales_M1 = reference.activation_codes(x_MK, activations, across)
    return _module(implementation).matmul(
        codes, w, scales_M1, chip=name, interpret=interpret, out_dtype=x_MK.dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _no_gradient(x_MK, w, run):
    return run(x_MK, w)


def _no_gradient_forward(x_MK, w, run):
    raise JaxherdError(
        "quantized_matmul: rounded activations have no gradient; use activations=None, or a fake "
        "quantiser with a straight-through estimator for training."
    )


_no_gradient.defvjp(_no_gradient_forward, lambda run, saved, dy: (dy, None))
