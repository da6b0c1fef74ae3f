"""`jaxherd music`: sound in, sound out, and what is told before anything is computed."""

import dataclasses
import errno
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import tiny_music

from jaxherd.cli.main import main
from jaxherd.data.audio.files import read_audio, resample, write_audio
from jaxherd.data.audio.latent_file import LatentFile, statistics_digest
from jaxherd.methods import music_model
from jaxherd.methods.music_files import save_music


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_music(tiny_music.music_model(), tmp_path_factory.mktemp("m") / "model"))


@pytest.fixture
def song(tmp_path) -> str:
    return str(write_audio(tmp_path / "song.flac", tiny_music.tone(0.05)[0], tiny_music.RATE))


def test_generate_follows_the_seed_and_draws(model, tmp_path, capsys):
    def make(name, *more):
        out = tmp_path / name
        line = ["music", "generate", model, "--out", str(out), "--prompt", "heavy metal"]
        assert main([*line, "--seconds", "0.05", "--steps", "4", *more]) == 0
        return read_audio(out)[0]

    first = make("a.wav", "--plot", str(tmp_path / "a.png"))
    np.testing.assert_array_equal(first, make("b.wav"))
    assert np.abs(first - make("c.wav", "--seed", "1")).max() > 0
    assert first.shape == (400, 2) and (tmp_path / "a.png").stat().st_size > 10_000
    assert "network evaluations: 8; latent std" in capsys.readouterr().out


def test_a_text_encoder_is_for_models_of_texts(model, song, tmp_path, capsys):
    given = ["--out", str(tmp_path / "x.wav"), "--text-encoder", str(tmp_path)]
    for line in (["generate", model], ["edit", model, song, "--prompt", "orchestral"]):
        assert main(["music", *line, *given]) == 2
        assert "is conditioned on labels, not on texts" in capsys.readouterr().err
    assert not (tmp_path / "x.wav").exists()


@pytest.mark.parametrize("method", ["regularized", "sdedit"])
def test_edit_keeps_the_length(model, song, tmp_path, method, capsys):
    out = tmp_path / "edited.wav"
    line = ["music", "edit", model, song, "--prompt", "orchestral", "--out", str(out)]
    assert main([*line, "--steps", "3", "--method", method, "--target-flowstep", "0.2"]) == 0
    assert read_audio(out)[0].shape == read_audio(song)[0].shape
    assert "of the inverted noise" in capsys.readouterr().out


def test_edit_does_not_overwrite_its_source(model, song):
    before = Path(song).read_bytes()
    line = ["music", "edit", model, song, "--prompt", "orchestral", "--out", song]
    assert main(line) == 2 and Path(song).read_bytes() == before


def test_encode_and_decode_are_the_codec(model, song, tmp_path):
    latents, out = tmp_path / "song.npz", tmp_path / "back.wav"
    assert main(["music", "encode", model, song, "--out", str(latents)]) == 0
    assert main(["music", "decode", model, str(latents), "--out", str(out)]) == 0
    loaded = tiny_music.music_model()
    wave = read_audio(song)[0]
    wanted = np.clip(loaded.decode(loaded.encode(wave[None]))[0, : len(wave)], -1, 1)
    np.testing.assert_allclose(read_audio(out)[0], wanted, atol=1e-4)


BAD_LATENTS = {
    "cut off": ("x.npz", lambda p, good: p.write_bytes(good.read_bytes()[:-30])),
    "half": ("x.npz", lambda p, good: p.write_bytes(good.read_bytes()[:200])),
    "empty": ("x.npz", lambda p, good: p.write_bytes(b"")),
    "text": ("x.npz", lambda p, good: p.write_text("la la la")),
    "one array": ("x.npy", lambda p, good: np.save(p, np.zeros((5, 4), np.float32))),
    "several samples": ("x.npz", lambda p, good: resaved(p, good, samples=np.array([400, 400]))),
    "samples in words": ("x.npz", lambda p, good: resaved(p, good, samples="many")),
    "endless samples": ("x.npz", lambda p, good: resaved(p, good, samples=np.inf)),
    "no samples": ("x.npz", lambda p, good: resaved(p, good, samples=None)),
    "objects": ("x.npz", lambda p, good: resaved(p, good, latents=np.array([{}, 1]))),
    "complex": ("x.npz", lambda p, good: resaved(p, good, latents=np.ones((5, 4), complex))),
    "flat": ("x.npz", lambda p, good: resaved(p, good, latents=np.ones(4))),
}


