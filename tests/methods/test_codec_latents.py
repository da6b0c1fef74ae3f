"""Codec, latents and flow as stages of one experiment, on recordings made here, and its use."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment, StageContext
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import cast_floating
from jaxherd.core.runner import run_experiment
from jaxherd.data.audio.clips import AudioClips
from jaxherd.data.audio.files import write_audio
from jaxherd.data.audio.latent_tracks import LatentFolder, write_track
from jaxherd.data.audio.latents import LatentClips
from jaxherd.data.audio.tracks import AudioGroup
from jaxherd.methods import codec_latents, music_samples
from jaxherd.methods.codec_latents import EncodeRecordings, load_autoencoder
from jaxherd.methods.codec_losses import MultiScaleMel
from jaxherd.methods.codec_training import CodecTrainingConfig, ReconstructionCodec
from jaxherd.methods.flow_matching import FlowMatching
from jaxherd.methods.flow_sampling import SamplingPlan
from jaxherd.methods.music_files import load_music
from jaxherd.methods.music_samples import SampleMusic
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.t5_encoder import T5EncoderConfig
from jaxherd.models.velocity_transformer import LabelEmbedding, VelocityTransformerConfig
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import Evaluation, RunConfig, StepConfig, TrainStage, load_model
from jaxherd.weights.save import save

RATE, WIDTH = 2000, 4


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Two groups of three recordings: slow and fast tremolo of tones; the fast ones are stereo."""
    root = tmp_path_factory.mktemp("music")
    t = np.arange(RATE * 4) / RATE
    for number in range(3):
        for label, speed in (("slow", 1.0), ("fast", 8.0)):
            (root / label).mkdir(exist_ok=True)
            wave = 0.5 * np.sin(2 * np.pi * (150 + 40 * number) * t) * np.cos(np.pi * speed * t)
            wave_TC = np.repeat(wave[:, None], 2 if label == "fast" else 1, axis=1)
            write_audio(root / label / f"{number}.wav", wave_TC.astype("f4"), RATE)
    return root


@pytest.fixture(scope="module")
def run(music, tmp_path_factory):
    groups = tuple(AudioGroup(name, (str(music / name),)) for name in ("slow", "fast"))
    seanet = SeanetConfig(channels=1, dimension=WIDTH, n_filters=4, ratios=(5, 2), lstm=0)
    objective = ReconstructionCodec(
        mel=MultiScaleMel(exponents=(6,), n_mels=8, f_min=20.0), waveform_loss="relative"
    )
    optimizer = Optimizer(schedule=Schedule(3e-3, "constant", 0), weight_decay=0.0)
    codec = TrainStage(
        name="codec",
        model=CodecTrainingConfig(AudioAutoencoderConfig(seanet, RATE, initial_std=0.05), None),
        data=AudioClips(groups, RATE, 1, 500, batch_size=4, heldout_fraction=0.3),
        objective=objective,
        optimizer=optimizer,
        run_config=RunConfig(steps=12, checkpoint_every=6, loggers=("jsonl",), unit="samples"),
        evaluations=(Evaluation("heldout"),),
    )
    flow = FlowMatching()
    velocity = VelocityTransformerConfig(16, 2, 2, latent_dim=WIDTH, conditioner=LabelEmbedding(2))
    clips = LatentClips(
        latent_dim=WIDTH, frames=16, batch_size=8, coupling_group=8, eval_batch_size=4
    )
    stages = (
        codec,
        EncodeRecordings("latents", codec.model, codec.data, frames_per_chunk=64),
        TrainStage(
            name="flow",
            model=velocity,
            data=clips,
            objective=flow,
            optimizer=optimizer,
            step=StepConfig(average_decay=0.5),
            run_config=RunConfig(steps=12, checkpoint_every=6, loggers=("jsonl",), unit="frames"),
            evaluations=(Evaluation("heldout", objective=flow.evaluation((0.3, 0.7))),),
            reads=("latents",),
        ),
        SampleMusic("samples", velocity, clips, 4, SamplingPlan(4), keep=2),
    )
    folder, said = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXHERD_CACHE", str(folder / "cache"))
        # As `jaxherd run` has it: the folder is relative to where one stands.
        patch.chdir(folder.parent)
        experiment = Experiment("tests/music", "cpu", "cpu", stages)
        summary = run_experiment(
            experiment, Path(folder.name), target="cpu", devices=tuple(jax.devices()[:1]), quiet=True,
            say=said.append,
        )  # fmt: skip
    (folder / "said.json").write_text(json.dumps(said))
    return folder, stages, summary


