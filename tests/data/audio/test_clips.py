"""Clips of recordings: splits, determinism, exact resume, processes."""

import dataclasses
import pathlib
import tracemalloc

import numpy as np
import pytest
import soundfile

from jaxherd.core import batch as batch_lib
from jaxherd.core.errors import JaxherdError
from jaxherd.data.audio.clips import AudioClips
from jaxherd.data.audio.files import write_audio
from jaxherd.data.audio.tracks import AudioGroup, open_track

RATE = 4000  # of the recordings in conftest.py


@pytest.fixture(scope="module")
def config(groups):
    return AudioClips(groups, RATE, 2, clip_samples=500, batch_size=4, heldout_fraction=0.25)


def build(config, cache, split="train", **place):
    return config.build(split=split, seed=3, cache_dir=cache, **place)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_batches_fit_their_description(config, cache):
    data = build(config, cache)
    batch = next(data)
    batch_lib.check(batch, config.batch_spec())
    assert set(batch["labels"]) <= {0, 1}
    assert "full scale" in config.preview(batch)
    about = data.describe()["groups"]
    assert {name: len(group["tracks"]) for name, group in about.items()} == {"tone": 3, "hiss": 3}


def test_conversions_are_counted_and_told(config, cache):
    about = build(config, cache).describe()
    assert about["converted"] == {"resampled": 0, "other_channels": 0} and about["notes"] == []
    other = dataclasses.replace(config, sample_rate=RATE // 2, channels=1)
    about = build(other, cache).describe()
    assert about["converted"] == {"resampled": 6, "other_channels": 6}
    assert about["notes"] == [
        "6 of 6 recordings are at 4000 Hz, resampled to 2000 Hz.",
        "6 of 6 recordings have 2 channel(s), made 1.",
    ]
    # What is in the cache already was converted all the same.
    assert build(other, cache).describe()["notes"] == about["notes"]


def test_what_is_decoded_is_counted_and_only_once(config, tmp_path):
    told: list[tuple[str, int, int]] = []
    for _ in range(2):
        config.build(
            split="train", seed=3, cache_dir=tmp_path, report=lambda *count: told.append(count)
        )
    assert told[0] == ("decoding recordings", 0, 8) and told[-1] == ("decoding recordings", 8, 8)
    assert [done for _, done, _ in told] == list(range(9))


def test_held_out_tracks_are_never_trained_on(config, cache):
    names = {
        split: {t.name for group in config.tracks(split, cache_dir=cache) for t in group}
        for split in ("train", "heldout")
    }
    assert len(names["train"]) == 6 and len(names["heldout"]) == 2
    assert not names["train"] & names["heldout"]


def test_a_clip_is_what_its_track_holds(config, cache):
    """Tones are told by their pitch: one of those of the training tracks."""
    pitches = {200 + 100 * int(t.name[-1]) for t in config.tracks("train", cache_dir=cache)[0]}
    data, seen = build(config, cache), set()
    for _ in range(12):
        batch = next(data)
        for wave, label in zip(batch["audio"], batch["labels"]):
            if label == 0:
                spectrum = np.abs(np.fft.rfft(wave[:, 0] * np.hanning(500), 4000))
                seen.add(int(round(float(spectrum.argmax()) / 100) * 100))
    assert seen == pitches


def test_position_is_exact_and_the_same_for_any_number_of_processes(config, cache):
    whole = build(config, cache)
    batches = [next(whole) for _ in range(3)]
    halves = [build(config, cache, process_index=i, process_count=2) for i in range(2)]
    for batch in batches:
        parts = [next(half) for half in halves]
        joined = np.concatenate([part["audio"] for part in parts])
        np.testing.assert_array_equal(joined, batch["audio"])
    position = whole.get_state()
    after = next(whole)
    again = build(config, cache)
    again.set_state(position)
    np.testing.assert_array_equal(next(again)["audio"], after["audio"])


def test_a_pass_over_held_out_clips_is_finite_and_fixed(config, cache):
    first, second = (list(build(config, cache, "heldout")) for _ in range(2))
    assert len(first) == len(build(config, cache, "heldout")) >= 1
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["audio"], b["audio"])
    assert {int(x) for batch in first for x in batch["labels"]} == {0, 1}


def test_silence_is_drawn_again(tmp_path):
    chance = np.random.default_rng(0)
    for number in range(2):
        wave = np.zeros((RATE * 4, 1), np.float32)
        wave[RATE * 3 :] = 0.2 * chance.standard_normal((RATE, 1))
        write_audio(tmp_path / f"{number}.wav", wave, RATE)
    data = AudioClips((AudioGroup("x", (str(tmp_path),)),), RATE, 1, 200, batch_size=32,
                      heldout_fraction=0.5)  # fmt: skip
    loud = next(data.build(split="train", seed=0, cache_dir=tmp_path / "c"))["audio"]
    open_ = dataclasses.replace(data, min_level_db=-1000.0)
    any_ = next(open_.build(split="train", seed=0, cache_dir=tmp_path / "c"))["audio"]
    heard = [(np.square(x).mean(axis=(1, 2)) > 1e-6).mean() for x in (loud, any_)]
    assert heard[0] > 0.8 and heard[1] < 0.6


