"""The whole mixture on eight devices, values and gradients, against every expert on every token.

Buffers that the exchange leaves unwritten hold no numbers here: what leaks is seen.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.modules import abstract, split
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from jaxherd.layers import moe as moe_module
from jaxherd.layers.moe import Moe, MoeConfig

EXPERTS, WIDTH, HIDDEN, BATCH, TIME = 8, 16, 12, 8, 6
LAYOUTS = {
    # One expert a device, and two, of which a device regroups what arrives.
    "expert8": Layout("expert8", fsdp=1, expert=8),
    "expert4_fsdp2": Layout("expert4", fsdp=2, expert=4),
}
CONFIGS = {
    "llama4": MoeConfig(EXPERTS, 1, HIDDEN, 10),
    "two_of_softmax": MoeConfig(
        EXPERTS, 2, HIDDEN, score="softmax", renormalize=True, scale="output"
    ),
}
ROUTINGS = {
    "uniform": np.full(EXPERTS, 1 / EXPERTS),
    "skewed": np.arange(1, EXPERTS + 1) ** 3 / 1296,
    # Pairs of devices then have more rows than one round carries.
    "one_expert_takes_all": np.eye(EXPERTS)[5],
}


def tokens(routing: str):
    """Return x of which the first entries decide the expert, given a router that reads them."""
    rng = np.random.default_rng(0)
    x = 0.3 * rng.normal(size=(BATCH, TIME, WIDTH))
    if routing == "uniform":
        wanted = np.arange(BATCH * TIME).reshape(BATCH, TIME) % EXPERTS
    else:
        wanted = rng.choice(EXPERTS, size=(BATCH, TIME), p=ROUTINGS[routing])
    x[..., :EXPERTS] += 2 * np.eye(EXPERTS)[wanted]
    return jnp.asarray(x, jnp.float32), wanted


@functools.cache
def module(name: str):
    definition, params, buffers = split(Moe(CONFIGS[name], WIDTH, key=jax.random.key(0), std=0.4))
    router = 0.1 * params["router"].at[:EXPERTS].add(15 * jnp.eye(EXPERTS))
    return definition, {**params, "router": router}, buffers


def dense(params, x_BTD, config: MoeConfig):
    """Every expert on every token, weighed by the gates of the chosen ones."""
    logits_BTE = x_BTD @ params["router"]
    scores = jax.nn.sigmoid(logits_BTE) if config.score == "sigmoid" else jax.nn.softmax(logits_BTE)
    least = jnp.sort(logits_BTE, axis=-1)[..., -config.top_k, None]
    gates_BTE = jnp.where(logits_BTE >= least, scores, 0)
    if config.renormalize:
        gates_BTE = gates_BTE / gates_BTE.sum(axis=-1, keepdims=True)
    inward, outward = gates_BTE, (gates_BTE > 0).astype(jnp.float32)
    if config.scale == "output":
        inward, outward = outward, inward
    u_BTED = x_BTD[:, :, None] * inward[..., None]
    gate, up = (jnp.einsum("BTED,EDF->BTEF", u_BTED, params[name]) for name in ("gate", "up"))
    y_BTED = jnp.einsum("BTEF,EFD->BTED", jax.nn.silu(gate) * up, params["down"])
    y_BTD = (y_BTED * outward[..., None]).sum(axis=2)
    if config.shared_dim:
        g, u, d = (params["shared"][name]["kernel"] for name in ("gate", "up", "down"))
        y_BTD = y_BTD + (jax.nn.silu(x_BTD @ g) * (x_BTD @ u)) @ d
    return y_BTD


def close(found, wanted):
    for (path, one), (_, other) in zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree_util.tree_leaves_with_path(wanted),
        strict=True,
    ):
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, atol=1e-5 * max(scale, 1), err_msg=str(path))


def compare(name, layout, routing, implementation):
    config, (definition, params, buffers) = CONFIGS[name], module(name)
    x, wanted_expert = tokens(routing)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    partitioner = Partitioner.create(layout, jax.devices("cpu")[:8])

    def run(params, x):
        y, stats = definition.merge(params, buffers)(x, implementation=implementation)
        return (y * cotangent).sum(), (y, stats.load_E.sum(axis=0))

    def reference(params, x):
        y = dense(params, x, config)
        return (y * cotangent).sum(), y

    with partitioner.activate():
        grads, (y, load) = jax.jit(jax.grad(run, (0, 1), has_aux=True))(params, x)
    if config.top_k == 1:
        counts = np.bincount(wanted_expert.reshape(-1), minlength=EXPERTS)
        np.testing.assert_array_equal(load, counts)
    grads_wanted, y_wanted = jax.jit(jax.grad(reference, (0, 1), has_aux=True))(params, x)
    assert float(jnp.abs(grads_wanted[0]["router"]).max()) > 1e-3
    close(y, y_wanted)
    close(grads, grads_wanted)


@pytest.fixture
def unwritten_is_nan(monkeypatch):
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "name, layout",
    [("llama4", "expert8"), ("llama4", "expert4_fsdp2"), ("two_of_softmax", "expert4_fsdp2")],
)
def test_eight_devices_are_one(name, layout, routing, unwritten_is_nan):
    compare(name, LAYOUTS[layout], routing, None)


@pytest.mark.parametrize("layout, routing", [("expert4_fsdp2", "skewed"), ("expert8", "one_expert_takes_all")])  # fmt: skip
def test_the_tpu_kernels_on_eight_devices(layout, routing, unwritten_is_nan, monkeypatch):
    """The kernels of a TPU, interpreted, under the same exchange."""
    for name, kernel in (("grouped_swiglu", grouped_swiglu), ("grouped_matmul", grouped_matmul)):
        monkeypatch.setattr(moe_module, name, functools.partial(kernel, interpret=True))
    compare("llama4", LAYOUTS[layout], routing, "pallas_tpu")


@pytest.mark.filterwarnings("ignore")
def test_kernels_under_an_exchange_state_the_cost_of_a_uniform_load():
    """Lowered for four chips: the buffers hold twice the rows, of which half is tail."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    partitioner = Partitioner.create(Layout("four", fsdp=1, expert=4), devices)
    layer = abstract(lambda: Moe(MoeConfig(4, 1, 512), 256, key=jax.random.key(0)))
    definition, params, buffers = split(layer)

    def run(params, x):
        return definition.merge(params, buffers)(x, implementation="pallas_tpu")[0].sum()

    def array(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=partitioner.replicated())

    x = jax.ShapeDtypeStruct((4, 128, 256), jnp.float32, sharding=partitioner.replicated())
    with partitioner.activate():
        text = jax.jit(jax.grad(run)).lower(jax.tree.map(array, params), x).as_text()
    stated = {int(n) for n in re.findall(r"flops\\22:(\d+)", text)}
    one = 2 * 128 * 256 * 512
    assert "tensor<256x512xf32>" in text, "a buffer of twice the rows"
    products, element_wise = {one, 2 * one}, 8 * 128 * 512
    assert stated == products | {element_wise}, "of 128 rows: one product, gate and up, silu'"
