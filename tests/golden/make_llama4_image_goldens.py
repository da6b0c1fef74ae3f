"""Run the two published image transforms of Llama 4 and write their tiles.

    python tests/golden/make_llama4_image_goldens.py [FILE]

Writes tests/golden/llama4_images.npz, or FILE.  Needs torch, torchvision, pillow, transformers
(5.23.0 made the committed file) and the files of llama-models 0.3.0.  Pictures are not stored: they
follow from their sizes, see `random_weights.py` beside it.

Arrays, for each of `sizes`: `hf/HxW` and `meta/HxW`, tiles [N, Y, X, 3] of bytes before scaling;
`normalised`, the first of several tiles as transformers scales it, in bfloat16; `canvases`, rows
of (height, width, rows, columns, resized height, resized width) at the released tile size.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from random_weights import random_picture  # noqa: E402

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # A wheel built for another torch lacks its compiled operators, which no transform needs; only
    # their names must be known.
    for part in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[part]
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from PIL import Image  # noqa: E402
from transformers import Llama4ImageProcessor  # noqa: E402
from transformers.models.llama4 import image_processing_llama4 as hf  # noqa: E402

TILE = 12
SIZES = [(12, 12), (5, 7), (3, 40), (30, 80), (80, 60), (54, 96), (150, 200), (13, 13), (24, 36)]


def meta_module():
    """Return Meta's preprocessing file, without the package around it."""
    package = importlib.util.find_spec("llama_models")
    path = pathlib.Path(package.submodule_search_locations[0]) / "llama4" / "preprocess.py"
    spec = importlib.util.spec_from_file_location("preprocess", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bytes_last(tiles: torch.Tensor) -> np.ndarray:
    return tiles.permute(0, 2, 3, 1).numpy().round().astype(np.uint8)


def hf_tiles(picture: np.ndarray, **options) -> torch.Tensor:
    processor = Llama4ImageProcessor(size={"height": TILE, "width": TILE}, **options)
    return processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]


def meta_tiles(meta, picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    tiles, _ = meta.VariableSizeImageTransform(TILE)(image, 16, normalize_img=False)
    if len(tiles) > 1:
        whole = meta.ResizeNormalizeImageTransform(TILE, TILE)(image)
        tiles = torch.cat([tiles, whole[None] * 0.5 + 0.5])
    return bytes_last(tiles * 255)


def canvas(height: int, width: int) -> list[int]:
    options = torch.tensor(hf.find_supported_resolutions(16, hf.SizeDict(height=336, width=336)))
    best = [int(side) for side in hf.get_best_fit((height, width), options)]
    most = tuple(min(max(side, 336), limit) for side, limit in zip((height, width), best))
    resized = hf.get_max_res_without_distortion((height, width), most)
    return [height, width, best[0] // 336, best[1] // 336, *(max(side, 1) for side in resized)]


def main() -> None:
    torch.set_num_threads(1)
    meta, out = meta_module(), {"sizes": np.array(SIZES)}
    for height, width in SIZES:
        picture = random_picture(height, width)
        plain = hf_tiles(picture, do_rescale=False, do_normalize=False)
        out[f"hf/{height}x{width}"] = bytes_last(plain)
        out[f"meta/{height}x{width}"] = meta_tiles(meta, picture)
    out["normalised"] = hf_tiles(random_picture(54, 96))[:2].float().permute(0, 2, 3, 1).numpy()
    random = np.random.RandomState(0)
    sides = np.exp(random.uniform(0, np.log(9000), (400, 2))).astype(int).tolist()
    sides += [[336 * a + d, 336 * b + e] for a in (1, 2, 5) for b in (1, 3, 4)
              for d in (-1, 0, 1) for e in (0, 1)]  # fmt: skip
    out["canvases"] = np.array([canvas(height, width) for height, width in sides], np.int32)
    target = sys.argv[1] if len(sys.argv) > 1 else HERE / "llama4_images.npz"
    np.savez_compressed(target, **out)
    print({name: value.shape for name, value in out.items()})


if __name__ == "__main__":
    main()
