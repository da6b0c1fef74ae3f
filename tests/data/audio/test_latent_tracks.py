"""Latents on disk: a clip is read without its track, what is damaged is told, float16's error."""

import json
import os
import pathlib
import tracemalloc

import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data.audio.latent_tracks import (
    ArchivedTrack,
    LatentFolder,
    LatentTrack,
    is_whole,
    write_text,
    write_track,
)

CHANCE = np.random.default_rng(0)
MEAN = CHANCE.standard_normal((40, 3), dtype=np.float32)
STD = np.exp(CHANCE.standard_normal((40, 3), dtype=np.float32))


def write_index(path, **entry):
    index = {"frame_rate": 25.0, "sample_rate": 48000, "labels": ["a"], "mean": [0.0] * 3,
             "std": [1.0] * 3, "tracks": [{"split": "train", "label": 0, "name": "x", **entry}]}  # fmt: skip
    (path / "index.json").write_text(json.dumps(index))
    return LatentFolder.open(path)


def test_a_track_is_read_as_it_was_written(tmp_path):
    write_track(tmp_path / "a.npy", MEAN, STD)
    write_text(tmp_path / "t.npy", np.ones((5, 2)))
    (track,) = write_index(tmp_path, file="a.npy", text="t.npy").load("train")
    assert (len(track), track.tokens, track.text_dim, track.label) == (40, 5, 2, 0)
    mean, std = track.read(7, 20)
    np.testing.assert_array_equal(mean, MEAN[7:27])
    np.testing.assert_array_equal(std, STD[7:27])
    text = track.text(3)
    assert text is not None and text.shape == (3, 2) and text.dtype == np.float32
    assert not list(tmp_path.glob("*.partial"))


def test_the_older_form_is_read_too(tmp_path):
    np.savez(tmp_path / "a.npz", mean=MEAN, std=STD, text=np.ones((5, 2), "f4"))
    (track,) = write_index(tmp_path, file="a.npz").load("train")
    assert isinstance(track, ArchivedTrack)
    assert (len(track), track.tokens, track.text_dim) == (40, 5, 2)
    np.testing.assert_array_equal(track.read(7, 20), (MEAN[7:27], STD[7:27]))


def test_a_clip_takes_the_memory_of_a_clip_and_keeps_no_file_open(tmp_path):
    """A gibibyte of latents, of which the disk holds none: the file has a hole."""
    file = tmp_path / "long.npy"
    shape = (2**20, 2, 128)
    np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape).flush()
    tracemalloc.start()
    tracks = [LatentTrack(str(i), 0, file) for i in range(100)]
    mean, _ = tracks[0].read(2**19, 752)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    clip = 2 * mean.nbytes
    assert mean.shape == (752, 128) and len(tracks[0]) == 2**20 and peak < 2 * clip
    held = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert str(file.resolve()) not in held
    del mean, tracks
    assert str(file) not in pathlib.Path("/proc/self/maps").read_text()


def test_float16_rounds_by_half_a_unit_in_the_last_place(tmp_path):
    write_track(tmp_path / "a.npy", MEAN, STD, dtype="float16")
    write_track(tmp_path / "b.npy", MEAN, STD)
    sizes = [os.path.getsize(tmp_path / name) - 128 for name in ("a.npy", "b.npy")]
    assert 2 * sizes[0] == sizes[1] == 40 * 2 * 3 * 4
    mean, std = LatentTrack("", 0, tmp_path / "a.npy").read(0, 40)
    assert mean.dtype == std.dtype == np.float32
    # Below 2^-14 the steps of float16 are 2^-24.
    assert (np.abs(mean - MEAN) <= np.maximum(2.0**-11 * np.abs(MEAN), 2.0**-25)).all()
    assert (np.abs(std - STD) <= 2.0**-11 * STD).all() and np.abs(mean - MEAN).max() > 0
    # The least deviation that a codec's posterior has, softplus + 1e-4, is in its range.
    write_track(tmp_path / "c.npy", MEAN, np.full_like(STD, 1e-4), dtype="float16")
    _, std = LatentTrack("", 0, tmp_path / "c.npy").read(0, 40)
    np.testing.assert_allclose(std, 1e-4, rtol=2.0**-11)


@pytest.mark.parametrize(
    "mean, std, message",
    [
        (70000.0, 1.0, "largest value 7e\\+04"),
        (1.0, 1e-5, "smallest deviation 1e-05"),
        (np.nan, 1.0, "no numbers"),
        (1.0, np.inf, "no numbers"),
    ],
)
def test_what_float16_cannot_hold_is_refused(tmp_path, mean, std, message):
    with pytest.raises(JaxherdError, match=message):
        write_track(
            tmp_path / "a.npy", np.full((4, 3), mean), np.full((4, 3), std), dtype="float16"
        )
    assert not list(tmp_path.iterdir())


def damage(file, how):
    whole = file.read_bytes()
    if how == "absent":
        file.unlink()
    elif how == "pickle":
        np.save(file, np.array([{}], object), allow_pickle=True)
    elif how == "archive":
        with file.open("wb") as out:
            np.savez(out, a=MEAN)
    elif how == "shape":
        np.save(file, np.zeros((4, 3, 3), "f4"))
    else:
        cut = {"empty": b"", "header": whole[:50], "half": whole[: len(whole) // 2],
               "byte": whole[:-1], "longer": whole + b"x", "noise": b"cut short"}  # fmt: skip
        file.write_bytes(cut[how])


DAMAGES = ["absent", "pickle", "archive", "shape", "empty", "header", "half", "byte", "longer",
           "noise"]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_track_is_named(tmp_path, how):
    file = tmp_path / "a.npy"
    write_track(file, MEAN, STD)
    assert is_whole(file)
    damage(file, how)
    with pytest.raises(JaxherdError, match=r"a\.npy' are damaged: delete that file"):
        write_index(tmp_path, file="a.npy").load("train")
    assert is_whole(file) == (how == "shape")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_text_is_named(tmp_path, how):
    write_track(tmp_path / "a.npy", MEAN, STD)
    write_text(tmp_path / "t.npy", np.ones((5, 2)))
    damage(tmp_path / "t.npy", how)
    with pytest.raises(JaxherdError, match=r"t\.npy' are damaged"):
        write_index(tmp_path, file="a.npy", text="t.npy").load("train")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_damaged_archive_is_named(tmp_path, share):
    file = tmp_path / "a.npz"
    np.savez(file, mean=MEAN, std=STD)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(JaxherdError, match=r"a\.npz' are damaged"):
        write_index(tmp_path, file="a.npz").load("train")


def test_names_that_leave_the_folder_and_broken_entries(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside.npy"
    inside.mkdir()
    write_track(outside, MEAN, STD)
    write_track(inside / "a.npy", MEAN, STD)
    (inside / "link.npy").symlink_to(outside)
    for entry in ({"file": "../outside.npy"}, {"file": str(outside)}, {"file": "link.npy"},
                  {"file": "a.npy", "text": "../outside.npy"}):  # fmt: skip
        with pytest.raises(JaxherdError, match="outside of its folder"):
            write_index(inside, **entry).load("train")
    for entry in ({}, {"file": 5}, {"file": "a.npy", "label": "x"}, {"file": "a.npy", "text": 3}):
        with pytest.raises(JaxherdError, match=r"index\.json' is damaged"):
            write_index(inside, **entry).load("train")
    with pytest.raises(JaxherdError, match="There is no split 'test'"):
        write_index(inside, file="a.npy").load("test")
