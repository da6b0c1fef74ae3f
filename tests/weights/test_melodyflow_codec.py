"""Codecs against torch: committed goldens, and live; and what bad state dicts are answered."""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import flatten, split
from jaxherd.models.codec_presets import melodyflow_codec
from jaxherd.weights.melodyflow_codec import (
    encodec_params,
    melodyflow_codec_params,
    name_table,
)

_spec = importlib.util.spec_from_file_location(
    "codec_parity", pathlib.Path(__file__).with_name("codec_parity.py")
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

COMMITTED = [name for name, case in parity.CASES.items() if case.get("golden")]


def golden(name: str) -> dict:
    return parity.read(parity.GOLDEN / "codec" / f"{name}.npz")


@pytest.mark.parametrize("name", COMMITTED)
def test_values_and_gradients(name):
    """Of two networks the gradients too; the live suite compares those of all."""
    with_gradients = name in ("seanet_snake", "encodec_reflect_shortcut")
    parity.check(parity.CASES[name], golden(name), with_gradients)


@pytest.mark.parametrize(
    "name, change",
    [
        ("encodec_noncausal_stereo", {"causal": True}),
        ("encodec_causal_mono_trim", {"trim_right_ratio": 1.0}),
        ("encodec_causal_mono_trim", {"dilation_base": 1}),
        ("encodec_reflect_shortcut", {"pad_mode": "constant"}),
        ("seanet_snake_causal_tanh", {"final_activation": None}),
    ],
)
def test_goldens_are_sensitive_to_what_they_should_catch(name, change):
    case = parity.CASES[name]
    changed = {**case, "config": {**case["config"], **change}}
    with pytest.raises(AssertionError):
        parity.check_codec(changed, golden(name), gradients=False)


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    python = os.environ.get("JAXHERD_ORACLE_PYTHON")
    if python is None:
        if importlib.util.find_spec("torch") is None:
            pytest.skip("needs torch and transformers: set JAXHERD_ORACLE_PYTHON")
        python = sys.executable
    folder = tmp_path_factory.mktemp("live")
    script = parity.GOLDEN / "make_codec_goldens.py"
    subprocess.run([python, str(script), "--live", str(folder)], check=True)
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("name", parity.CASES)
def test_live_parity(live, name):
    parity.check(parity.CASES[name], parity.read(live / f"{name}.npz"))


CASE = parity.CASES["seanet_snake"]


def the_state():
    return parity.state_dict(golden("seanet_snake"))


def test_names_of_the_published_checkpoint():
    """melodyflow.md 3.5, spelt out for some entries of the full codec."""
    table = {e.ours: e for e in name_table(melodyflow_codec())}
    assert len(table) == len(
        flatten(split(jax.eval_shape(melodyflow_codec().build, jax.random.key(0)))[1])
    )
    assert table["encoder/layers/0/g"].names == (
        "encoder.model.0.conv.conv.parametrizations.weight.original0",
        "encoder.model.0.conv.conv.weight_g",
    )
    assert table["encoder/layers/1/block/1/v"].names[0] == (
        "encoder.model.1.block.1.conv.conv.parametrizations.weight.original1"
    )
    assert table["encoder/layers/1/block/0/snake/alpha"].names == ("encoder.model.1.block.0.alpha",)
    assert table["encoder/layers/16/layers/1/hidden_kernel"].names == (
        "encoder.model.16.lstm.weight_hh_l1",
    )
    assert table["encoder/layers/18/v"].shape == (7, 2048, 256)
    assert table["decoder/layers/3/v"].names[1] == "decoder.model.3.convtr.convtr.weight_v"
    assert table["decoder/layers/18/bias"].names == ("decoder.model.18.conv.conv.bias",)


def test_old_names_and_multiplied_out_kernels_give_the_same_network():
    state, config = the_state(), parity.config_of(CASE)
    new = flatten(melodyflow_codec_params(state, config))
    old_names = {".parametrizations.weight.original0": ".weight_g",
                 ".parametrizations.weight.original1": ".weight_v"}  # fmt: skip

    def renamed(name):
        for new_name, old_name in old_names.items():
            name = name.replace(new_name, old_name)
        return name

    old = flatten(melodyflow_codec_params({renamed(n): t for n, t in state.items()}, config))
    assert new.keys() == old.keys() and all((new[k] == old[k]).all() for k in new)

    plain = {}
    for name, tensor in state.items():
        if name.endswith("original1"):
            g = state[name.replace("original1", "original0")]
            norm = np.sqrt(np.square(tensor).sum(axis=(1, 2), keepdims=True))
            plain[name.replace(".parametrizations.weight.original1", ".weight")] = g * tensor / norm
        elif not name.endswith("original0"):
            plain[name] = tensor
    wave = jnp.asarray(parity.random_weights.random_wave(1, 60, 2))
    outputs = []
    for tensors in (state, plain):
        definition, params, buffers = parity.loaded(CASE, tensors)
        outputs.append(definition.merge(params, buffers).encode(wave).mean_BTL)
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-3)


def test_everything_that_does_not_fit_is_listed_at_once():
    state, config = the_state(), parity.config_of(CASE)
    del state["encoder.model.0.conv.conv.bias"], state["decoder.model.1.lstm.bias_hh_l1"]
    state["encoder.model.0.conv.conv.extra"] = np.zeros(1)
    state["decoder.model.0.conv.conv.bias"] = np.zeros(3)
    state["encoder.model.1.block.0.alpha"] = state["encoder.model.1.block.0.alpha"][:, :2]
    with pytest.raises(JaxherdError) as error:
        melodyflow_codec_params(state, config)
    for part in ("encoder.model.0.conv.conv.bias", "decoder.model.1.lstm.bias_hh_l1",
                 "encoder.model.0.conv.conv.extra", "decoder.model.0.conv.conv.bias (",
                 "encoder.model.1.block.0.alpha ("):  # fmt: skip
        assert part in str(error.value)


def test_a_config_of_another_depth_is_told_and_the_quantiser_is_left_out():
    state, config = the_state(), parity.config_of(CASE)
    melodyflow_codec_params({**state, "quantizer.vq.layers.0._codebook.embed": np.zeros(1)}, config)
    shallow = dataclasses.replace(config, seanet=dataclasses.replace(config.seanet, lstm=1))
    with pytest.raises(JaxherdError, match="lstm.bias_hh_l1"):
        melodyflow_codec_params(state, shallow)
    with pytest.raises(JaxherdError, match="encoder.layers.0.conv"):
        encodec_params(state, config)