def resaved(path, good, **changes):
    """Write the file again with other fields; None leaves one out."""
    fields = dict(np.load(good)) | changes
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})


@pytest.fixture
def encoded(model, song, tmp_path) -> Path:
    out = tmp_path / "good.npz"
    assert main(["music", "encode", model, song, "--out", str(out)]) == 0
    return out


def test_files_that_hold_no_latents_are_named(model, encoded, tmp_path, capsys):
    out = tmp_path / "x.wav"
    for kind, (name, make) in BAD_LATENTS.items():
        make(tmp_path / name, encoded)
        assert main(["music", "decode", model, str(tmp_path / name), "--out", str(out)]) == 2, kind
        error = capsys.readouterr().err.strip()
        assert name in error and len(error.splitlines()) == 1, (kind, error)
        assert not out.exists()


def test_latents_of_another_model_are_refused(model, encoded, tmp_path, capsys):
    def decode(path, model=model):
        out = tmp_path / "x.wav"
        code = main(["music", "decode", model, str(path), "--out", str(out)])
        told = capsys.readouterr()
        return code, told.out + told.err

    assert "note" not in decode(encoded)[1]
    loaded = tiny_music.music_model()
    other = dataclasses.replace(loaded, std=loaded.std * np.float32(1.001))
    code, told = decode(encoded, str(save_music(other, tmp_path / "other")))
    assert code == 2 and "good.npz' was encoded by a model with other statistics" in told
    changed = tmp_path / "changed.npz"
    resaved(changed, encoded, sample_rate=48_000)
    code, told = decode(changed)
    assert code == 2 and "changed.npz' was encoded at 48000 Hz, not the model's 8000 Hz" in told
    resaved(changed, encoded, statistics=None)  # as written before they were kept
    code, told = decode(changed)
    assert code == 0 and "note: changed.npz does not say which model encoded it" in told


