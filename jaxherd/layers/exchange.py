"""Rows travel to the devices that own their experts and back, dropping none, in bounded memory.

Inside `shard_map`.  A device sends at most `quota` rows to each other device in one round; the
number of rounds is counted at run time, so that any imbalance is served and a balanced load needs
one.  The gradient goes through the same rounds and computes the experts again instead of keeping
what they computed.

Axis letters: P devices of the expert axis, E experts, e = E / P experts of one device, R rows of
one device, C = P quota receive capacity.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxherd.core.platform import platform
from jaxherd.layers.permute import permute


def exchange_rows(
    compute: Callable,
    rows_RD: jax.Array,
    sizes_E: jax.Array,
    weights: Any,
    axis: str,
    *,
    balance: float = 2.0,
    beside: Any = (),
) -> tuple[jax.Array, Any]:
    """Return (what the experts make of the rows, as if every device held all experts; `beside`).

    Args:
      compute: maps (rows sorted by local expert with an arbitrary tail, sizes [e], weights,
        expected_rows=) to rows; a function of module level or a `functools.partial` of one.  The
        buffer holds `balance` times the rows that a uniform load fills: `expected_rows` says how
        many those are.
      rows_RD: sorted by expert.
      sizes_E: rows of each expert on this device; their sum is R.
      weights: a pytree of the local experts' arrays.
      axis: mesh axis over which experts are split.
      balance: one round serves pairs of devices with up to this many times the rows of a uniform
        load; busier pairs take further rounds.
      beside: a pytree of arrays that is handed through.  What it is computed from is done while rows
        travel here, and what it is used for while they travel back; the gradient likewise.
    """
    devices = jax.lax.axis_size(axis)
    rows = rows_RD.shape[0]
    quota = max(1, min(rows, math.ceil(rows * balance / devices)))
    # sizes[p, q, e]: rows that device p holds for expert e of device q.
    sizes_PPe = jax.lax.all_gather(sizes_E, axis).reshape(devices, devices, -1)
    return _exchange(compute, quota, axis, rows_RD, sizes_PPe, weights, beside)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(compute, quota: int, axis: str, rows_RD, sizes_PPe, weights, beside):
    rounds = _rounds(sizes_PPe, quota)
    rows_RD, out_RD = _with_buffer(rows_RD, len(rows_RD))

    def serve(number, y_RD, beside=()):
        plan = _Round(sizes_PPe, number, quota, axis, len(rows_RD))
        arrived_CD, beside = _meet(plan.dispatch(rows_RD), beside)
        computed_CD, beside = _meet(plan.local(compute, arrived_CD, weights), beside)
        return plan.combine(computed_CD, y_RD), beside

    def more(y_RD):
        return jax.lax.fori_loop(1, rounds, lambda number, y_RD: serve(number, y_RD)[0], y_RD)

    # The first round stands outside of the loop: only there can the compiler let rows travel
    # while it computes what does not wait for them, as the shared expert.
    y_RD, beside = serve(0, out_RD, beside)
    return jax.lax.cond(rounds > 1, more, lambda y_RD: y_RD, y_RD), beside


def _exchange_forward(compute, quota, axis, rows_RD, sizes_PPe, weights, beside):
    result = _exchange(compute, quota, axis, rows_RD, sizes_PPe, weights, beside)
    return result, (rows_RD, sizes_PPe, weights)


def _exchange_backward(compute, quota, axis, saved, gradients):
    (rows_RD, sizes_PPe, weights), (dy_RD, d_beside) = saved, gradients
    rounds = _rounds(sizes_PPe, quota)
    dy_RD, out_RD = _with_buffer(dy_RD, len(rows_RD))

    def serve(number, d_rows_RD, d_beside=()):
        plan = _Round(sizes_PPe, number, quota, axis, len(rows_RD))
        local = functools.partial(plan.local, compute)
        arrived, d_beside = _meet((plan.dispatch(rows_RD), plan.dispatch(dy_RD)), d_beside)
        _, pull = jax.vjp(local, arrived[0], weights)
        (d_arrived_CD, d_part), d_beside = _meet(pull(arrived[1]), d_beside)
        return plan.combine(d_arrived_CD, d_rows_RD), d_part, d_beside

    def add(number, carry):
        d_rows_RD, d_weights = carry
        d_rows_RD, d_part, _ = serve(number, d_rows_RD)
        return d_rows_RD, jax.tree.map(lambda t, d: t + d.astype(t.dtype), d_weights, d_part)

    def more(carry):
        d_rows_RD, d_weights = carry
        # Rounds add up in float32, whatever the weights are computed in.
        wide = jax.tree.map(lambda d: d.astype(jnp.float32), d_weights)
        d_rows_RD, wide = jax.lax.fori_loop(1, rounds, add, (d_rows_RD, wide))
        return d_rows_RD, jax.tree.map(lambda d, w: d.astype(w.dtype), wide, d_weights)

    *first, d_beside = serve(0, out_RD, d_beside)
    d_rows_RD, d_weights = jax.lax.cond(rounds > 1, more, lambda carry: carry, tuple(first))
    return d_rows_RD, None, d_weights, d_beside


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _meet(a, b):
    """Return both; what follows on either waits for the other."""
    return jax.lax.optimization_barrier((a, b)) if jax.tree.leaves(b) else (a, b)


def _rounds(sizes_PPe, quota: int):
    """Return how many rounds the busiest pair of devices needs; the same on all devices."""
    return (sizes_PPe.sum(axis=-1).max() + quota - 1) // quota


def _with_buffer(rows_RD, count: int):
    """Return the rows, and a buffer of `count` rows that is not filled: that would cost a pass.

    Neither is there before the other.  A buffer of nothing would be the same for all layers of a
    scan, so that the compiler made one before it and copied that in every layer.
    """
    empty = jax.lax.empty((count, rows_RD.shape[1]), rows_RD.dtype)
    return jax.lax.optimization_barrier((rows_RD, empty))


class _Round:
    """Who sends what where in one round."""

    def __init__(self, sizes_PPe, number, quota: int, axis: str, rows: int):
        self._axis, self._here = axis, jax.lax.axis_index(axis)
        devices = sizes_PPe.shape[0]
        self._capacity = devices * quota
        # Under a uniform load as many rows arrive as leave.
        self._expected = min(rows, self._capacity)
        counts_PP = sizes_PPe.sum(axis=-1)
        # Of the run from p to q this round takes rows [number quota, (number + 1) quota).
        ends_PPe = jnp.cumsum(sizes_PPe, axis=-1)
        taken_PPe = jnp.clip(ends_PPe - number * quota, 0, quota)
        before_PPe = jnp.concatenate([jnp.zeros_like(taken_PPe[..., :1]), taken_PPe[..., :-1]], -1)
        self._sizes_Pe = (taken_PPe - before_PPe)[:, self._here]
        self._counts_PP = taken_PPe[..., -1]
        self._from_PP = jnp.cumsum(counts_PP, axis=1) - counts_PP + number * quota
        self._to_PP = jnp.cumsum(self._counts_PP, axis=0) - self._counts_PP

    def dispatch(self, rows_RD):
        """Return [C, D]: what arrives here, in order of sender; the tail holds anything."""
        rows_RD, out = _with_buffer(rows_RD, self._capacity)
        return _send(
            rows_RD, out, self._from_PP, self._counts_PP, self._to_PP, self._here, self._axis
        )

    def combine(self, rows_CD, out_RD):
        """Return `out_RD` with each row of this round sent back to its place."""
        return _send(
            rows_CD,
            out_RD,
            self._to_PP.T,
            self._counts_PP.T,
            self._from_PP.T,
            self._here,
            self._axis,
        )

    def local(self, compute, arrived_CD, weights):
        """Return the experts' results for the rows that arrived, in their order."""
        sizes_e = self._sizes_Pe.sum(axis=0)
        if len(sizes_e) == 1:  # the rows of one expert are in order as they come
            return compute(arrived_CD, sizes_e, weights, expected_rows=self._expected)
        order_C, back_C = _regroup(self._sizes_Pe, self._capacity)
        rows_CD = permute(arrived_CD, order_C, back_C)
        computed_CD = compute(rows_CD, sizes_e, weights, expected_rows=self._expected)
        return permute(computed_CD, back_C, order_C)


