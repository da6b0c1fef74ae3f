"""A music model: conditions, lengths, seeds, edits that change nothing, and folders."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny_music
from tiny_music import LABELS, MEAN, RATE, STD

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import flatten, split
from jaxherd.data.audio.latent_tracks import LatentTrack, write_text, write_track
from jaxherd.data.audio.latents import LatentClips
from jaxherd.methods import music_model as music_lib
from jaxherd.methods import told_network
from jaxherd.methods.flow_sampling import SamplingPlan
from jaxherd.methods.latent_inversion import inversion
from jaxherd.methods.music_files import load_music, save_music
from jaxherd.methods.music_samples import SampleMusic
from jaxherd.models.seanet_streaming import decoder_reach
from jaxherd.models.velocity_transformer import TextStates, VelocityTransformer

PLAN = SamplingPlan(4, "midpoint", cfg_coef=1.0)
KEY = jax.random.key(7)
SEANET = tiny_music.CODEC.autoencoder.seanet


@pytest.fixture(scope="module")
def model():
    return tiny_music.music_model()


def test_a_prompt_is_a_label_or_words_of_one(model):
    assert [model.label(p) for p in LABELS] == [0, 1, 2]
    assert model.label(" Heavy  METAL ") == 2 and model.label("orchestral") == 1
    with pytest.raises(JaxherdError, match="fits several labels.*heavy metal"):
        model.label("music")
    for wrong in ("hevy metal", ""):
        with pytest.raises(JaxherdError, match="none of the model's labels") as caught:
            model.label(wrong)
        assert all(label in str(caught.value) for label in LABELS)
    for nothing in (None, [None, None], "", [" ", None]):
        assert model.condition(nothing) is None
    mixed = model.condition(["heavy metal", None])
    assert mixed.mask_BL.tolist() == [[True], [False]]
    table = np.asarray(model.velocity.label_table.table)
    np.testing.assert_array_equal(mixed.states_BLD[0, 0], table[2])


def test_generation_follows_the_seed_and_the_prompt(model):
    made = {
        name: model.generate(prompt, 0.0501, PLAN, jax.random.key(seed))
        for name, prompt, seed in (
            ("a", "heavy metal", 0), ("again", "heavy metal", 0), ("seed", "heavy metal", 1),
            ("prompt", "orchestral music", 0), ("none", None, 0),
        )
    }  # fmt: skip
    assert made["a"].wave_BTC.shape == (1, 401, 2) and made["a"].latents_BFL.shape == (1, 51, 4)
    assert made["a"].wave_BTC.dtype == np.float32
    np.testing.assert_array_equal(made["a"].wave_BTC, made["again"].wave_BTC)
    for other in ("seed", "prompt", "none"):
        assert np.abs(made["a"].latents_BFL - made[other].latents_BFL).max() > 1e-3
    # Guidance doubles the evaluations, and there is none without a prompt.
    assert made["a"].evaluations == 8 and made["none"].evaluations == 4
    assert made["a"].latent_std == pytest.approx(made["a"].latents_BFL.std())
    both = model.generate(["heavy metal", None], 0.05, PLAN, KEY)
    assert both.wave_BTC.shape == (2, 400, 2)


def test_latents_are_standardised(model):
    wave = tiny_music.tone(rows=2)
    latents = model.encode(wave)
    raw = jax.jit(lambda m, x: m.encode(x))(model.autoencoder, wave)
    np.testing.assert_allclose(latents * (STD + 1e-5) + MEAN, raw.mean_BTL, atol=1e-5)
    sampled = model.encode(wave, key=KEY)
    gap = (sampled - latents) * (STD + 1e-5) / np.asarray(raw.std_BTL)
    assert 0.8 < gap.std() < 1.2
    decoded = jax.jit(lambda m, x: m.decode(x))(model.autoencoder, raw.mean_BTL)
    np.testing.assert_allclose(model.decode(latents), decoded, atol=1e-5)


def test_long_waves_go_in_pieces(model, monkeypatch):
    told = []
    whole = model.encode(tiny_music.tone(0.3))
    wave = model.decode(whole)
    monkeypatch.setattr(music_lib, "FRAMES_PER_CHUNK", 100)
    pieces = model.encode(tiny_music.tone(0.3), report=lambda *r: told.append(r))
    np.testing.assert_allclose(pieces, whole, atol=1e-5)
    np.testing.assert_allclose(
        model.decode(pieces, report=lambda *r: told.append(r)), wave, atol=1e-5
    )
    assert told[0] == ("encoding", 100, 300) and told[-1] == ("decoding", 300, 300)


@pytest.mark.parametrize("chunk", [250, 7])
def test_frames_held_beyond_the_ends_leave_no_step_there(model, monkeypatch, chunk):
    """As if the clip went on for ever; the codec's own decoder has zeros there.

    A few samples of the ends hear of them, and nothing else does.
    """
    plain = dataclasses.replace(
        model.autoencoder.config, seanet=dataclasses.replace(SEANET, lstm=0)
    )
    music = dataclasses.replace(model, autoencoder=jax.jit(plain.build)(KEY))
    latents = np.random.default_rng(0).normal(size=(2, 40, 4)).astype("f4")
    whole = music.decode(np.pad(latents, ((0, 0), (30, 30), (0, 0)), mode="edge"))
    hop, told = plain.seanet.hop, []
    monkeypatch.setattr(music_lib, "FRAMES_PER_CHUNK", chunk)
    held = music.decode(latents, held=True, report=lambda *r: told.append(r))
    np.testing.assert_allclose(held, whole[:, 30 * hop : -30 * hop], atol=1e-5)
    assert told[-1] == ("decoding", 40, 40) and all(0 <= done <= 40 for _, done, _ in told)
    apart = np.abs(held - music.decode(latents)).max(axis=(0, 2))
    reach = decoder_reach(plain.decoder_layers()) * hop
    assert apart[:3].min() > 1e-3 and apart[-3:].min() > 1e-3
    assert apart[reach:-reach].max() < 1e-5


def test_what_is_drawn_is_decoded_without_a_step(model):
    made = model.generate("heavy metal", 0.05, PLAN, KEY)
    np.testing.assert_array_equal(made.wave_BTC, model.decode(made.latents_BFL, held=True))
    plan, wave = inversion("fixed_point", steps=2), tiny_music.tone(0.05)
    edited = model.edit(wave, "heavy metal", plan, KEY)
    np.testing.assert_array_equal(edited.wave_BTC, model.decode(edited.latents_BFL, held=True))
    assert np.abs(edited.wave_BTC - model.decode(edited.latents_BFL))[:, -1].max() > 1e-4


def test_silence_is_encoded_generated_and_edited(model):
    wave = np.zeros((1, 400, 2), np.float32)
    assert np.isfinite(model.decode(model.encode(wave))).all()
    edited = model.edit(wave, "heavy metal", inversion("regularized", steps=2), KEY)
    assert np.isfinite(edited.wave_BTC).all() and np.isfinite(edited.inverted_std)


def test_an_edit_of_no_strength_is_the_source_through_the_codec(model):
    wave = tiny_music.tone(0.0501)
    plain = model.edit(wave, "heavy metal", None, KEY, sample=False)
    codec = model.decode(model.encode(wave))[:, : wave.shape[1]]
    np.testing.assert_array_equal(plain.wave_BTC, codec)
    assert plain.evaluations == 0 and plain.inverted_std is None
    # A flow step near 1 changes little, one of 0 much.
    plan = inversion("fixed_point", steps=3)
    slight, strong = (
        model.edit(wave, "heavy metal", dataclasses.replace(plan, target_flowstep=t), KEY,
                   sample=False)
        for t in (0.999, 0.0)
    )  # fmt: skip
    near = np.abs(slight.latents_BFL - plain.latents_BFL).max()
    assert near < 0.02 < 10 * near < np.abs(strong.latents_BFL - plain.latents_BFL).max()


@pytest.mark.parametrize("method", ["regularized", "fixed_point", "ddim", "sdedit"])
def test_edits_follow_seed_and_prompt_and_are_counted(model, method):
    plan, wave = inversion(method, steps=3), tiny_music.tone(rows=2)
    told = []
    edited = [
        model.edit(wave, prompt, plan, KEY, source_prompts=source)
        for prompt, source in (("heavy metal", None), ("heavy metal", None),
                               ("orchestral", "heavy metal"))
    ]  # fmt: skip
    shown = model.edit(wave, "heavy metal", plan, KEY, report=lambda *r: told.append(r))
    jax.effects_barrier()
    np.testing.assert_array_equal(edited[0].wave_BTC, edited[1].wave_BTC)
    np.testing.assert_allclose(edited[0].wave_BTC, shown.wave_BTC, atol=1e-4)
    assert np.abs(edited[0].latents_BFL - edited[2].latents_BFL).max() > 1e-3
    assert edited[0].evaluations == plan.evaluations() + 2 * 3
    assert np.isfinite(edited[0].inverted_std)
    steps = [r for r in told if r[0] == "editing"]
    assert steps[-1][1] == steps[-1][2] == len(steps)


def test_reports_share_one_program(model, monkeypatch):
    """A second call with another report traces nothing; each report hears of its own calls."""
    traces, call = [], VelocityTransformer.__call__

    def counted(self, *arguments, **words):
        traces.append(1)
        return call(self, *arguments, **words)

    monkeypatch.setattr(VelocityTransformer, "__call__", counted)
    wave, edit_plan = tiny_music.tone(0.031), inversion("fixed_point", steps=2)
    runs = {
        "generating": lambda r: model.generate("heavy metal", 0.031, PLAN, KEY, report=r),
        "editing": lambda r: model.edit(wave, "heavy metal", edit_plan, KEY, report=r),
    }
    for what, run in runs.items():
        heard, counts, made = ([], []), [], []
        for own in heard:
            made.append(run(lambda *r, own=own: own.append(r)).wave_BTC)
            counts.append(len(traces))
        assert counts[0] > 0 and counts[1] == counts[0], what
        steps = [[r for r in own if r[0] == what] for own in heard]
        assert steps[0] == steps[1]
        total = steps[0][-1][2]
        assert [done for _, done, _ in steps[0]] == list(range(1, total + 1))
        np.testing.assert_array_equal(*made)
    assert not told_network._told


def test_a_report_that_fails_is_forgotten(model):
    class Stopped(Exception):
        pass

    with pytest.raises(Stopped), told_network.told(model.velocity, print, "a", 1):
        raise Stopped
    assert not told_network._told


def test_a_saved_model_is_the_same(model, tmp_path):
    folder = save_music(model, tmp_path / "saved")
    back = load_music(folder)
    for a, b in ((model.autoencoder, back.autoencoder), (model.velocity, back.velocity)):
        ours, theirs = ([flatten(tree) for tree in split(m)[1:]] for m in (a, b))
        for mine, other in zip(ours, theirs):
            assert mine.keys() == other.keys()
            for name, value in mine.items():
                np.testing.assert_array_equal(value, other[name], name)
    assert (back.labels, back.sample_rate, back.clip_seconds) == (LABELS, RATE, 0.05)
    one, two = (m.generate("heavy metal", 0.02, PLAN, KEY).wave_BTC for m in (model, back))
    np.testing.assert_array_equal(one, two)
    with pytest.raises(JaxherdError, match="not empty"):
        save_music(model, folder)


def test_a_run_is_a_model(model, tmp_path):
    loaded = load_music(tiny_music.write_run(tmp_path / "run"))
    assert loaded.labels == LABELS and loaded.clip_seconds == pytest.approx(50 / (RATE / 8))
    wave = tiny_music.tone()
    np.testing.assert_allclose(loaded.encode(wave), model.encode(wave), atol=1e-6)
    one, two = (m.generate("orchestral", 0.02, PLAN, KEY).wave_BTC for m in (model, loaded))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_text_conditions_take_a_text_encoder(model, monkeypatch):
    config = dataclasses.replace(tiny_music.FLOW, conditioner=TextStates(6))
    velocity = jax.jit(config.build)(jax.random.key(0))
    texts = dataclasses.replace(model, velocity=velocity, labels=())
    with pytest.raises(JaxherdError, match="names no text encoder"):
        texts.condition("a slow waltz")

    def states(text):
        return np.full((len(text.split()), 6), len(text), np.float32)

    monkeypatch.setattr(music_lib, "text_encoder", lambda source: states)
    texts = dataclasses.replace(texts, text_encoder="t5")
    mask = texts.condition(["a slow waltz", None]).mask_BL
    assert mask.shape == (2, 32) and mask.sum(axis=1).tolist() == [3, 0]
    one, two = (
        texts.generate(prompt, 0.02, PLAN, KEY).latents_BFL for prompt in ("a slow waltz", "noise")
    )
    assert np.abs(one - two).max() > 1e-4


def test_texts_are_cut_alike_in_training_and_in_use(model, monkeypatch, tmp_path):
    """One limit: the clips', the model's and the sampling stage's fields are the same."""
    config = dataclasses.replace(tiny_music.FLOW, conditioner=TextStates(6))
    velocity = jax.jit(config.build)(jax.random.key(0))
    long, short = "one two three four five six", "one two"

    def states(text):
        return np.arange(len(text.split()) * 6, dtype=np.float32).reshape(-1, 6) + len(text)

    monkeypatch.setattr(music_lib, "text_encoder", lambda source: states)
    texts = dataclasses.replace(
        model, velocity=velocity, labels=(), text_encoder="t5", text_length=4
    )
    clips = LatentClips(latent_dim=4, frames=8, text_dim=6, text_length=4, coupling_group=1)
    rows = []
    for text in (long, short):
        write_text(tmp_path / "text.npy", states(text))
        write_track(tmp_path / "track.npy", np.zeros((8, 4), "f4"), np.ones((8, 4), "f4"))
        track = LatentTrack("x", 0, tmp_path / "track.npy", tmp_path / "text.npy")
        rows.append(clips._conditioned({"labels": 0, "frame_mask": np.ones(8), "track": track}))
    trained = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    stage = SampleMusic("samples", config, clips)
    for found in (texts.text_batch([long, short], 6), stage._conditions(texts, [long, short])):
        assert found.keys() == trained.keys()
        for name, value in trained.items():
            np.testing.assert_array_equal(found[name], value, name)
    assert trained["text_mask"].sum(axis=1).tolist() == [4, 2]
    assert texts.text_batch([None], 6)["text_mask"].sum() == 0
    # The cut is told once for each prompt.
    assert texts.notes(short, None, [long, "", long]) == (
        "the prompt 'one two three four five six' has 6 tokens and is cut to the 4 that the "
        "model's conditions have.",
    )
    plan = SamplingPlan(2, "euler")
    assert len(texts.generate(long, 0.02, plan, KEY).notes) == 1
    assert texts.generate(short, 0.02, plan, KEY).notes == () == model.notes("heavy metal")


