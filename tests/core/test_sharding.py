"""Every parameter of every preset is matched on purpose; `shard` is never a silent no-op."""

import functools
import json
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core import axes
from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import DEFAULT_RULES, Layout
from jaxherd.core.modules import abstract, flatten, split
from jaxherd.core.sharding import Partitioner, shard
from jaxherd.models.presets import PRESETS

GOLDEN = pathlib.Path(__file__).with_name("scout_sharding.json")
STANDARD = {
    "fsdp": Layout("fsdp", fsdp=8),
    "fsdp_expert": Layout("fsdp_expert", fsdp=4, expert=2),
    "fsdp_tensor": Layout("fsdp_tensor", fsdp=8, tensor=1),
    "sequence": Layout("sequence", fsdp=2, sequence=4),
}


@functools.cache
def variables(name: str):
    definition, params, buffers = split(abstract(PRESETS[name]().build, jax.random.key(0)))
    param_axes, buffer_axes = definition.axes()
    return flatten(params) | flatten(buffers), flatten(param_axes) | flatten(buffer_axes)


@pytest.fixture(params=STANDARD)
def partitioner(request, devices) -> Partitioner:
    return Partitioner.create(STANDARD[request.param], devices)


def test_every_axis_has_a_rule():
    assert DEFAULT_RULES.keys() == axes.ALL_AXES.keys()
    assert {mesh for rule in DEFAULT_RULES.values() for mesh in rule} <= axes.MESH_AXES.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_is_matched_on_purpose(preset, partitioner):
    shapes, names = variables(preset)
    assert shapes.keys() == names.keys()
    for path, leaf in shapes.items():
        assert len(names[path]) == leaf.ndim, path
        for name in names[path]:
            # None is said only of the routed experts' scores, which are small.
            assert name in axes.PARAMETER_AXES or (name is None and leaf.size < 1e9), path
        sharding = partitioner.sharding(names[path], leaf.shape, path)
        held = math.prod(sharding.shard_shape(leaf.shape))
        if leaf.size >= 1_000_000:
            assert held < leaf.size, f"{path} {leaf.shape} {names[path]} is on every device"


def test_golden_sharding_of_scout(devices):
    """Regenerate with JAXHERD_REGENERATE=1 and read the difference."""
    shapes, names = variables("llama4-scout")
    mesh = Partitioner.create(Layout("golden", fsdp=2, expert=2, tensor=2), devices)
    found = {
        path: {
            "shape": list(leaf.shape),
            "axes": list(names[path]),
            "spec": [list(p) if isinstance(p, tuple) else p for p in mesh.spec(names[path])],
        }
        for path, leaf in sorted(shapes.items())
    }
    if os.environ.get("JAXHERD_REGENERATE"):
        text = json.dumps(found, indent=1)
        GOLDEN.write_text(re.sub(r"\[\s+([^\[\]]*?)\s+\]", _one_line, text) + "\n")
    assert found == json.loads(GOLDEN.read_text())


def _one_line(match: re.Match) -> str:
    return "[" + re.sub(r"\s+", " ", match[1]) + "]"


@pytest.mark.parametrize(
    "names, sentence",
    [
        (("batch", "lenght"), "no logical axis 'lenght'; did you mean 'length'"),
        (("batch",), "1 names .* for an array of shape"),
        (("batch", "act_heads"), "'act_heads' of size 6 does not divide by 4 .*'t4'"),
    ],
)
def test_shard_raises(names, sentence, devices):
    mesh = Partitioner.create(Layout("t4", tensor=4, fsdp=2), devices)
    x = jnp.zeros((8, 6))
    with mesh.activate(), pytest.raises(JaxherdError, match=sentence):
        jax.jit(lambda x: shard(x, *names)).trace(x)
    if "act_heads" not in names:  # wrong names are wrong without a mesh, too
        with pytest.raises(JaxherdError, match=sentence):
            shard(x, *names)


def test_shard_really_constrains(devices):
    mesh = Partitioner.create(Layout("mixed", fsdp=4, tensor=2), devices)

    @jax.jit
    def run(x):
        with mesh.activate():
            return shard(x, "batch", "act_heads")

    x = np.arange(32.0).reshape(8, 4)
    y = run(jax.device_put(x, mesh.replicated()))
    assert y.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(y, x)


def test_one_mesh_axis_serves_one_dimension(devices):
    mesh = Partitioner.create(Layout("mixed", fsdp=2, expert=2, tensor=2), devices)
    spec = mesh.spec(("layers", "expert", "embed", "expert_mlp"))
    assert tuple(spec) == (None, "expert", "fsdp", "tensor")
    assert tuple(mesh.spec(("vocab", "embed"))) == ("tensor", ("fsdp", "expert"))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Layout("x", overrides=(("heds", ()),)), "no logical axis 'heds'; did you mean"),
        (lambda: Layout("x", overrides=(("heads", ("tenser",)),)), "no mesh axis 'tenser'; did"),
        (lambda: Layout("x", data=-1, fsdp=-1), "at most one may be -1"),
        (lambda: Layout("x", tensor=0), "must be positive"),
        (lambda: Layout("x", tensor=3).sizes(8), "multiple of 3 devices .* target has 8"),
    ],
)
def test_bad_layouts(make, sentence):
    with pytest.raises(JaxherdError, match=sentence):
        make()
