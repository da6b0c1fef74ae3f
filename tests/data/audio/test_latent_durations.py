"""Clips of several lengths: what is padded, what is drawn, what the coupling counts, what is refused."""

import itertools
import json

import numpy as np
import pytest

from jaxherd.core import batch as batch_lib
from jaxherd.core.errors import JaxherdError
from jaxherd.data.audio.latent_rows import RandomLatents, coupled
from jaxherd.data.audio.latent_tracks import LatentFolder, write_track
from jaxherd.data.audio.latents import LatentClips

WIDTH, FRAMES = 3, 8
# Of the even tracks, group 0, and the odd ones; the last three are held out.
LENGTHS = (40, 5, 3, 30, 2, 12, 8, 20, 4, 3)


@pytest.fixture
def folder(tmp_path):
    """Values say where they come from: track number, with the frame as fraction."""
    entries = []
    for number, length in enumerate(LENGTHS):
        mean = np.repeat((number + np.arange(length) / 64)[:, None], WIDTH, axis=1)
        write_track(tmp_path / f"{number}.npy", mean.astype("f4"), np.full_like(mean, 1e-9, "f4"))
        split = "heldout" if number >= 7 else "train"
        entries.append({"file": f"{number}.npy", "split": split, "label": number % 2,
                        "name": str(number)})  # fmt: skip
    index = {"frame_rate": 25.0, "sample_rate": 48000, "labels": ["a", "b"], "mean": [0.0] * WIDTH,
             "std": [1.0 - 1e-5] * WIDTH, "tracks": entries}  # fmt: skip
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path


def config(**changes) -> LatentClips:
    settings = dict(latent_dim=WIDTH, frames=FRAMES, batch_size=8, coupling_group=8)
    return LatentClips(**settings | changes)


def build(folder, split="train", seed=1, place=(0, 1), **changes):
    return config(**changes).build(
        split=split, seed=seed, process_index=place[0], process_count=place[1],
        artifacts={"latents": folder},
    )  # fmt: skip


def rows(batches):
    """Yield (track, first frame, length) of every row, after having looked at the row itself."""
    for batch in batches:
        for latents, noise, mask in zip(batch["latents"], batch["noise"], batch["frame_mask"]):
            length = int(mask.sum())
            np.testing.assert_array_equal(mask, np.arange(FRAMES) < length)
            assert (latents[length:] == 0).all() and (noise[length:] == 0).all()
            assert (noise[:length] != 0).all()
            steps = (latents[:length, 0] - latents[0, 0]) * 64
            np.testing.assert_allclose(steps, np.arange(length), atol=1e-3)
            track = int(latents[0, 0] + 1e-4)
            yield track, round(float(latents[0, 0] - track) * 64), length


def test_short_recordings_take_part_in_padded_rows(folder):
    data = build(folder, min_frames=3)
    batches = [next(data) for _ in range(100)]
    batch_lib.check(batches[0], config(min_frames=3).batch_spec())
    found = list(rows(batches))
    for track, start, length in found:
        assert length == min(LENGTHS[track], FRAMES) and start + length <= LENGTHS[track]
    seen = {track: sum(t == track for t, *_ in found) for track, *_ in found}
    assert set(seen) == {0, 1, 2, 3, 5, 6}  # number 4 has two frames
    # A group's tracks are drawn in proportion to their lengths.
    for group in ((0, 2, 6), (1, 3, 5)):
        total = sum(seen[t] for t in group)
        for track in group:
            share = LENGTHS[track] / sum(LENGTHS[t] for t in group)
            assert seen[track] / total == pytest.approx(share, abs=0.05)
    about = data.describe()
    assert (about["too_short"], about["padded"]) == (1, 2)
    assert about["notes"] == [
        "1 of 7 recordings have fewer than 3 frames and take no part: min_frames says how short "
        "they may be."
    ]
    assert build(folder).describe()["too_short"] == 3


def test_clips_are_cut_to_random_lengths(folder):
    always = list(
        rows([next(build(folder, min_frames=3, shorter_clips=1.0, seed=s)) for s in range(60)])
    )
    long = [length for track, _, length in always if LENGTHS[track] >= FRAMES]
    assert set(long) == {3, 4, 5, 6, 7, 8}
    assert np.mean(long) == pytest.approx(5.5, abs=0.3)
    assert all(start + length <= LENGTHS[track] for track, start, length in always)
    half = list(
        rows([next(build(folder, min_frames=3, shorter_clips=0.5, seed=s)) for s in range(60)])
    )
    long = [length for track, _, length in half if LENGTHS[track] >= FRAMES]
    # Of those that are cut one in six keeps all of its frames.
    assert np.mean(np.asarray(long) < FRAMES) == pytest.approx(0.5 * 5 / 6, abs=0.08)