def test_a_disk_that_gets_full_leaves_no_latents(model, song, tmp_path, capsys, monkeypatch):
    def full(file, **fields):
        file.write(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    out = tmp_path / "x.npz"
    assert main(["music", "encode", model, song, "--out", str(out)]) == 74
    assert "x.npz' could not be written (No space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["song.flac"]


def test_six_channels_are_named_and_not_promised(model, tmp_path, capsys):
    six = write_audio(tmp_path / "six.wav", np.full((400, 6), 0.1, np.float32), tiny_music.RATE)
    for verb, more in (("encode", ()), ("edit", EDIT)):
        out = tmp_path / ("x.npz" if verb == "encode" else "x.wav")
        assert main(["music", verb, model, str(six), "--out", str(out), *more]) == 2
        told = capsys.readouterr()
        assert "six.wav': 6 channels cannot be made 2" in told.err and "made" not in told.out


def heard(model, verb, source, tmp_path, *more):
    """Run a verb that reads a recording; return what it wrote, [T, C] or latents."""
    out = tmp_path / ("out.npz" if verb == "encode" else "out.wav")
    assert main(["music", verb, model, str(source), "--out", str(out), *more]) == 0
    return np.load(out)["latents"] if verb == "encode" else read_audio(out)[0]


EDIT = ("--prompt", "heavy metal", "--steps", "2", "--method", "sdedit")


def test_mono_and_other_rates_are_converted_with_a_note(model, tmp_path, capsys):
    wave = tiny_music.tone(0.05)[0]
    both = heard(model, "encode", write_audio(tmp_path / "a.wav", wave, tiny_music.RATE), tmp_path)
    assert "note" not in capsys.readouterr().out
    mono = write_audio(tmp_path / "mono.wav", wave[:, :1], tiny_music.RATE)
    np.testing.assert_array_equal(heard(model, "encode", mono, tmp_path), both)
    assert "note: mono.wav has 1 channel(s), made 2." in capsys.readouterr().out
    high = write_audio(tmp_path / "high.wav", resample(wave, tiny_music.RATE, 48_000), 48_000)
    for verb, more in (("encode", ()), ("edit", EDIT)):
        found = heard(model, verb, high, tmp_path, *more)
        assert (
            "high.wav is at 48000 Hz, resampled to the model's 8000 Hz" in capsys.readouterr().out
        )
        assert len(found) == (len(both) if verb == "encode" else len(wave))
    np.testing.assert_allclose(heard(model, "encode", high, tmp_path)[5:-5], both[5:-5], atol=0.05)


@pytest.mark.parametrize("verb, more", [("encode", ()), ("edit", EDIT)])
def test_silence_is_told_and_gives_numbers(model, tmp_path, capsys, verb, more):
    path = write_audio(tmp_path / "hush.wav", np.zeros((400, 2), np.float32), tiny_music.RATE)
    assert np.isfinite(heard(model, verb, path, tmp_path, *more)).all()
    assert "note: hush.wav is silent throughout." in capsys.readouterr().out


@pytest.mark.parametrize("verb, more", [("encode", ()), ("edit", EDIT)])
def test_a_recorded_stream_is_told(model, song, tmp_path, capsys, verb, more):
    path = write_audio(tmp_path / "stream.wav", read_audio(song)[0], tiny_music.RATE)
    heard(model, verb, path, tmp_path, *more)
    assert "header" not in capsys.readouterr().out
    data = path.read_bytes()
    at = data.index(b"data") + 4
    path.write_bytes(data[:at] + b"\xff" * 4 + data[at + 4 :])
    heard(model, verb, path, tmp_path, *more)
    assert "note: the header of stream.wav does not say how long it is" in capsys.readouterr().out


@pytest.mark.parametrize("verb, more", [("encode", ()), ("edit", EDIT)])
def test_bad_recordings_are_one_sentence(model, tmp_path, capsys, verb, more):
    wrong = tmp_path / "nan.wav"
    soundfile.write(wrong, np.full((400, 2), np.nan, np.float32), tiny_music.RATE, subtype="FLOAT")
    whole = write_audio(tmp_path / "whole.ogg", tiny_music.tone(4.0)[0], tiny_music.RATE)
    cut = tmp_path / "cut.ogg"
    cut.write_bytes(whole.read_bytes()[: int(0.9 * whole.stat().st_size)])
    out = tmp_path / ("x.npz" if verb == "encode" else "x.wav")
    for path, told in ((wrong, "values that are no numbers"), (cut, "is cut off after")):
        assert main(["music", verb, model, str(path), "--out", str(out), *more]) == 2
        error = capsys.readouterr().err.strip()
        assert told in error and len(error.splitlines()) == 1, error
        assert not out.exists() and not list(tmp_path.glob("*.partial"))


def test_long_recordings_are_encoded_in_pieces_and_not_edited(tmp_path, capsys, monkeypatch):
    """An edit refuses it by the header alone; encoding holds two pieces and the latents."""
    monkeypatch.setattr(music_model, "FRAMES_PER_CHUNK", 25)
    small = tiny_music.SLOW
    folder = str(save_music(tiny_music.music_model(codec=small), tmp_path / "model"))
    path, minutes = tmp_path / "long.flac", 180  # three hours
    with soundfile.SoundFile(path, "w", tiny_music.RATE, 1) as file:
        for minute in range(minutes):
            file.write(np.full(60 * tiny_music.RATE, 0.3 * (minute % 2), np.float32))
    out = tmp_path / "x.wav"
    assert main(["music", "edit", folder, str(path), "--out", str(out), *EDIT]) == 2
    assert "10800 s long, more than the 600 s" in capsys.readouterr().err
    tracemalloc.start()
    try:
        latents = heard(folder, "encode", path, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    samples = minutes * 60 * tiny_music.RATE
    assert latents.shape == (samples // 4000, 4)
    assert peak < samples * 2 * 4 / 2, "less than half of the whole wave"
    # Minute by minute the latents are those of silence and of something else.
    rows = latents.reshape(minutes, -1, 4)[:, 10:-10]
    assert np.abs(rows[2] - rows[4]).max() < 1e-4 < 1e-3 < np.abs(rows[2] - rows[3]).max()


def test_long_latents_are_decoded_in_bounded_memory(tmp_path, monkeypatch):
    """Eight times the length takes no more memory, and the sound is that of the whole.

    Pieces lie in buffers of JAX, which tracemalloc does not see, so that copies are handed out.
    """
    monkeypatch.setattr(music_model, "FRAMES_PER_CHUNK", 25)
    decode_pieces = music_model.MusicModel.decode_pieces
    monkeypatch.setattr(
        music_model.MusicModel,
        "decode_pieces",
        lambda *arguments, **words: (wave.copy() for wave in decode_pieces(*arguments, **words)),
    )
    loaded = tiny_music.music_model(codec=tiny_music.SLOW)
    folder = str(save_music(loaded, tmp_path / "model"))
    chance, peaks = np.random.default_rng(0), []
    for frames in (100, 100, 800):  # the first one compiles
        latents = chance.standard_normal((frames, 4)).astype(np.float32)
        path, out = tmp_path / "long.npz", tmp_path / "long.wav"
        digest = statistics_digest(loaded.mean, loaded.std)
        LatentFile(latents, frames * 4000 - 7, tiny_music.RATE, digest).write(path)
        tracemalloc.start()
        try:
            assert main(["music", "decode", folder, str(path), "--out", str(out)]) == 0
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        if frames == 100:
            wanted = np.clip(loaded.decode(latents[None])[0, : frames * 4000 - 7], -1, 1)
            np.testing.assert_allclose(read_audio(out)[0], wanted, atol=1e-4)
    assert soundfile.info(out).frames == 800 * 4000 - 7
    more = 700 * 4000 * loaded.channels * 4  # bytes of what is longer
    assert peaks[2] < peaks[1] + more / 10, peaks


def test_an_empty_prompt_is_no_condition(model, song, tmp_path, capsys):
    def make(name, *more):
        line = ["music", "generate", model, "--out", str(tmp_path / name), "--seconds", "0.05"]
        assert main([*line, "--steps", "4", *more]) == 0
        return read_audio(tmp_path / name)[0]

    np.testing.assert_array_equal(make("a.wav", "--prompt", " "), make("b.wav"))
    told = capsys.readouterr().out
    assert told.count("the prompt is empty") == 1 and told.count("evaluations: 4;") == 2
    edited = heard(model, "edit", song, tmp_path, "--prompt", "", *EDIT[2:])
    assert np.isfinite(edited).all() and "the prompt is empty" in capsys.readouterr().out


def test_more_than_the_model_was_trained_on_is_noted(model, tmp_path, capsys):
    line = ["music", "generate", model, "--out", str(tmp_path / "a.wav"), "--steps", "2"]
    assert main([*line, "--seconds", "0.05"]) == 0
    assert "note" not in capsys.readouterr().out
    assert main([*line, "--seconds", "0.2"]) == 0
    assert "0.20 s is more than the 0.05 s of the clips" in capsys.readouterr().out
    assert len(read_audio(tmp_path / "a.wav")[0]) == 0.2 * tiny_music.RATE
    assert main([*line, "--seconds", "601"]) == 2
    assert "up to 600 s" in capsys.readouterr().err
    song = write_audio(tmp_path / "long.wav", tiny_music.tone(0.2)[0], tiny_music.RATE)
    heard(model, "edit", song, tmp_path, *EDIT)
    assert "0.20 s is more than the 0.05 s of the clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("generate", "MODEL", "--out", "x.mp3"), "the suffix says the format"),
        (("generate", "MODEL", "--out", "no/x.wav"), "does not exist or cannot be written"),
        (
            ("generate", "MODEL", "--out", "x.wav", "--prompt", "polka"),
            "none of the model's labels",
        ),
        (("generate", "MODEL", "--out", "x.wav", "--seconds", "-1"), "above 0"),
        (("generate", "MODEL", "--out", "x.wav", "--steps", "3"), "even|midpoint"),
        (("generate", "nothing", "--out", "x.wav"), "no file or folder"),
        (("edit", "MODEL", "none.wav", "--prompt", "metal", "--out", "x.wav"), "no audio file"),
        (("generate", "MODEL", "--out", "x.wav", "--cfg", "nan"), "cfg_coef=nan"),
        (("generate", "MODEL", "--out", "x.wav", "--cfg", "1e30"), "beyond 100, where nothing but"),
        (
            ("edit", "nothing", "none.wav", "--prompt", "m", "--out", "x.wav", "--cfg", "1e30"),
            "beyond 100",
        ),
        (
            ("edit", "nothing", "none.wav", "--prompt", "m", "--out", "x.wav", "--cfg", "inf"),
            "cfg_coef=inf",
        ),
        (("decode", "MODEL", "none.npz", "--out", "x.wav"), "there is no file"),
        (("encode", "MODEL", "none.wav", "--out", "x.txt"), "name a .npz"),
    ],
)
def test_what_cannot_be_is_one_sentence(model, tmp_path, monkeypatch, capsys, arguments, told):
    import re

    monkeypatch.chdir(tmp_path)
    assert main(["music", *(model if a == "MODEL" else a for a in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(told, error) and len(error.splitlines()) == 1, error
    assert not list(tmp_path.iterdir())
