"""Canvas, resizing and tiles against both published transforms; the token layout's lengths."""

import importlib.util
import os
import pathlib
import subprocess

import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data.images import (
    ImageTokens,
    Tiling,
    choose_canvas,
    fitted_size,
    image_length,
    image_tokens,
    normalise,
    tile_image,
)
from jaxherd.data.images.tiles import canvases, tile_pixels
from jaxherd.data.tokenizers import ByteTokenizer

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
FILE = GOLDEN / "llama4_images.npz"
TILE = Tiling(tile_size=12)

_spec = importlib.util.spec_from_file_location("random_weights", GOLDEN / "random_weights.py")
random_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_weights)
random_picture = random_weights.random_picture


@pytest.mark.parametrize(
    "width, height, canvas",
    [
        (336, 336, (1, 1)), (300, 800, (3, 1)), (800, 600, (2, 3)), (1920, 1080, (3, 5)),
        (4000, 3000, (3, 4)),
    ],
)  # fmt: skip
def test_the_published_examples(width, height, canvas):
    """llama4.md 4."""
    assert choose_canvas(height, width) == canvas


def test_canvases():
    assert len(canvases(16)) == 50 and len(canvases(1)) == 1
    assert all(r * c <= 7 for r, c in canvases(7))


def check(golden) -> None:
    for height, width, *wanted in golden["canvases"].tolist():
        found = [*choose_canvas(height, width), *fitted_size(height, width)]
        assert found == wanted, (height, width)
    for height, width in golden["sizes"].tolist():
        tiles, (rows, columns) = tile_pixels(random_picture(height, width), TILE)
        assert len(tiles) == rows * columns + (rows * columns > 1)
        name = f"{height}x{width}"
        # Meta's code resizes with Pillow, as this one does: equal to the bit.
        np.testing.assert_array_equal(tiles, golden[f"meta/{name}"])
        # transformers resizes with torch, whose weights have other rounding: one level of 255.
        difference = np.abs(tiles.astype(int) - golden[f"hf/{name}"].astype(int))
        assert difference.max() <= 1, name
    # And it scales colours in bfloat16, 8 bits: an error of 2^-8 in [-1, 1], and twice one in x / 255.
    tiles, _ = tile_image(random_picture(54, 96), TILE)
    assert np.abs(tiles[:2] - golden["normalised"]).max() < 2 / 255 + 2**-8 + 2**-8


def test_tiles_are_those_of_the_published_transforms():
    check(np.load(FILE))


@pytest.mark.oracle
def test_live_tiles(tmp_path):
    python = os.environ.get("JAXHERD_ORACLE_PYTHON")
    if python is None:
        pytest.skip("needs torchvision, transformers and llama-models: set JAXHERD_ORACLE_PYTHON")
    script = str(GOLDEN / "make_llama4_image_goldens.py")
    run = subprocess.run([python, script, str(tmp_path / "x.npz")], capture_output=True, text=True)
    if "No module named" in run.stderr or "submodule_search_locations" in run.stderr:
        pytest.skip("needs torchvision and llama-models: " + run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr
    check(np.load(tmp_path / "x.npz"))


def test_tiles_go_row_by_row_and_the_whole_comes_last():
    image = np.zeros((24, 36, 3), np.uint8)
    for n in range(6):
        image[n // 3 * 12 :, n % 3 * 12 :] = 40 * n
    tiles, canvas = tile_pixels(image, TILE)
    assert canvas == (2, 3) and tiles.shape == (7, 12, 12, 3)
    assert [int(t.mean()) for t in tiles[:6]] == [0, 40, 80, 120, 160, 200]
    assert tiles[6, 0, 0, 0] == 0 and tiles[6, -1, -1, 0] == 200  # stretched, all of it
    # A single tile has no second view.
    assert tile_pixels(image[:12, :12], TILE)[0].shape == (1, 12, 12, 3)


def test_what_is_padded_is_black():
    image = np.full((6, 10, 3), 255, np.uint8)
    tiles, canvas = tile_image(image, TILE)
    assert canvas == (1, 1) and fitted_size(6, 10, TILE) == (7, 12)
    np.testing.assert_array_equal(tiles[0, :7], 1.0)
    np.testing.assert_array_equal(tiles[0, 7:], -1.0)


def test_colours_are_scaled_in_float32():
    levels = np.arange(256, dtype=np.uint8)
    scaled = normalise(levels)
    assert scaled.dtype == np.float32 and (scaled[0], scaled[255]) == (-1.0, 1.0)
    np.testing.assert_allclose(scaled, levels / 127.5 - 1, atol=1e-6)


def test_thin_images_and_fewer_tiles():
    assert fitted_size(1, 5000) == (1, 5000) and choose_canvas(1, 5000) == (1, 15)
    assert fitted_size(1, 9000) == (1, 5376) and choose_canvas(1, 9000) == (1, 16)
    assert choose_canvas(3000, 4000, Tiling(max_tiles=1)) == (1, 1)
    assert choose_canvas(3000, 4000, Tiling(max_tiles=4)) == (2, 2)
    with pytest.raises(JaxherdError, match="at least 1"):
        Tiling(max_tiles=0)
    with pytest.raises(JaxherdError, match="holds nothing"):
        tile_image(np.zeros((0, 4, 3), np.uint8))


def test_lengths():
    """llama4.md 4: 147 for one tile, 147 + 145 R C for more; 2x3 is 1017, 16 tiles are 2467."""
    assert [image_length(r, c) for r, c in ((1, 1), (2, 3), (4, 4), (1, 16))] == [
        147, 1017, 2467, 2467
    ]  # fmt: skip
    for canvas in canvases(16):
        assert len(image_tokens(*canvas)) == image_length(*canvas)
        tiles = canvas[0] * canvas[1]
        assert image_tokens(*canvas).count(200092) == 144 * (tiles + (tiles > 1))


def test_the_order_of_tokens():
    marks = ImageTokens(1, 2, 3, 4, 5, 9)
    assert image_tokens(1, 1, 2, marks) == [1, 5, 9, 9, 2]
    assert image_tokens(2, 3, 1, marks) == [1, 9, 3, 9, 3, 9, 4, 9, 3, 9, 3, 9, 4, 5, 9, 2]
    assert image_tokens(2, 1, 1, marks) == [1, 9, 4, 9, 4, 5, 9, 2]


def test_ids_come_from_the_tokenizer():
    class Marks(ByteTokenizer):
        def special_tokens(self):
            names = ["image_start", "image_end", "tile_x_separator", "tile_y_separator", "image"]
            return {f"<|{name}|>": 300 + i for i, name in enumerate([*names, "patch"])}

    assert ImageTokens.of(Marks()) == ImageTokens(300, 301, 302, 303, 304, 305)
    with pytest.raises(JaxherdError, match=r"no <\|image_start\|>, .*<\|patch\|>, which stand"):
        ImageTokens.of(ByteTokenizer())
