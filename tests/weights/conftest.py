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


random_tensor = _random_weights().random_tensor


@pytest.fixture
def golden_folder(tmp_path):
    """Return a function that writes the HF folder of a golden case and gives (folder, arrays)."""

    def write(name: str, dtype=np.float32):
        golden = dict(np.load(GOLDEN / "transformers" / f"{name}.npz"))
        shapes = json.loads(str(golden["shapes"]))
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(str(golden["config"]))
        tensors = {n: random_tensor(n, tuple(s)).astype(dtype) for n, s in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
        return folder, golden

    return write
