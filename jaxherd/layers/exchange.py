"""Rows travel to the devices that own their experts and back, dropping none.

Inside `shard_map`.  Axis letters: P devices of the expert axis, E experts, e = E / P experts of one
device, R rows of one device, C = P R receive capacity (enough for any imbalance).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxherd.core.platform import platform
from jaxherd.layers.permute import permute


def exchange_rows(compute: Callable, rows_RD, sizes_E, axis: str):
    """Return compute(rows, sizes) as if every device held all experts.

    Args:
      compute: maps (rows sorted by local expert with an arbitrary tail, sizes [e]) to rows.
      rows_RD: sorted by expert.
      sizes_E: rows of each expert on this device; their sum is R.
      axis: mesh axis over which experts are split.
    """
    devices = jax.lax.axis_size(axis)
    here = jax.lax.axis_index(axis)
    experts = sizes_E.shape[0] // devices
    # sizes[p, q, e]: rows that device p holds for expert e of device q.
    sizes_PPe = jax.lax.all_gather(sizes_E, axis).reshape(devices, devices, experts)
    counts_PP = sizes_PPe.sum(axis=-1)
    capacity = devices * rows_RD.shape[0]
    arrived_CD = ragged_all_to_all(rows_RD, counts_PP, here, capacity, axis)
    mine_Pe = sizes_PPe[:, here]
    order_C, back_C, sizes_e = _regroup(mine_Pe, capacity)
    computed_CD = compute(permute(arrived_CD, order_C, back_C), sizes_e)
    returned_CD = permute(computed_CD, back_C, order_C)
    return ragged_all_to_all(returned_CD, counts_PP.T, here, rows_RD.shape[0], axis)


def _regroup(mine_Pe, capacity: int):
    """Return the order (sender, expert) -> (expert, sender), its inverse, and the sizes."""
    senders, experts = mine_Pe.shape
    ends = jnp.cumsum(mine_Pe.reshape(-1))
    block_C = jnp.searchsorted(ends, jnp.arange(capacity), side="right")
    expert_C = jnp.where(block_C < senders * experts, block_C % experts, experts)
    order_C = jnp.argsort(expert_C, stable=True)
    return order_C, jnp.argsort(order_C), mine_Pe.sum(axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def ragged_all_to_all(rows_RD, counts_PP, here, capacity: int, axis: str):
    """Send consecutive runs of rows to each device; return what arrived, in order of sender.

    Args:
      rows_RD: rows for device 0, then for device 1, and so on.
      counts_PP: counts[p, q] rows go from device p to device q; the same on all devices.
      here: this device's index along `axis`.
      capacity: rows of the result; those past the received ones are zero.
    """
    return _send(rows_RD, counts_PP, here, capacity, axis)


def _send(rows_RD, counts_PP, here, capacity, axis):
    sent_P, received_P = counts_PP[here], counts_PP[:, here]
    starts_P = jnp.cumsum(sent_P) - sent_P
    # Where my run starts in the result of each receiver: after the runs of lower senders.
    before_PP = jnp.cumsum(counts_PP, axis=0) - counts_PP
    out = jnp.zeros((capacity, rows_RD.shape[1]), rows_RD.dtype)
    exchange = _native if platform() == "tpu" else _padded
    return exchange(rows_RD, out, starts_P, sent_P, before_PP[here], received_P, axis)


def _native(rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, axis):
    return jax.lax.ragged_all_to_all(
        rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axis
    )


def _padded(rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, axis):
    """Give each pair of devices a full-size box: for platforms without a ragged collective."""
    # A run between two devices is no longer than what either of them holds.
    slot_R = jnp.arange(min(rows.shape[0], out.shape[0]))
    index_PR = jnp.minimum(input_offsets[:, None] + slot_R, rows.shape[0] - 1)
    boxes = jnp.take(rows, index_PR, axis=0)
    boxes = jnp.where((slot_R < send_sizes[:, None])[..., None], boxes, 0)
    arrived_PRD = jax.lax.all_to_all(boxes, axis, split_axis=0, concat_axis=0, tiled=True)
    starts_P = jnp.cumsum(recv_sizes) - recv_sizes
    target_PR = jnp.where(slot_R < recv_sizes[:, None], starts_P[:, None] + slot_R, out.shape[0])
    return out.at[target_PR.reshape(-1)].set(arrived_PRD.reshape(-1, rows.shape[1]), mode="drop")


def _send_forward(rows_RD, counts_PP, here, capacity, axis):
    out = _send(rows_RD, counts_PP, here, capacity, axis)
    return out, (counts_PP, here, rows_RD.shape[0])


def _send_backward(capacity, axis, saved, d_out):
    counts_PP, here, rows = saved
    return _send(d_out, counts_PP.T, here, rows, axis), None, None


ragged_all_to_all.defvjp(_send_forward, _send_backward)
