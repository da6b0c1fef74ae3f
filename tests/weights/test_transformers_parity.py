"""Parity with transformers 5.23 on tiny random models: committed goldens, and live."""

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

from jaxherd.weights.load import load
from jaxherd.weights.save import save

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "transformers_cases.json").read_text())
COMMITTED = [name for name, case in CASES.items() if case.get("golden")]

_spec = importlib.util.spec_from_file_location(
    "transformers_parity", pathlib.Path(__file__).with_name("transformers_parity.py")
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


def oracle_python() -> str:
    """Return an interpreter with torch and transformers, or skip."""
    python = os.environ.get("JAXHERD_ORACLE_PYTHON")
    if python is None:
        if importlib.util.find_spec("torch") is None:
            pytest.skip("needs torch and transformers: set JAXHERD_ORACLE_PYTHON")
        python = sys.executable
    return python


@pytest.mark.parametrize("name", COMMITTED)
def test_logits_and_gradients(golden_folder, name):
    folder, golden = golden_folder(name)
    parity.check_logits_and_gradients(parity.loaded(folder, CASES[name]), golden)


@pytest.mark.parametrize(
    "name, pieces",
    [
        ("llama_gqa_tied", []),
        ("llama4_scout_like", []),
        ("llama4_scout_like", [4, 9, 9]),
        ("llama4_maverick_like", [10, 10]),
        ("llama4_explicit_lists", [3]),
    ],
)
def test_cached_decode_equals_the_full_forward_across_chunk_edges(golden_folder, name, pieces):
    folder, golden = golden_folder(name)
    parity.check_cached_decode(parity.loaded(folder, CASES[name]), golden, pieces)


def test_goldens_are_sensitive_to_what_they_should_catch(golden_folder):
    """A wrong gate order, router gate placement or rotation would not pass."""
    folder, golden = golden_folder("llama4_scout_like")
    config = json.loads((folder / "config.json").read_text())
    for change in (
        {"use_qk_norm": False},
        {"attention_chunk_size": 8},
        {"floor_scale": 5},
        {"attn_scale": 0.31},
        {"no_rope_layers": [1, 1, 0, 1]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        module, tokens = load(folder), jnp.asarray(golden["tokens"], jnp.int32)
        logits = jax.jit(lambda m, t: m(t), compiler_options=parity.QUICK)(module, tokens)
        assert np.abs(np.asarray(logits) - golden["logits"]).max() > 1e-3, change


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    script = GOLDEN / "make_transformers_goldens.py"
    subprocess.run([oracle_python(), str(script), "--live", str(folder)], check=True)
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_live_parity(live, name):
    """The folder is what transformers itself wrote."""
    golden = dict(np.load(live / name / "golden.npz"))
    module = parity.loaded(live / name, CASES[name])
    parity.check_logits_and_gradients(module, golden)
    parity.check_cached_decode(module, golden, [5, 4])
    jax.clear_caches()


READ_BACK = """
import sys, numpy as np, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
with torch.no_grad():
    logits = model.float()(torch.from_numpy(np.load(sys.argv[2])["tokens"])).logits
np.save(sys.argv[3], logits.numpy())
"""


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name", ["llama_biases_untied_head_dim", "llama_yarn", "llama4_scout_like"]
)
def test_transformers_reads_what_we_write(golden_folder, tmp_path, name):
    folder, golden = golden_folder(name)
    save(load(folder), tmp_path / "out", format="hf", max_shard_bytes=20_000)
    subprocess.run(
        [oracle_python(), "-c", READ_BACK, str(tmp_path / "out"),
         str(GOLDEN / "transformers" / f"{name}.npz"), str(tmp_path / "logits.npy")],
        check=True,
    )  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), golden["logits"], atol=1e-4)
