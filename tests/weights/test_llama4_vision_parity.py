"""Parity with the multimodal Llama 4 of transformers 5.23: committed goldens, and live.

What must fail if it were wrong: the class token's place, the rotation by column and row from 1, the
order of the shuffle, the GELU after the adapter's second layer, which tokens take features.
"""

import importlib.util
import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jaxherd.layers.attention import SequenceInfo
from jaxherd.weights.load import load
from jaxherd.weights.save import save

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE.parent / "golden"
CASES = json.loads((GOLDEN / "llama4_vision_cases.json").read_text())
COMMITTED = [name for name, case in CASES.items() if case.get("golden")]


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parity, live_suite = _beside("transformers_parity"), _beside("test_transformers_parity")
with_tiles = _beside("conftest").with_tiles


def jitted(function):
    return jax.jit(function, compiler_options=parity.QUICK)


def check(module, golden) -> None:
    """Compare every stage from tiles to gradients."""
    tiles = jnp.asarray(golden["tiles"])
    states, features, projected = jitted(
        lambda m, x: (m.vision.states(x), m.vision(x), m.project(x))
    )(module, tiles)
    np.testing.assert_allclose(states, golden["states"][:, :-1], atol=1e-4, rtol=0)
    np.testing.assert_allclose(features, golden["features"], atol=1e-4, rtol=1e-5)
    flat = np.asarray(projected).reshape(golden["projected"].shape)
    np.testing.assert_allclose(flat, golden["projected"], atol=1e-4, rtol=1e-5)
    parity.check_logits_and_gradients(module, golden, images=tiles)


@pytest.mark.parametrize("name", COMMITTED)
def test_tower_logits_and_gradients(vision_golden, name):
    folder, golden = vision_golden(name)
    check(load(folder), golden)


def _of_grid(columns, rows):
    """Return `SequenceInfo.of_grid` with other coordinates."""
    right = SequenceInfo.of_grid

    def wrong(config, given_columns, given_rows, batch):
        return right(
            config, columns(given_columns, given_rows), rows(given_columns, given_rows), batch
        )

    return wrong


def zero_based(numbers):
    return [max(n - 1, 0) for n in numbers]


WRONG = {
    "patches list pixels before colours": ("unfold", lambda x, side: rearrange(
        x, "N (i y) (j x) C -> N (i j) (y x C)", y=side, x=side)),
    "blocks go down before right": ("shuffle_patches", lambda x, block: rearrange(
        x, "N (i y j x) D -> N (i j) (x y D)", i=4 // block, y=block, x=block, j=4 // block)),
    "coordinates from 0": ("SequenceInfo.of_grid", _of_grid(
        lambda c, r: zero_based(c), lambda c, r: zero_based(r))),
    "row first": ("SequenceInfo.of_grid", _of_grid(lambda c, r: r, lambda c, r: c)),
    "the class token turns": ("SequenceInfo.of_grid", _of_grid(
        lambda c, r: [*c[:-1], 1], lambda c, r: [*r[:-1], 1])),
    "gelu by tanh": ("jax.nn.gelu", lambda x, approximate: gelu(x, approximate=True)),
}  # fmt: skip
gelu = jax.nn.gelu


@pytest.mark.parametrize("what", WRONG)
def test_goldens_are_sensitive_to_what_they_should_catch(vision_golden, monkeypatch, what):
    folder, golden = vision_golden("two_images_in_a_row")
    name, replacement = WRONG[what]
    monkeypatch.setattr(f"jaxherd.models.vision_tower.{name}", replacement)
    features = jitted(lambda m, x: m.vision(x))(load(folder), jnp.asarray(golden["tiles"]))
    assert np.abs(features - golden["features"]).max() > 2e-4


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live-vision")
    script = GOLDEN / "make_llama4_vision_goldens.py"
    subprocess.run([live_suite.oracle_python(), str(script), "--live", str(folder)], check=True)
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_live_parity(live, name):
    """The folder is what transformers itself wrote."""
    config = json.loads((live / name / "config.json").read_text())
    check(load(live / name), with_tiles(dict(np.load(live / name / "golden.npz")), config))


READ_BACK = """
import sys, numpy as np, torch, transformers
model = transformers.Llama4ForConditionalGeneration.from_pretrained(
    sys.argv[1], attn_implementation="eager")
given = np.load(sys.argv[2])
with torch.no_grad():
    pixels = torch.from_numpy(given["tiles"].transpose(0, 3, 1, 2))
    logits = model.float()(torch.from_numpy(given["tokens"]), pixel_values=pixels).logits
np.save(sys.argv[3], logits.numpy())
"""


@pytest.mark.oracle
@pytest.mark.parametrize("name", COMMITTED)
def test_transformers_reads_what_we_write(vision_golden, tmp_path, name):
    folder, golden = vision_golden(name)
    save(load(folder), tmp_path / "out", format="hf", max_shard_bytes=20_000)
    np.savez(tmp_path / "given.npz", tokens=golden["tokens"], tiles=golden["tiles"])
    paths = [str(tmp_path / part) for part in ("out", "given.npz", "logits.npy")]
    subprocess.run([live_suite.oracle_python(), "-c", READ_BACK, *paths], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), golden["logits"], atol=1e-4)