def _regroup(sizes_Pe, capacity: int):
    """Return the order (sender, expert) -> (expert, sender) of received rows, and its inverse.

    Runs move as wholes: a row's new place is its old one and what its run moved.  The tail stays.
    """
    ends_Pe = jnp.cumsum(sizes_Pe.reshape(-1)).reshape(sizes_Pe.shape)
    ends_eP = jnp.cumsum(sizes_Pe.T.reshape(-1)).reshape(sizes_Pe.shape[::-1])
    moved_Pe = ends_eP.T - ends_Pe
    return (
        _shifted(ends_eP.reshape(-1), -moved_Pe.T.reshape(-1), capacity),
        _shifted(ends_Pe.reshape(-1), moved_Pe.reshape(-1), capacity),
    )


def _shifted(ends, shifts, capacity: int):
    """Return each place plus the shift of the run that it is in; places after the last have none."""
    place = jnp.arange(capacity, dtype=ends.dtype)
    run = jnp.searchsorted(ends, place, side="right", method="compare_all")
    return place + jnp.append(shifts, 0)[run]


def _send(rows, out, from_PP, counts_PP, to_PP, here, axis: str):
    """Return `out` with the runs of all devices written into it.

    Args:
      rows: this device's rows.
      out: this device's result, kept where nothing is written.
      from_PP: from[p, q] is where the run for device q starts among device p's rows.
      counts_PP: counts[p, q] rows go from device p to device q.
      to_PP: to[p, q] is where the run of device p starts in device q's result.
      here: this device's index along `axis`.
    """
    exchange = _native if platform() == "tpu" else _padded
    return exchange(
        rows,
        out,
        from_PP[here],
        counts_PP[here],
        to_PP[here],
        counts_PP[:, here],
        to_PP,
        here,
        axis,
    )


def _native(rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, to_PP, here, axis):
    return jax.lax.ragged_all_to_all(
        rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axis
    )


def _padded(rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, to_PP, here, axis):
    """Give each pair of devices a full-size box: for platforms without a ragged collective."""
    # A run between two devices is no longer than what either of them holds.
    slot = jnp.arange(min(rows.shape[0], out.shape[0]))
    index_PS = jnp.minimum(input_offsets[:, None] + slot, rows.shape[0] - 1)
    boxes = jnp.take(rows, index_PS, axis=0)
    boxes = jnp.where((slot < send_sizes[:, None])[..., None], boxes, 0)
    arrived_PSD = jax.lax.all_to_all(boxes, axis, split_axis=0, concat_axis=0, tiled=True)
    starts_P1 = to_PP[:, here][:, None]
    target_PS = jnp.where(slot < recv_sizes[:, None], starts_P1 + slot, out.shape[0])
    return out.at[target_PS.reshape(-1)].set(arrived_PSD.reshape(-1, rows.shape[1]), mode="drop")
