"""T5 folders: parity with transformers, round trips, and what is left out."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, count_params, split
from jaxherd.models.t5_encoder import T5EncoderConfig, relative_buckets, t5_base
from jaxherd.weights.load import load
from jaxherd.weights.save import save

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "melodyflow_cases.json").read_text())["t5"]

_spec = importlib.util.spec_from_file_location("random_weights", GOLDEN / "random_weights.py")
random_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_weights)


@pytest.fixture
def t5_folder(tmp_path):
    def write(name: str):
        golden = dict(np.load(GOLDEN / "melodyflow" / f"{name}.npz"))
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(str(golden["config"]))
        shapes = json.loads(str(golden["shapes"]))
        tensors = {n: random_weights.random_tensor(n, tuple(s)) for n, s in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
        return folder, golden

    return write


def check(folder, golden):
    module = load(folder)
    tokens, mask = jnp.asarray(golden["tokens"], jnp.int32), jnp.asarray(golden["mask"]) > 0
    run = jax.jit(lambda m, tokens, mask: m(tokens, mask))
    np.testing.assert_allclose(run(module, tokens, mask), golden["states"], atol=1e-4, rtol=0)
    return module, run, tokens, mask


@pytest.mark.parametrize("name", CASES)
def test_states_are_those_of_transformers(t5_folder, name):
    folder, golden = t5_folder(name)
    module, run, tokens, mask = check(folder, golden)
    assert count_params(module) == module.config.num_params()
    # The mask counts: padding changes nothing, and its absence does.
    half = CASES[name]["length"] // 2
    other = tokens.at[1, half:].set((tokens[1, half:] + 1) % 40)
    states = run(module, tokens, mask)
    np.testing.assert_allclose(run(module, other, mask)[1, :half], states[1, :half], atol=1e-5)
    assert np.abs(run(module, tokens, jnp.ones_like(mask))[1] - states[1]).max() > 1e-2


def test_the_decoder_is_left_out_and_other_strangers_are_named(t5_folder):
    folder, golden = t5_folder("t5_whole")
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("decoder.") for name in tensors)
    assert set(load(folder).config.__dict__) == set(T5EncoderConfig.__dataclass_fields__)
    save_file(tensors | {"encoder.extra": np.zeros(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(JaxherdError, match="unknown: encoder.extra"):
        load(folder)
    save_file(
        tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"] + 1},
        folder / "model.safetensors",
    )
    with pytest.raises(JaxherdError, match="encoder.embed_tokens.weight differs"):
        load(folder)


@pytest.mark.parametrize("name", ["t5_relu", "t5_gated"])
def test_round_trips_bit_by_bit(t5_folder, tmp_path, name):
    folder, _ = t5_folder(name)
    module, tensors = load(folder), load_file(folder / "model.safetensors")
    save(module, tmp_path / "hf", format="hf")
    again = load_file(tmp_path / "hf" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(again[key], value)
    save(module, tmp_path / "own", format="jaxherd")
    for source in ("hf", "own"):
        other = load(tmp_path / source)
        assert other.config == module.config
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(module)):
            np.testing.assert_array_equal(a, b)


def test_base_has_the_published_size():
    """t5-base's encoder with its table: 109.6 M parameters."""
    _, params, _ = split(abstract(t5_base().build, jax.random.key(0)))
    assert count_params(params) == t5_base().num_params() == 109_628_544


def test_buckets():
    buckets = relative_buckets(300, 32, 128)
    assert buckets.min() == 0 and buckets.max() == 31
    np.testing.assert_array_equal(buckets[200, 200:208], [0, *range(17, 24)])
    np.testing.assert_array_equal(buckets[200, 193:200], range(7, 0, -1))
    assert buckets[299, 0] == 15 and buckets[0, 299] == 31
    # Whole logarithms: 8, 16, 32, 64 behind are the first of their buckets.
    assert [buckets[200, 200 - d] for d in (8, 15, 16, 31, 32, 64)] == [8, 9, 10, 11, 12, 14]


def test_errors():
    with pytest.raises(JaxherdError, match="feed_forward_proj 'gated-silu'"):
        from jaxherd.weights.hf_config import read_config

        read_config({"model_type": "t5", "feed_forward_proj": "gated-silu"})
    assert T5EncoderConfig(40, 8, 1, 2, 4, 8).forward_flops(1, 2) == 2 * 2 * (4 * 64 + 2 * 64) + 128


def oracle_python() -> str:
    python = os.environ.get("JAXHERD_ORACLE_PYTHON")
    if python is None:
        if importlib.util.find_spec("torch") is None:
            pytest.skip("needs torch and transformers: set JAXHERD_ORACLE_PYTHON")
        python = sys.executable
    return python


READ_BACK = """
import sys, numpy as np, torch, transformers
golden = np.load(sys.argv[2])
model = transformers.T5EncoderModel.from_pretrained(sys.argv[1]).float().eval()
with torch.no_grad():
    out = model(torch.from_numpy(golden["tokens"]), attention_mask=torch.from_numpy(golden["mask"]))
np.save(sys.argv[3], out.last_hidden_state.numpy())
"""


@pytest.mark.oracle
def test_live_parity_and_reading_back(tmp_path):
    """The folders are what transformers itself wrote, and it reads what we write."""
    script = GOLDEN / "make_melodyflow_goldens.py"
    subprocess.run([oracle_python(), str(script), "--live", str(tmp_path)], check=True)
    for name in CASES:
        module, *_ = check(tmp_path / name, dict(np.load(tmp_path / f"{name}.npz")))
        save(module, tmp_path / "back" / name, format="hf")
        out = tmp_path / f"{name}.npy"
        subprocess.run(
            [oracle_python(), "-c", READ_BACK, str(tmp_path / "back" / name),
             str(tmp_path / f"{name}.npz"), str(out)],
            check=True,
        )  # fmt: skip
        states = np.load(tmp_path / f"{name}.npz")["states"]
        np.testing.assert_allclose(np.load(out), states, atol=1e-4)
