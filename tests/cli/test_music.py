"""`jaxherd music`: sound in, sound out, and what is told before anything is computed."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import tiny_music

from jaxherd.cli.main import main
from jaxherd.data.audio.files import read_audio, write_audio
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


@pytest.mark.parametrize("method", ["regularized", "sdedit"])
def test_edit_keeps_the_length(model, song, tmp_path, method, capsys):
    out = tmp_path / "edited.wav"
    line = ["music", "edit", model, song, "--prompt", "orchestral", "--out", str(out)]
    assert main([*line, "--steps", "3", "--method", method, "--target-flowstep", "0.2"]) == 0
    assert read_audio(out)[0].shape == read_audio(song)[0].shape
    assert "of the inverted noise" in capsys.readouterr().out


def test_encode_and_decode_are_the_codec(model, song, tmp_path):
    latents, out = tmp_path / "song.npz", tmp_path / "back.wav"
    assert main(["music", "encode", model, song, "--out", str(latents)]) == 0
    assert main(["music", "decode", model, str(latents), "--out", str(out)]) == 0
    loaded = tiny_music.music_model()
    wave = read_audio(song)[0]
    wanted = np.clip(loaded.decode(loaded.encode(wave[None]))[0, : len(wave)], -1, 1)
    np.testing.assert_allclose(read_audio(out)[0], wanted, atol=1e-4)


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
        (("decode", "MODEL", "none.npz", "--out", "x.wav"), "holds no latents"),
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
