"""Latent clips: standardised samples, noise assigned at least cost, damaged folders."""

import json

import numpy as np
import pytest

from jaxherd.core import batch as batch_lib
from jaxherd.core.errors import JaxherdError
from jaxherd.data.audio.latent_tracks import LatentFolder
from jaxherd.data.audio.latents import LatentClips

WIDTH, FRAMES = 3, 8


@pytest.fixture
def folder(tmp_path):
    chance = np.random.default_rng(0)
    tracks = []
    for number in range(6):
        mean = 5.0 + 2.0 * chance.standard_normal((40, WIDTH))
        text = np.full((2 + number, 4), number, np.float32)
        np.savez(tmp_path / f"{number}.npz", mean=mean.astype("f4"),
                 std=np.full((40, WIDTH), 0.1, "f4"), text=text)  # fmt: skip
        split = "heldout" if number > 3 else "train"
        tracks.append({"file": f"{number}.npz", "split": split, "label": number % 2,
                       "name": str(number), "frames": 40})  # fmt: skip
    write_index(tmp_path, tracks)
    return tmp_path


def write_index(path, tracks):
    index = {"frame_rate": 25.0, "sample_rate": 48000, "labels": ["a", "b"], "mean": [5.0] * WIDTH,
             "std": [2.0] * WIDTH, "tracks": tracks}  # fmt: skip
    (path / "index.json").write_text(json.dumps(index))


def config(**changes) -> LatentClips:
    settings = dict(latent_dim=WIDTH, frames=FRAMES, batch_size=8, coupling_group=8)
    return LatentClips(**settings | changes)


def build(folder, split="train", seed=1, **changes):
    return config(**changes).build(split=split, seed=seed, artifacts={"latents": folder})


def test_rows_are_standardised_and_fit_their_description(folder):
    data = build(folder)
    batches = [next(data) for _ in range(40)]
    batch_lib.check(batches[0], config().batch_spec())
    latents = np.concatenate([b["latents"] for b in batches])
    assert abs(latents.mean()) < 0.15 and abs(latents.std() - 1) < 0.15
    noise = np.concatenate([b["noise"] for b in batches])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_noise_is_assigned_at_least_cost_and_its_draw_is_the_same(folder):
    """Coupling only permutes: the same rows, the same draws, a lower total distance."""

    def cost(batch):
        return np.square(batch["latents"] - batch["noise"]).sum()

    together, alone = build(folder), build(folder, coupling_group=1)
    pairs = build(folder, coupling_group=2)
    for _ in range(5):
        a, b, c = next(together), next(alone), next(pairs)
        np.testing.assert_array_equal(a["latents"], b["latents"])
        order = np.argsort(a["noise"][:, 0, 0]), np.argsort(b["noise"][:, 0, 0])
        np.testing.assert_array_equal(a["noise"][order[0]], b["noise"][order[1]])
        assert cost(a) < cost(c) <= cost(b)


def test_exact_resume_and_a_fixed_pass(folder):
    data = build(folder)
    next(data)
    position, after = data.get_state(), next(data)
    again = build(folder)
    again.set_state(position)
    np.testing.assert_array_equal(next(again)["noise"], after["noise"])
    passes = [list(build(folder, "heldout", batch_size=4, coupling_group=4)) for _ in range(2)]
    assert len(passes[0]) == 2
    np.testing.assert_array_equal(passes[0][0]["noise"], passes[1][0]["noise"])


def test_text_states_are_padded_and_masked(folder):
    changes = dict(text_dim=4, text_length=5)
    batch = next(build(folder, **changes))
    batch_lib.check(batch, config(**changes).batch_spec())
    for states, mask in zip(batch["text_states"], batch["text_mask"]):
        kept = int(mask.sum())
        track = states[0, 0]  # the number of the track is the value of its states
        assert kept == min(5, 2 + track)
        assert (states[:kept] == track).all() and (states[kept:] == 0).all()
    about = build(folder, text_dim=4, text_length=4).describe()
    assert about["captions_cut"] == 1
    assert about["notes"] == ["1 of 4 captions have more than 4 tokens and are cut there."]
    about = build(folder, **changes).describe()
    assert about["captions_cut"] == 0 and "notes" not in about
    assert about["captions_empty"] == 0
    for number in (0, 3):  # both of the training split
        arrays = dict(np.load(folder / f"{number}.npz"))
        np.savez(folder / f"{number}.npz", **arrays | {"text": np.zeros((0, 4), np.float32)})
    about = build(folder, **changes).describe()
    assert about["captions_empty"] == 2
    assert about["notes"] == [
        "2 of 4 captions are empty: these recordings are trained on without a condition."
    ]
    # Told when the data is opened, not at the first row.
    with pytest.raises(JaxherdError, match="no text states of width 7"):
        build(folder, text_dim=7)


def test_what_cannot_be_is_told(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(JaxherdError, match="holds no latents"):
        build(empty)
    with pytest.raises(JaxherdError, match="need the folder of the stage 'latents'"):
        config().build(split="train", seed=0)
    with pytest.raises(JaxherdError, match="are 3 wide and latent_dim is 5"):
        build(folder, latent_dim=5)
    with pytest.raises(JaxherdError, match="does not divide batch_size"):
        config(coupling_group=3)
    with pytest.raises(JaxherdError, match="no recording of at least 99 frames"):
        build(folder, frames=99)
    (folder / "0.npz").write_bytes(b"cut short")
    with pytest.raises(JaxherdError, match="are damaged"):
        build(folder)
    write_index(folder, [{"file": "../x.npz", "split": "train", "label": 0, "name": "x"}])
    with pytest.raises(JaxherdError, match="outside of its folder"):
        LatentFolder.open(folder).load("train")
