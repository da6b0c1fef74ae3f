"""Rows to their experts' devices and back, against NumPy, for even and extreme routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxherd.layers import exchange

DEVICES, ROWS, WIDTH, EXPERTS = 4, 6, 3, 8

ROUTINGS = {
    "uniform": lambda rng: np.tile(
        np.bincount(np.arange(ROWS) % EXPERTS, minlength=EXPERTS), (4, 1)
    ),
    "skewed": lambda rng: np.stack(
        [rng.multinomial(ROWS, np.arange(1, EXPERTS + 1) ** 3 / 1296) for _ in range(DEVICES)]
    ),
    "one_expert_takes_all": lambda rng: np.eye(EXPERTS, dtype=int)[[5] * DEVICES] * ROWS,
    "each_its_own": lambda rng: np.eye(EXPERTS, dtype=int)[[1, 3, 5, 7]] * ROWS,
    "last_device_gets_nothing": lambda rng: np.eye(EXPERTS, dtype=int)[[0, 5, 0, 2]] * ROWS,
}


def documented(operands, outputs, input_offsets, send_sizes, output_offsets, recv_sizes):
    """`ragged_all_to_all` as its documentation tells it, for all devices at once, in NumPy."""
    outputs = [out.copy() for out in outputs]
    for sender in range(len(operands)):
        for receiver in range(len(operands)):
            size = send_sizes[sender][receiver]
            assert size == recv_sizes[receiver][sender], "sizes of both ends differ"
            start, to = input_offsets[sender][receiver], output_offsets[sender][receiver]
            run = operands[sender][start : start + size]
            assert len(run) == size, "a run reaches past the end of its rows"
            assert to + size <= len(outputs[receiver]), "a run reaches past the receiver's end"
            outputs[receiver][to : to + size] = run
    return outputs


def on_devices(function, *arrays):
    """Run `function` on each device's slice of arrays with a leading device axis."""
    mesh = Mesh(np.asarray(jax.devices("cpu")[:DEVICES]), ("expert",))
    spec = PartitionSpec("expert")

    def local(*parts):
        return jax.tree.map(lambda x: x[None], function(*(part[0] for part in parts)))

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
        *arrays
    )


@pytest.mark.parametrize("name", ROUTINGS)
def test_rows_arrive_as_documented(name, monkeypatch):
    rng = np.random.default_rng(0)
    counts = ROUTINGS[name](rng).reshape(DEVICES, DEVICES, -1).sum(-1)
    rows = rng.normal(size=(DEVICES, ROWS, WIDTH)).astype(np.float32)
    starts = jnp.asarray(np.cumsum(counts, axis=1) - counts)
    targets = jnp.asarray(np.cumsum(counts, axis=0) - counts)
    capacity = DEVICES * ROWS

    def send(rows, here):
        out = jnp.full((capacity, WIDTH), 9.0, jnp.float32)
        return exchange._send(rows, out, starts, jnp.asarray(counts), targets, here[0], "expert")

    def record(rows, out, *indices):
        assert out.shape == (capacity, WIDTH)
        return jnp.stack(indices[:4])

    here = np.arange(DEVICES)[:, None]
    padded = on_devices(send, rows, here)
    # What the TPU path would hand to the collective, interpreted by its documentation.
    monkeypatch.setattr(exchange, "platform", lambda: "tpu")
    monkeypatch.setattr(exchange, "_native", record)
    sent = np.moveaxis(np.asarray(on_devices(send, rows, here)), 1, 0)
    nines = [np.full((capacity, WIDTH), 9.0, np.float32)] * DEVICES
    wanted = documented(rows, nines, sent[0], sent[1], sent[2], sent[3])
    np.testing.assert_array_equal(padded, np.stack(wanted))


def test_native_call_has_the_arguments_in_order(monkeypatch):
    """The collective is called with jax's own parameter names bound to what we mean."""
    import inspect

    parameters = list(inspect.signature(jax.lax.ragged_all_to_all).parameters)
    assert parameters[:6] == [
        "operand", "output", "input_offsets", "send_sizes", "output_offsets", "recv_sizes",
    ]  # fmt: skip
    called = {}

    def fake(*arguments, axis_name):
        called.update(zip(parameters, arguments), axis_name=axis_name)
        return arguments[1]

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", fake)
    exchange._native("rows", "out", "starts", "sizes", "targets", "received", None, None, "expert")
    assert called == {
        "operand": "rows", "output": "out", "input_offsets": "starts", "send_sizes": "sizes",
        "output_offsets": "targets", "recv_sizes": "received", "axis_name": "expert",
    }  # fmt: skip


@pytest.mark.parametrize("balance", [0.6, 2.0, 4.0])
@pytest.mark.parametrize("name", ROUTINGS)
def test_exchange_computes_every_row_by_its_expert(name, balance):
    """Values and gradients against a loop, in one round or in several; the tail never leaks."""
    rng = np.random.default_rng(1)
    sizes = ROUTINGS[name](rng).astype(np.int32)
    rows = rng.normal(size=(DEVICES, ROWS, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(EXPERTS, WIDTH)).astype(np.float32)
    cotangent = rng.normal(size=rows.shape).astype(np.float32)
    expert = np.stack([np.repeat(np.arange(EXPERTS), s) for s in sizes])

    def compute(received, local_sizes, local_weights, *, expected_rows):
        assert expected_rows == min(ROWS, len(received)), "of a uniform load, whatever arrives"
        owner = jnp.searchsorted(jnp.cumsum(local_sizes), jnp.arange(len(received)), side="right")
        inside = owner < len(local_weights)
        # A kernel may leave anything in the tail.
        factor = jnp.where(inside[:, None], jnp.take(local_weights, owner, axis=0, mode="clip"), 0)
        return jnp.where(inside[:, None], received * factor, 7.0)

    def one_device(rows, sizes, local_weights, cotangent):
        def loss(rows, local_weights):
            out, _ = exchange.exchange_rows(
                compute, rows, sizes, local_weights, "expert", balance=balance
            )
            return (out * cotangent).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(rows, local_weights)
        return out, *gradients

    parts = weights.reshape(DEVICES, -1, WIDTH)
    out, d_rows, d_weights = on_devices(one_device, rows, sizes, parts, cotangent)
    np.testing.assert_allclose(out, rows * weights[expert], rtol=1e-6)
    np.testing.assert_allclose(d_rows, cotangent * weights[expert], rtol=1e-6)
    wanted = np.zeros_like(weights)
    np.add.at(wanted, expert.reshape(-1), (rows * cotangent).reshape(-1, WIDTH))
    np.testing.assert_allclose(d_weights.reshape(-1, WIDTH), wanted, rtol=1e-5, atol=1e-6)
