"""Frames of a video: which are taken."""

import numpy as np
import pytest
from PIL import Image

from jaxherd.core.errors import JaxherdError
from jaxherd.data.images import Limits, animation_frames, frame_indices, sample_frames


def steady(count: int, fps: float) -> tuple[list[float], float]:
    return [i / fps for i in range(count)], count / fps


@pytest.mark.parametrize("source, fps, wanted", [
    (30, 1, [0, 30, 60]), (30, 2, [0, 15, 30, 45, 60, 75]), (25, 10, [0, 2, 5, 7]),
    (10, 10, list(range(9))), (10, 1000, list(range(9))), (3, 2, [0, 1, 3, 4]), (24, 0.5, [0, 48]),
])  # fmt: skip
def test_frames_at_a_rate(source, fps, wanted):
    """Frame i is on the screen from i / source on; the one seen at k / fps is taken, once."""
    count = wanted[-1] + 1
    assert frame_indices(*steady(count, source), fps=fps) == wanted
    assert sample_frames(range(count), source_fps=source, fps=fps) == wanted


def test_frames_of_unequal_length():
    starts = [0.0, 0.1, 0.2, 2.5, 2.6]
    assert frame_indices(starts, 3.0, fps=1) == [0, 2]
    assert frame_indices(starts, 3.1, fps=1) == [0, 2, 4]
    assert frame_indices(starts, 3.0, fps=2) == [0, 2, 3]


def test_a_limit_thins_evenly():
    starts, end = steady(100, 10)
    assert frame_indices(starts, end, fps=10, limit=5) == [0, 25, 50, 74, 99]
    assert frame_indices(starts, end, fps=10, limit=1) == [0]
    assert frame_indices(starts, end, fps=1, limit=10) == list(range(0, 100, 10))
    assert sample_frames(iter(range(100)), source_fps=10, fps=10, limit=2) == [0, 99]


@pytest.mark.parametrize(
    "options", [{"fps": 0}, {"fps": -1}, {"fps": float("nan")}, {"fps": 1, "limit": 0}]
)
def test_impossible_rates(options):
    with pytest.raises(JaxherdError, match="fps must be above 0"):
        frame_indices([0.0], 1.0, **options)
    with pytest.raises(JaxherdError, match="fps must be above 0"):
        sample_frames([1], source_fps=1, **options)


def test_no_frames():
    with pytest.raises(JaxherdError, match="no frame"):
        frame_indices([], 0.0, fps=1)
    with pytest.raises(JaxherdError, match="no frame"):
        sample_frames([], source_fps=1, fps=1)
    with pytest.raises(JaxherdError, match="source_fps"):
        sample_frames([1], source_fps=0, fps=1)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations(tmp_path, suffix):
    """Six frames of half a second, grey by number."""
    frames = [Image.new("RGB", (4, 3), (40 * n,) * 3) for n in range(6)]
    path, more = tmp_path / f"a.{suffix}", {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500, **more)

    def greys(**options):
        found = animation_frames(path, **options)
        assert all(frame.shape == (3, 4, 3) for frame in found)
        return [int(frame.mean()) for frame in found]

    assert greys() == [0, 80, 160]
    assert greys(fps=2) == [0, 40, 80, 120, 160, 200]
    assert greys(fps=2, limit=2) == [0, 200]
    with pytest.raises(JaxherdError, match="6 frames of 4 by 3 pixels"):
        animation_frames(path, limits=Limits(animation_pixels=50))


def test_a_still_image_is_one_frame(tmp_path):
    Image.fromarray(np.full((2, 2, 3), 9, np.uint8)).save(tmp_path / "a.png")
    (frame,) = animation_frames(tmp_path / "a.png", fps=30)
    assert frame.tolist() == [[[9] * 3] * 2] * 2