def test_all_stages_ran_on_batches_that_are_no_tokens(run):
    folder, _, summary = run
    assert list(summary) == ["codec", "latents", "flow", "samples"]
    for name in ("codec", "flow"):
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses = [r["loss"] for r in records if r["kind"] == "train"]
        assert len(losses) == 12 and np.isfinite(losses).all()
        assert np.mean(losses[-4:]) < np.mean(losses[:4])
    report = (folder / "report.md").read_text()
    assert "## codec" in report and "- recordings: 6" in report and "## flow" in report


def test_latents_are_those_of_the_whole_recording(run, music):
    folder, stages, summary = run
    latents = LatentFolder.open(folder / "latents")
    assert latents.labels == ("slow", "fast") and latents.frame_rate == 200.0
    tracks = latents.load("train") + latents.load("heldout")
    assert len(tracks) == 6 and len(latents.load("heldout")) == 2
    assert summary["latents"]["tracks"] == 6
    autoencoder = load_autoencoder(stages[0].model, folder / "codec")
    from jaxherd.data.audio.files import read_audio

    track = tracks[0]
    wave, _ = read_audio(music / f"{track.name}.wav")
    whole = jax.jit(lambda m, x: m.encode(x))(autoencoder, wave[None])
    mean, std = track.read(0, len(track))
    np.testing.assert_allclose(mean, whole.mean_BTL[0], atol=1e-3)  # 16-bit samples
    np.testing.assert_allclose(std, whole.std_BTL[0], atol=1e-3)
    # Standardised training latents have mean 0 and deviation 1, samples of the posterior included.
    train = latents.load("train")
    mean, std = (np.concatenate(both) for both in zip(*[t.read(0, len(t)) for t in train]))
    x = latents.standardise(mean + std * np.random.default_rng(0).normal(size=mean.shape))
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=0.02)


def test_conversions_are_said_once_a_stage(run):
    folder, _, _ = run
    told = [line for line in json.loads((folder / "said.json").read_text()) if "made 1" in line]
    assert told == [
        "codec: 2 of 4 recordings have 2 channel(s), made 1.",
        "latents: 3 of 6 recordings have 2 channel(s), made 1.",
    ]
    record = json.loads((folder / "codec" / "config.json").read_text())["data"]
    assert record["converted"] == {"resampled": 0, "other_channels": 2}


def test_an_empty_caption_is_no_condition(run, music, tmp_path, monkeypatch):
    """The text beside a recording, or the group's label without one; an empty one has no state."""
    folder, stages, _ = run
    monkeypatch.setenv("JAXHERD_CACHE", str(tmp_path / "cache"))
    for number, caption in enumerate(("", "a b c", None)):
        for label in ("slow", "fast"):
            (tmp_path / label).mkdir(exist_ok=True)
            shutil.copy(music / label / f"{number}.wav", tmp_path / label)
            if caption is not None:
                (tmp_path / label / f"{number}.txt").write_text(f" {caption}\n")
    encoder = T5EncoderConfig(40, 8, 1, 2, 4, 8).build(jax.random.key(0))
    monkeypatch.setattr(codec_latents, "load", lambda source, dtype: encoder)
    monkeypatch.setattr(codec_latents, "load_tokenizer", lambda source: Letters())
    groups = tuple(AudioGroup(name, (str(tmp_path / name),)) for name in ("slow", "fast"))
    stage = dataclasses.replace(
        stages[1], data=dataclasses.replace(stages[1].data, groups=groups), text_encoder="t5"
    )
    context = StageContext(
        tmp_path / "latents", {"codec": folder / "codec"}, "cpu", tuple(jax.devices()[:1]), 0,
        say=lambda _: None,
    )  # fmt: skip
    stage.run(context)
    latents = LatentFolder.open(context.folder)
    tracks = latents.load("train") + latents.load("heldout")
    tokens = {track.name: track.tokens for track in tracks}
    # Letters and the end token.
    assert tokens == {"slow/0": 0, "slow/1": 6, "slow/2": 5, "fast/0": 0, "fast/1": 6, "fast/2": 5}
    clips = LatentClips(latent_dim=WIDTH, frames=16, text_dim=8, text_length=8)
    for track in tracks:
        row = clips._conditioned({"labels": 0, "frame_mask": np.ones(16), "track": track})
        assert row["text_mask"].sum() == tokens[track.name]
    # Tracks of one text share its states: none, "a b c" and the two labels.
    assert len(list(context.folder.glob("text-*.npy"))) == 4