def test_what_cannot_be_is_told(config, groups, tmp_path):
    with pytest.raises(JaxherdError, match="at least one group"):
        AudioClips(())
    with pytest.raises(JaxherdError, match="no audio file matches"):
        AudioClips((AudioGroup("none", (str(tmp_path),)),)).build(split="train", seed=0)
    with pytest.raises(JaxherdError, match="no split 'test'"):
        config.build(split="test", seed=0)
    few = dataclasses.replace(config, eval_batch_size=64)
    with pytest.raises(JaxherdError, match="less than a batch of 64"):
        few.build(split="heldout", seed=0, cache_dir=tmp_path)
    one = write_audio(tmp_path / "one.wav", np.full((100, 1), 0.5, np.float32), RATE)
    alone = AudioClips((AudioGroup("one", (str(one),)),), RATE, 1, 50)
    with pytest.raises(JaxherdError, match="leave none to train on"):
        alone.build(split="train", seed=0, cache_dir=tmp_path / "c")


def test_hours_are_decoded_in_bounded_memory(tmp_path):
    """A training recording goes to the cache piece by piece and is then mapped, not read."""
    rate, hours = 500, 3 * 3600
    path = tmp_path / "long.flac"
    minute = np.full(60 * rate, 0.25, np.float32)
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        for number in range(hours // 60):
            file.write(minute * (-1) ** number)
    open_track(write_audio(tmp_path / "s.wav", minute[:, None], rate), sample_rate=750, channels=1,
               cache_dir=tmp_path)  # fmt: skip
    tracemalloc.start()
    try:
        track = open_track(path, sample_rate=750, channels=2, cache_dir=tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(track) == hours * 750 and peak < len(track) * 2 * 4 / 20
    for number in (0, 1, 60, 179):
        middle = track.read((number * 60 + 20) * 750, 750)
        np.testing.assert_allclose(middle, 0.25 * (-1) ** number, atol=1e-3)
    assert np.abs(track.read(hours * 750 - 10, 20)[10:]).max() == 0
    assert not list((tmp_path / "audio").glob("*.partial"))
    # Nothing stays open: there may be more recordings than files that a process may open.
    assert str(tmp_path / "audio") not in pathlib.Path("/proc/self/maps").read_text()


def test_folders_of_mp3_serve(tmp_path):
    t = np.arange(16_000 * 2) / 16_000
    for number in range(2):
        wave = 0.4 * np.sin(2 * np.pi * (300 + 100 * number) * t)
        soundfile.write(tmp_path / f"{number}.mp3", wave, 16_000)
    data = AudioClips((AudioGroup("x", (str(tmp_path),)),), 8000, 1, 400, heldout_fraction=0.5)
    (train,), (held,) = (data.tracks(s, cache_dir=tmp_path / "c") for s in ("train", "heldout"))
    assert len(train) == len(held) == 1 and train[0].name != held[0].name
    assert np.abs(train[0].read(4000, 400)).max() == pytest.approx(0.4, rel=0.1)


def test_damaged_recordings_are_named(tmp_path):
    whole = write_audio(tmp_path / "whole.ogg", np.full((40_000, 1), 0.1, np.float32), 8000)
    folder = tmp_path / "music"
    folder.mkdir()
    (folder / "cut.ogg").write_bytes(whole.read_bytes()[:-20])
    nan = folder / "nan.wav"
    for path, told in ((folder / "cut.ogg", "cut.ogg"), (nan, "nan.wav.*no numbers")):
        if path == nan:
            soundfile.write(nan, np.full((80, 1), np.nan, np.float32), 8000, subtype="FLOAT")
        data = AudioClips((AudioGroup("x", (str(path),)),), 8000, 1, 400)
        with pytest.raises(JaxherdError, match=told):
            data.build(split="train", seed=0, cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.npy")) + list((tmp_path / "c").rglob("*.partial"))


def test_captions_that_are_no_utf8_are_named(tmp_path):
    wave = write_audio(tmp_path / "song.wav", np.full((8000, 1), 0.1, np.float32), 8000)
    words, place = tmp_path / "song.txt", {"sample_rate": 8000, "channels": 1}
    words.write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    with pytest.raises(JaxherdError, match=r"song.txt' is not UTF-8 \(byte 2\)"):
        open_track(wave, **place, cache_dir=tmp_path / "c")
    words.write_text("Gr\u00fc\u00dfe \n", encoding="utf-8")
    assert open_track(wave, **place, cache_dir=tmp_path / "c").caption == "Gr\u00fc\u00dfe"


def test_streams_are_told(tmp_path):
    for number in range(2):
        path = write_audio(tmp_path / f"{number}.wav", np.full((900, 1), 0.1 * number, "f4"), RATE)
    data = path.read_bytes()
    at = data.index(b"data") + 4
    path.write_bytes(data[:at] + b"\xff" * 4 + data[at + 4 :])
    group = AudioGroup("x", (str(tmp_path),))
    config = AudioClips((group,), RATE, 1, 200, batch_size=2, heldout_fraction=0.5)
    notes = [
        note
        for split in ("train", "heldout")
        for note in config.build(split=split, seed=0, cache_dir=tmp_path / "c").describe()["notes"]
    ]
    assert len(notes) == 1 and notes[0].startswith("1 of 1 recordings do not say in their headers")