def test_the_limit_of_texts_is_kept_with_the_model(model, tmp_path):
    limited = dataclasses.replace(model, text_length=7)
    folder = save_music(limited, tmp_path / "saved")
    assert load_music(folder).text_length == 7
    entries = json.loads((folder / "config.json").read_text())
    del entries["text_length"]  # as saved before there was one
    (folder / "config.json").write_text(json.dumps(entries))
    assert load_music(folder).text_length == 64
    assert load_music(tiny_music.write_run(tmp_path / "run")).text_length == 64


def test_what_cannot_be_is_told(model, tmp_path):
    with pytest.raises(JaxherdError, match="take those of the latents"):
        dataclasses.replace(model, labels=("one",))
    with pytest.raises(JaxherdError, match="take parts of one run"):
        dataclasses.replace(model, mean=np.zeros(3))
    with pytest.raises(JaxherdError, match="seconds must be positive"):
        model.generate(None, 0.0, PLAN, KEY)
    with pytest.raises(JaxherdError, match="goes from noise"):
        model.generate(None, 1.0, dataclasses.replace(PLAN, target=0.5), KEY)
    with pytest.raises(JaxherdError, match="1 channels"):
        model.encode(tiny_music.tone(channels=1))
    with pytest.raises(JaxherdError, match="wave holds values that are no finite numbers"):
        model.encode(np.where(np.arange(800)[:, None] == 700, np.nan, tiny_music.tone(0.1)))
    with pytest.raises(JaxherdError, match="no sound to encode"):
        model.encode_pieces(iter(()))
    with pytest.raises(JaxherdError, match="1 channels; the codec wants 2"):
        model.encode_pieces([tiny_music.tone(channels=1)])
    with pytest.raises(JaxherdError, match="no finite numbers"):
        model.decode(np.full((1, 3, 4), np.nan, np.float32))
    plain = jax.jit(dataclasses.replace(tiny_music.FLOW, conditioner=None).build)(KEY)
    with pytest.raises(JaxherdError, match="leave the prompt away"):
        dataclasses.replace(model, velocity=plain, labels=()).condition("heavy metal")
    with pytest.raises(JaxherdError, match="'codec' has left nothing"):
        load_music(tmp_path)
    folder = save_music(model, tmp_path / "model")
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | {"version": 2}))
    with pytest.raises(JaxherdError, match="version 2"):
        load_music(folder)
    (folder / "config.json").write_text(json.dumps({**entries, "std": "wide"}))
    with pytest.raises(JaxherdError, match="is damaged"):
        load_music(folder)
