"""Write llama4_int4.npz: Meta's int4 quantiser and packer on normal and on awkward weights.

Run with a Python that has torch 2.13.0 and llama-models 0.3.0 (no fbgemm_gpu: the module is
replaced, since the two functions used here are plain torch):

    python tests/golden/make_llama4_int4_golden.py
"""

import pathlib
import sys
import types

import numpy as np
import torch

for name in ("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai"):
    sys.modules[name] = types.ModuleType(name)

from llama_models.quantize_impls import int4_row_quantize, pack_int4  # noqa: E402


def weights() -> np.ndarray:
    rng = np.random.default_rng(0)
    w_NK = rng.normal(0, 0.02, (12, 384)).astype(np.float32)
    w_NK[0] = 0.0  # the floor of the scale
    w_NK[1] = 1e-8 * rng.normal(size=384)  # below the floor
    w_NK[2, ::7] = 3.0  # outliers: the rest rounds to zero
    w_NK[3] = np.where(np.arange(384) % 2, 0.5, -0.5)  # every value at the edge
    w_NK[4] = np.arange(384) % 17 * 0.0625 - 0.5  # halves: ties of the rounding
    w_NK[5, :128] = -w_NK[5, :128].__abs__()  # one sign
    return w_NK


def main() -> None:
    w_NK = weights()
    values, scales = int4_row_quantize(torch.tensor(w_NK))
    row = torch.tensor(w_NK).abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 448
    fp8 = (torch.tensor(w_NK) / row).clamp(-448, 448).to(torch.float8_e4m3fn)
    np.savez(
        pathlib.Path(__file__).with_name("llama4_int4.npz"),
        w=w_NK,
        values=values.numpy(),
        packed=pack_int4(values).numpy(),
        scales=scales.numpy(),
        fp8_bits=fp8.view(torch.uint8).numpy(),
        fp8_scales=row.numpy(),
    )


if __name__ == "__main__":
    main()
