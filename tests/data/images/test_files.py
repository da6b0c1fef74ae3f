"""Image files: what is read, how it looks, and what is refused in one sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxherd.core.errors import JaxherdError
from jaxherd.data.images import Limits, read_image


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def colours(height=5, width=7):
    return np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_formats(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"a.{suffix}", colours(), **options)
    np.testing.assert_array_equal(read_image(path), colours())


def test_jpeg_and_grey(tmp_path):
    flat = np.full((9, 9, 3), 77, np.uint8)
    assert np.abs(read_image(saved(tmp_path / "a.jpg", flat)).astype(int) - 77).max() <= 1
    grey = colours()[..., 0]
    read = read_image(saved(tmp_path / "a.png", grey))
    np.testing.assert_array_equal(read, np.repeat(grey[..., None], 3, axis=2))


def test_transparency_lies_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, 1] = (200, 100, 0, 255)
    rgba[0, 2] = (200, 100, 0, 128)
    read = read_image(saved(tmp_path / "a.png", rgba))
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[0, 1].tolist() == [200, 100, 0]
    assert np.abs(read[0, 2].astype(int) - [227, 177, 127]).max() <= 1
    # In a palette, too, and with grey.
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png")[0].tolist() == [[255] * 3, [9] * 3]
    la = saved(tmp_path / "la.png", np.array([[[10, 0], [10, 255]]], np.uint8))
    assert read_image(la)[0].tolist() == [[255] * 3, [10] * 3]


def test_a_cameras_orientation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: shown after a quarter turn to the right
    path = saved(tmp_path / "a.png", colours(), exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(colours(), -1))


def test_sixteen_bits(tmp_path):
    levels = np.array([[0, 128 * 257, 65535]], np.uint16)
    assert read_image(saved(tmp_path / "a.png", levels))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(JaxherdError, match="kind 'F', whose white is not known"):
        read_image(saved(tmp_path / "a.tiff", np.ones((2, 2), np.float32)))


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def test_what_is_refused(tmp_path, recwarn):
    buffer = io.BytesIO()
    Image.fromarray(colours(90, 90)).save(buffer, "PNG")
    whole, bomb = buffer.getvalue(), tmp_path / "bomb.png"
    cases = {
        "text.png": (b"hello", "none of PNG"),
        "empty.png": (b"", "none of PNG"),
        "half.png": (whole[: len(whole) // 2], "cannot be decoded as an image"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG"),
        "bomb.png": (png_claiming(30_000, 30_000), "far too many pixels|claims 30000 by 30000"),
        "big.png": (png_claiming(10_000, 9_000), "claims 10000 by 9000 pixels, more than the 80"),
        "long.png": (png_claiming(70_000, 1), "65,500 a side"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(JaxherdError, match=message) as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
    with pytest.raises(JaxherdError, match="no image file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(JaxherdError, match="no image file"):
        read_image(tmp_path)
    with pytest.raises(JaxherdError, match="more than the 10 that are read"):
        read_image(bomb, limits=Limits(file_bytes=10))
    assert not recwarn.list
