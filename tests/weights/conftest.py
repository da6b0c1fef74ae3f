import importlib.util
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def _random_weights():
    spec = importlib.util.spec_from_file_location("random_weights", GOLDEN / "random_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


random_weights = _random_weights()
random_tensor = random_weights.random_tensor


@pytest.fixture
def vision_golden(golden_folder):
    """Return a function that does the same for multimodal cases, with tiles among the arrays."""

    def write(name: str, dtype=np.float32):
        folder, golden = golden_folder(name, dtype, "llama4_vision")
        return folder, with_tiles(golden, json.loads((folder / "config.json").read_text()))

    return write


def with_tiles(golden: dict, config: dict) -> dict:
    """Return the arrays of a multimodal case with the tiles that its model saw."""
    vision = config["vision_config"]
    tiles = random_weights.random_tiles(
        golden["features"].shape[0], vision["image_size"], vision["num_channels"]
    )
    return golden | {"tiles": tiles}


@pytest.fixture
def golden_folder(tmp_path):
    """Return a function that writes the HF folder of a golden case and gives (folder, arrays)."""

    def write(name: str, dtype=np.float32, suite: str = "transformers"):
        golden = dict(np.load(GOLDEN / suite / f"{name}.npz"))
        shapes = json.loads(str(golden["shapes"]))
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(str(golden["config"]))
        tensors = {n: random_tensor(n, tuple(s)).astype(dtype) for n, s in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
        return folder, golden

    return write