def test_a_stopped_encoding_goes_on_with_what_is_missing(run, tmp_path, monkeypatch):
    """Stopped at the third track, one file cut off afterwards: five are encoded, all are right."""
    folder, stages, _ = run
    monkeypatch.setenv("JAXHERD_CACHE", str(folder / "cache"))
    monkeypatch.setattr(codec_latents, "write_track", stop_at(3))
    said: list[str] = []
    context = StageContext(
        tmp_path / "latents", {"codec": folder / "codec"}, "cpu", tuple(jax.devices()[:1]), 0,
        say=said.append,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        stages[1].run(context)
    finished = sorted(context.folder.glob("*.npy"))
    assert len(finished) == 2 and not (context.folder / "index.json").exists()
    assert not list(context.folder.glob("*.partial"))
    finished[0].write_bytes(finished[0].read_bytes()[:-1])
    kept = finished[1].stat().st_mtime_ns
    monkeypatch.setattr(codec_latents, "write_track", write_track)
    said.clear()
    stages[1].run(context)
    assert sum(": encoded " in line for line in said) == 5
    assert said[-1].startswith("latents: encoded 6 of 6 recordings, ")
    assert finished[1].stat().st_mtime_ns == kept
    again, whole = (LatentFolder.open(path / "latents") for path in (tmp_path, folder))
    for split in ("train", "heldout"):
        for a, b in zip(again.load(split), whole.load(split), strict=True):
            np.testing.assert_array_equal(a.read(0, len(a)), b.read(0, len(b)))


def stop_at(count):
    """`write_track` that is interrupted the `count`-th time."""
    calls = []

    def write(*arguments, **words):
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt
        write_track(*arguments, **words)

    return write


def test_half_the_storage_is_said_and_changes_little(run, tmp_path, monkeypatch):
    folder, stages, summary = run
    monkeypatch.setenv("JAXHERD_CACHE", str(folder / "cache"))
    said: list[str] = []
    context = StageContext(
        tmp_path / "latents", {"codec": folder / "codec"}, "cpu", tuple(jax.devices()[:1]), 0,
        say=said.append,
    )  # fmt: skip
    found = dataclasses.replace(stages[1], storage="float16").run(context)
    assert "latents: latents are rounded to float16." in said
    assert found["latent_std"] == pytest.approx(summary["latents"]["latent_std"], rel=2.0**-10)
    half, whole = (LatentFolder.open(path / "latents") for path in (tmp_path, folder))
    for a, b in zip(half.load("train"), whole.load("train"), strict=True):
        for x, y in zip(a.read(0, len(a)), b.read(0, len(b))):
            np.testing.assert_allclose(x, y, rtol=2.0**-11, atol=2.0**-25)
    with pytest.raises(JaxherdError, match="storage='float8'"):
        dataclasses.replace(stages[1], storage="float8")


def test_the_text_encoder_computes_in_float32(tmp_path, monkeypatch):
    """A checkpoint in half precision is widened before it is run, not its states afterwards."""
    encoder = T5EncoderConfig(40, 8, 1, 2, 4, 8).build(jax.random.key(0))
    half = cast_floating(encoder, "bfloat16")
    folder = str(save(half, tmp_path / "t5"))
    monkeypatch.setattr(codec_latents, "load_tokenizer", lambda source: Letters())
    states = codec_latents.TextEncoder(folder)("a b c")
    tokens, mask = np.zeros((1, 32), np.int32), np.arange(32)[None] < 6
    tokens[0, :6] = [*Letters().encode("a b c"), Letters.eos_id]

    def run(model):
        return np.asarray(codec_latents._states(model, tokens, mask)[0, :6], np.float32)

    np.testing.assert_allclose(states, run(cast_floating(half, "float32")), atol=1e-6)
    assert np.abs(states - run(half)).max() > 1e-4


class Letters:
    """A tokenizer of letters."""

    eos_id = 1

    def encode(self, text):
        return [2 + ord(letter) % 30 for letter in text]


def test_the_run_is_a_music_model(run):
    folder, _, _ = run
    model = load_music(folder)
    assert model.labels == ("slow", "fast")
    made = model.generate("fast", 0.2, SamplingPlan(4, "euler"), jax.random.key(0))
    assert made.wave_BTC.shape == (1, 400, 1) and np.isfinite(made.wave_BTC).all()


def test_samples_are_written_as_sound(run):
    folder, stages, summary = run
    assert summary["samples"]["evaluations"] == 8 and summary["samples"]["clips"] == 4
    sounds = sorted(path.name for path in (folder / "samples").glob("*.wav"))
    assert sounds == ["0-slow.wav", "1-fast.wav"]
    from jaxherd.data.audio.files import read_audio

    wave, rate = read_audio(folder / "samples" / "1-fast.wav")
    assert wave.shape == (160, 1) and rate == RATE and np.abs(wave).max() > 0
    assert (folder / "samples" / "1-fast.png").stat().st_size > 1000
    assert "(samples/0-slow.png)" in (folder / "report.md").read_text()
    model = stages[2].model
    assert stages[3].flops_per_step() == model.forward_flops(4 * 8, 16, 1)


def test_a_mesh_samples_what_one_device_does(run, devices):
    """Same noise and conditions, weights split over eight devices."""
    folder, stages, _ = run
    found = []
    for count in (1, 8):
        stage = dataclasses.replace(stages[3], batch_size=8, layout=Layout("fsdp"))
        program = stage.program(devices[:count])
        batch = {
            "noise": np.random.default_rng(0).normal(size=(8, 16, WIDTH)).astype("f4"),
            "labels": np.arange(8, dtype=np.int32) % 2,
        }
        parts = list(load_model(folder / "flow", *program.parts))
        found.append(np.asarray(program.step(parts, batch)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_samples_know_what_encoded_the_text(run, tmp_path, monkeypatch):
    """By the run's own record, which names the stage."""
    folder, stages, _ = run
    shutil.copytree(folder, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["experiment"]["stages"][1]["text_encoder"] = "t5"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    loaded = []

    def load(*arguments, **words):
        loaded.append(load_music(*arguments, **words))
        raise KeyboardInterrupt

    monkeypatch.setattr(music_samples, "load_music", load)
    artifacts = {name: tmp_path / "run" / name for name in stages[3].reads}
    with pytest.raises(KeyboardInterrupt):
        stages[3].run(StageContext(tmp_path / "s", artifacts, "cpu", tuple(jax.devices()[:1]), 0))
    assert loaded[0].text_encoder == "t5"


def test_prompts_must_be_labels_of_the_model(run):
    folder, stages, _ = run
    text = dataclasses.replace(
        stages[3], clips=LatentClips(latent_dim=WIDTH, frames=16, text_dim=8)
    )
    assert set(text.batch_spec()) == {"noise", "text_states", "text_mask"}
    with pytest.raises(JaxherdError, match="is none of the model's labels"):
        context = StageContext(
            folder / "other",
            {n: folder / n for n in text.reads},
            "cpu",
            tuple(jax.devices()[:1]),
            0,
        )
        dataclasses.replace(stages[3], prompts=("polka",)).run(context)