def test_the_default_law_is_what_it_was(folder):
    """Tracks by their number of starts as `choice` draws them, no mask, nothing padded."""
    tracks = LatentFolder.open(folder).load("train")
    drawn = RandomLatents(LatentFolder.open(folder), tracks, FRAMES, 5)
    for index in range(200):
        chance = np.random.default_rng((5, index))
        group = [(0, 6), (3, 5)][int(chance.integers(2))]
        room = np.array([LENGTHS[t] - FRAMES + 1 for t in group], np.float64)
        track = group[int(chance.choice(len(group), p=room / room.sum()))]
        start = int(chance.integers(LENGTHS[track] - FRAMES + 1))
        row, noise = drawn[index], chance.standard_normal((2, FRAMES, WIDTH), dtype=np.float32)
        assert row["latents"][0, 0] == pytest.approx(track + start / 64, abs=1e-5)
        np.testing.assert_array_equal(row["noise"], noise[1])
    assert "frame_mask" not in next(build(folder)) and "frame_mask" not in config().batch_spec()


def test_noise_is_assigned_by_the_frames_that_the_latents_have(folder):
    """Against all 120 assignments; the draw is the same as without, up to what padding hides."""
    chance = np.random.default_rng(3)
    mask = (np.arange(6) < np.array([6, 2, 3, 5, 1])[:, None]).astype("f4")
    latents = chance.standard_normal((5, 6, 2)).astype("f4") * mask[..., None]
    noise = chance.standard_normal((5, 6, 2)).astype("f4")
    batch = {"latents": latents, "noise": noise, "frame_mask": mask}
    made = coupled(batch, 5)

    def cost(order):
        return (np.square(latents - noise[list(order)]).sum(axis=2) * mask).sum()

    best = min(itertools.permutations(range(5)), key=cost)
    np.testing.assert_array_equal(made["noise"], noise[list(best)] * mask[..., None])
    # Padding would decide otherwise: all frames counted, another assignment is the least.
    whole = min(
        itertools.permutations(range(5)), key=lambda o: np.square(latents - noise[list(o)]).sum()
    )
    assert whole != best
    np.testing.assert_array_equal(coupled(batch, 1)["noise"], noise * mask[..., None])
    np.testing.assert_array_equal(batch["noise"], noise)
    alone = next(build(folder, min_frames=3, coupling_group=1))
    together = next(build(folder, min_frames=3))
    np.testing.assert_array_equal(alone["latents"], together["latents"])
    first = [np.sort(b["noise"][:, 0, 0]) for b in (alone, together)]
    np.testing.assert_array_equal(*first)


def test_a_pass_over_held_out_recordings_has_the_short_ones(folder):
    batches = list(build(folder, "heldout", min_frames=3, batch_size=2, coupling_group=2))
    found = list(rows(batches))
    assert len(found) == 4 == sum(len(b["noise"]) for b in batches)
    assert sorted((t, n) for t, _, n in found) == [(7, 8), (7, 8), (8, 4), (9, 3)]
    assert len(list(build(folder, "heldout", batch_size=2, coupling_group=2))) == 1


def test_processes_share_batches_and_positions_restore(folder):
    changes = dict(min_frames=3, shorter_clips=0.5, coupling_group=4)
    whole = build(folder, **changes)
    parts = [build(folder, place=(i, 2), **changes) for i in range(2)]
    for _ in range(3):
        batch, halves = next(whole), [next(p) for p in parts]
        for name, value in batch.items():
            np.testing.assert_array_equal(value, np.concatenate([h[name] for h in halves]))
    again = build(folder, **changes)
    again.set_state(whole.get_state())
    after = next(whole)
    for name, value in next(again).items():
        np.testing.assert_array_equal(value, after[name])
    for other in ({}, dict(min_frames=4), dict(min_frames=3, shorter_clips=0.25)):
        with pytest.raises(JaxherdError, match="belongs to other data"):
            build(folder, coupling_group=4, **other).set_state(whole.get_state())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(min_frames=0), "min_frames=0 must lie between 1 and frames=8"),
        (dict(min_frames=9), "min_frames=9 must lie between 1 and frames=8"),
        (dict(min_frames=3, shorter_clips=1.5), "shorter_clips=1.5 must lie between 0 and 1"),
        (dict(shorter_clips=0.5), "shorter_clips=0.5 needs min_frames"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(JaxherdError, match=message):
        config(**changes)


def test_a_group_of_too_short_recordings(folder):
    with pytest.raises(JaxherdError, match="no recording of at least 35 frames"):
        build(folder, frames=40, min_frames=35)
