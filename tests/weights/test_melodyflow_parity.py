"""Parity of the velocity network with plain torch modules: committed goldens, and live."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.layers import rope as rope_lib
from jaxherd.layers.rope import RopeConfig
from jaxherd.weights.melodyflow_flow import read_flow_state, write_flow_state

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "melodyflow_cases.json").read_text())["flow"]

_spec = importlib.util.spec_from_file_location("random_weights", GOLDEN / "random_weights.py")
random_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_weights)


def state_of(golden) -> dict[str, np.ndarray]:
    shapes = json.loads(str(golden["shapes"]))
    size = 8
    frequencies = 10000.0 ** (-np.arange(0, size, 2, dtype=np.float32) / size)
    return {
        name: frequencies
        if name.endswith("frequencies")
        else random_weights.random_tensor(name, tuple(shape))
        for name, shape in shapes.items()
    }


def settings_of(case) -> dict:
    names = ("positional_scale", "add_zero_attn", "norm_first")
    given = {name: case[name] for name in names if name in case}
    if case.get("positional") == "sin_rope":
        given["positional"] = "sin_rope"
    return {"num_heads": 2, **given}


def velocity(module, golden, z):
    condition = module.condition({k: golden[k] for k in ("text_states", "text_mask")})
    return module(z, jnp.asarray(golden["t"]), condition)


def check(golden, case):
    module = read_flow_state(state_of(golden), **settings_of(case)).module

    def loss(z, module):
        v = velocity(module, golden, z)
        return jnp.square(v).mean(), v

    gradient, v = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(golden["z"]), module)
    # Up to eight layers with weights of 0.3: 1e-5 of the largest value for one layer, 1e-4 beyond.
    bound = np.abs(golden["v"]).max() * (1e-5 if case["layers"] == 1 else 1e-4)
    np.testing.assert_allclose(v, golden["v"], atol=bound, rtol=0)
    bound = 1e-4 * np.abs(golden["grad_z"]).max()
    np.testing.assert_allclose(gradient, golden["grad_z"], atol=bound, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_velocities_and_gradients(name):
    check(dict(np.load(GOLDEN / "melodyflow" / f"{name}.npz")), CASES[name])


@pytest.mark.parametrize(
    "name, changes",
    [
        ("eight_layers_rope", {"positional": "sin_rope"}),
        ("five_layers_sin_biases", {"add_zero_attn": False}),
        ("post_norm", {"norm_first": True}),
        ("sin_rope_scales_norms", {"positional_scale": 0.72}),
    ],
)
def test_goldens_are_sensitive_to_what_they_should_catch(name, changes):
    golden = dict(np.load(GOLDEN / "melodyflow" / f"{name}.npz"))
    module = read_flow_state(state_of(golden), **{**settings_of(CASES[name]), **changes}).module
    v = jax.jit(lambda m: velocity(m, golden, jnp.asarray(golden["z"])))(module)
    assert np.abs(v - golden["v"]).max() > 1e-2


def test_the_modulo_order_matters():
    """The golden would not pass with the skip projections in their plain order."""
    golden = dict(np.load(GOLDEN / "melodyflow" / "eight_layers_rope.npz"))
    state, names = state_of(golden), [f"transformer.skip_projections.{i}.weight" for i in range(3)]
    shifted = {**state, **{a: state[b] for a, b in zip(names, [names[2], names[0], names[1]])}}
    modules = [read_flow_state(s, num_heads=2).module for s in (state, shifted)]
    assert modules[0].config.skip_order() == (2, 0, 1)
    run = jax.jit(lambda m: velocity(m, golden, jnp.asarray(golden["z"])))
    assert np.abs(run(modules[0]) - run(modules[1])).max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_state_dicts_survive_bit_by_bit(name):
    golden = dict(np.load(GOLDEN / "melodyflow" / f"{name}.npz"))
    state = {n.replace(".mha.", "."): x for n, x in state_of(golden).items()}
    again = write_flow_state(read_flow_state(state, **settings_of(CASES[name])))
    assert again.keys() == state.keys()
    for key, value in state.items():
        if not key.endswith("frequencies"):
            np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_all_that_does_not_fit_is_said_at_once():
    golden = dict(np.load(GOLDEN / "melodyflow" / "six_layers_rope.npz"))
    state = state_of(golden)
    state["transformer.layers.3.norm1.gain"] = state.pop("transformer.layers.3.norm1.weight")
    state["out_proj.weight"] = state["out_proj.weight"].T
    with pytest.raises(JaxherdError) as error:
        read_flow_state(state, num_heads=2)
    for part in (
        "missing: transformer.layers.3.norm1.weight",
        "unknown: transformer.layers.3.norm1.gain",
        "wrong shape: out_proj.weight is (16, 6) instead of (6, 16)",
    ):
        assert part in str(error.value)
    # However many they are, each is named.
    state = state_of(golden)
    rest = re.compile(r"transformer\.layers\.[1-5]\..*(norm|linear).*weight")
    taken = [name for name in state if rest.fullmatch(name)]
    strangers = [name + ".other" for name in taken]
    kept = {name: value for name, value in state.items() if name not in taken}
    with pytest.raises(JaxherdError) as error:
        read_flow_state({**kept, **dict.fromkeys(strangers, np.zeros(2))}, num_heads=2)
    assert len(taken) > 12
    told = re.split(r"[ ,;]+", str(error.value).rstrip("."))
    assert {name.replace(".mha.", ".") for name in (*taken, *strangers)} <= set(told)
    with pytest.raises(JaxherdError, match="no multiple of the assumed head size 64"):
        read_flow_state(state_of(golden))
    with pytest.raises(JaxherdError, match="frequencies"):
        read_flow_state(state_of(golden), num_heads=4)
    with pytest.raises(JaxherdError, match="no flow model"):
        read_flow_state({"encoder.weight": np.zeros(2)})


def test_rotations_that_were_stored_in_bfloat16_are_kept():
    """Torch turns by the table of the file, whatever it was rounded to."""
    golden = dict(np.load(GOLDEN / "melodyflow" / "six_layers_rope.npz"))
    state, name = state_of(golden), "transformer.rope.frequencies"
    rounded = state[name].astype(jnp.bfloat16).astype(np.float32)
    assert (rounded != state[name]).any()
    module = read_flow_state({**state, name: rounded}, num_heads=2).module
    assert module.config.rope_rounding == "bfloat16"
    assert read_flow_state(state, num_heads=2).module.config.rope_rounding == "none"
    again = write_flow_state(read_flow_state({**state, name: rounded}, num_heads=2))
    np.testing.assert_array_equal(again[name], rounded)
    positions = jnp.full((1, 1), 700)
    cos, sin = rope_lib.angles(RopeConfig(), 8, positions, rounded_to="bfloat16")
    np.testing.assert_allclose(cos[0, 0], np.cos(700 * rounded), atol=1e-4)
    np.testing.assert_allclose(sin[0, 0], np.sin(700 * rounded), atol=1e-4)
    for other in (rounded * 1.02, state[name] * (1 + 1e-4)):
        with pytest.raises(JaxherdError, match="base 10000"):
            read_flow_state({**state, name: other}, num_heads=2)
    one = {"transformer.layers.0.self_attn.rope.frequencies": state[name], name: rounded}
    with pytest.raises(JaxherdError, match="different tables"):
        read_flow_state({**state, **one}, num_heads=2)


@pytest.mark.oracle
def test_live_parity(tmp_path):
    python = os.environ.get("JAXHERD_ORACLE_PYTHON", sys.executable)
    if "JAXHERD_ORACLE_PYTHON" not in os.environ and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch and transformers: set JAXHERD_ORACLE_PYTHON")
    script = GOLDEN / "make_melodyflow_goldens.py"
    subprocess.run([python, str(script), "--live", str(tmp_path)], check=True)
    for name, case in CASES.items():
        check(dict(np.load(tmp_path / f"{name}.npz")), case)
