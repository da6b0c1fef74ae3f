"""Run auraloss on random waves and write its losses and their gradients.

    python tests/golden/make_auraloss_goldens.py                 the committed goldens
    python tests/golden/make_auraloss_goldens.py --live FOLDER   the same, elsewhere

Needs torch and auraloss (torch 2.13, auraloss 0.4 made the committed files).  In float64, so that
nothing of a difference is torch's rounding; how far its own float32 gradient is off goes along, since
1 / |S| of a bin that is nearly empty is not exact in any float32.
"""

import argparse
import json
import pathlib
import sys

import auraloss.freq
import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from random_weights import wave_pair  # noqa: E402

KINDS = {
    "resolutions": auraloss.freq.MultiResolutionSTFTLoss,
    "sum_difference": auraloss.freq.SumAndDifferenceSTFTLoss,
}


def run(case, dtype):
    """Return the loss and its gradient with respect to the output [B, T, C]."""
    torch.set_default_dtype(dtype)  # of the window, too
    convergence, logarithm, linear = case.get("factors", (1.0, 1.0, 0.0))
    loss = KINDS[case["kind"]](
        case["n_ffts"],
        case["hops"],
        case["windows"],
        w_sc=convergence,
        w_log_mag=logarithm,
        w_lin_mag=linear,
        eps=case.get("floor", 1e-8),
    )
    output, target = (
        torch.from_numpy(x).to(dtype).transpose(1, 2).contiguous()
        for x in wave_pair(2, case["length"], case["channels"])
    )
    output.requires_grad_()
    value = loss(output, target)
    value.backward()
    return value.detach().numpy(), output.grad.transpose(1, 2).numpy()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--live", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.live or HERE / "auraloss"
    folder.mkdir(exist_ok=True)
    for name, case in json.loads((HERE / "auraloss_cases.json").read_text()).items():
        loss, gradient = run(case, torch.float64)
        error = np.abs(run(case, torch.float32)[1] - gradient).max() / np.abs(gradient).max()
        out = {"loss": loss, "gradient": gradient.astype(np.float32), "float32_error": error}
        np.savez_compressed(folder / f"{name}.npz", **out)
        print(name, float(loss), float(error), (folder / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
