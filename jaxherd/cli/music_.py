"""`jaxherd music`: generate, edit, encode and decode with a music model."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError, missing_extra
from jaxherd.training.progress import Counts

Method = Literal["regularized", "fixed_point", "ddim", "ddim_midpoint", "renoise", "sdedit"]


def generate(
    model: tyro.conf.Positional[str],
    /,
    out: Path,
    prompt: str | None = None,
    seconds: float | None = None,
    steps: int = 64,
    solver: Literal["midpoint", "euler"] = "midpoint",
    cfg: float = 4.0,
    seed: int = 0,
    text_encoder: str | None = None,
    plot: Path | None = None,
    on: str = "cpu",
) -> int:
    """Make music from noise.

    Example: jaxherd music generate runs/melodyflow-text_to_music-cpu --prompt "orchestral music"
             --out new.wav

    Args:
        model: folder of a run of melodyflow/text_to_music, of a saved music model, or of the
            published state_dict.bin and compression_state_dict.bin.
        out: .wav, .flac or .ogg.
        prompt: one of the model's labels, or a text; nothing, or an empty one, gives unconditional
            music.
        seconds: length, up to 600; the length of the clips that the model was trained on if not
            given.
        steps: network evaluations without guidance; guidance doubles them.
        solver: midpoint (even steps) or euler.
        cfg: guidance w of v = (1 + w) v_text - w v_null; at most 100.
        seed: of the noise.
        text_encoder: folder of the T5 encoder with its tokenizer, in place of the one that the model
            names.
        plot: also draw spectrogram and latents to this .png file.
        on: cpu, gpu or tpu.
    """
    _check_out(out, plot)
    from jaxherd.methods.flow_sampling import SamplingPlan

    plan = SamplingPlan(steps, solver, cfg_coef=cfg)
    if seconds is not None and not (math.isfinite(seconds) and 0 < seconds <= 600):
        raise JaxherdError(f"--seconds {seconds}: give a length above 0 and up to 600 s.")
    loaded = _load(model, on, text_encoder)
    loaded.condition(prompt)
    _tell_prompt(prompt)
    _tell_length(seconds or loaded.clip_seconds, loaded)
    import jax

    with Counts() as report:
        made = loaded.generate(
            prompt, seconds or loaded.clip_seconds, plan, jax.random.key(seed), report=report
        )
    _finish(loaded, made, out, plot)
    return 0


def edit(
    model: tyro.conf.Positional[str],
    source: tyro.conf.Positional[Path],
    /,
    prompt: str,
    out: Path,
    source_prompt: str | None = None,
    method: Method = "regularized",
    target_flowstep: float = 0.0,
    steps: int | None = None,
    cfg: float = 4.0,
    seed: int = 0,
    text_encoder: str | None = None,
    plot: Path | None = None,
    on: str = "cpu",
) -> int:
    """Change a recording to what a prompt says, by inverting it and coming back.

    Example: jaxherd music edit runs/melodyflow-text_to_music-cpu song.ogg --prompt "heavy metal"
             --target-flowstep 0.1 --out edited.wav

    Args:
        model: folder of a run of melodyflow/text_to_music, of a saved music model, or of the
            published state_dict.bin and compression_state_dict.bin.
        source: the recording: WAV, FLAC, OGG or MP3, at any rate, up to 600 s.
        prompt: what it should become; an empty one is no condition at all.
        out: .wav, .flac or .ogg.
        source_prompt: what it is; nothing is the paper's default.
        method: regularized (the paper's), fixed_point, ddim (naive), ddim_midpoint (naive, by the
            midpoint solver), renoise or sdedit.
        target_flowstep: how far towards noise the inversion goes, from 0 (all the way, the
            strongest edit) to below 1.
        steps: of inversion and generation each; the method's own if not given: 25, and 64 of
            ddim_midpoint.
        cfg: guidance of the generation; at most 100.
        seed: of the posterior's sample and of the inversion.
        text_encoder: folder of the T5 encoder with its tokenizer, in place of the one that the model
            names.
        plot: also draw spectrograms and latents to this .png file.
        on: cpu, gpu or tpu.
    """
    _check_out(out, plot)
    if out.exists() and source.exists() and out.samefile(source):
        raise JaxherdError(f"--out {out} is the recording itself: name another file.")
    from jaxherd.methods.flow_sampling import check_guidance
    from jaxherd.methods.latent_inversion import inversion

    given = {} if steps is None else {"steps": steps}
    plan = inversion(method, target_flowstep=target_flowstep, **given)
    check_guidance(cfg)
    wave, loaded = _source(model, source, on, text_encoder)
    loaded.condition(prompt)
    loaded.condition(source_prompt)
    _tell_prompt(prompt)
    _tell_length(len(wave) / loaded.sample_rate, loaded)
    import jax

    with Counts() as report:
        made = loaded.edit(
            wave[None],
            prompt,
            plan,
            jax.random.key(seed),
            source_prompts=source_prompt,
            cfg_coef=cfg,
            report=report,
        )
    _finish(loaded, made, out, plot, before=wave)
    return 0


def encode(
    model: tyro.conf.Positional[str],
    source: tyro.conf.Positional[Path],
    /,
    out: Path,
    on: str = "cpu",
) -> int:
    """Write a recording's latents (posterior means, standardised) as .npz.

    Example: jaxherd music encode runs/melodyflow-text_to_music-cpu song.ogg --out song.npz

    Args:
        model: folder of a run of melodyflow/text_to_music, of a saved music model, or of the
            published state_dict.bin and compression_state_dict.bin.
        source: the recording: WAV, FLAC, OGG or MP3, at any rate, up to four hours; it is read and
            encoded piece by piece.
        out: the .npz file.
        on: cpu, gpu or tpu.
    """
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise JaxherdError(f"--out {out}: name a .npz file in a folder that exists.")
    from jaxherd.data.audio.files import audio_blocks, audio_info
    from jaxherd.data.audio.latent_file import LatentFile

    info = audio_info(source)
    loaded = _load(model, on)
    _tell_source(source, info, loaded)
    config, samples, peak = loaded.autoencoder.config, 0, 0.0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal samples, peak
        for wave in audio_blocks(source, sample_rate=loaded.sample_rate, channels=loaded.channels):
            samples, peak = samples + len(wave), max(peak, float(np.abs(wave).max()))
            yield wave[None]

    with Counts() as report:
        frames = config.frames(math.ceil(info.seconds * loaded.sample_rate))
        latents = loaded.encode_pieces(pieces(), report=report, frames=frames)[0]
    _tell_silence(source, peak)
    LatentFile(latents, samples, loaded.sample_rate, _statistics(loaded)).write(out)
    print(f"wrote {latents.shape[0]} frames of {latents.shape[1]} latents to {out}")
    return 0


def decode(
    model: tyro.conf.Positional[str],
    latents: tyro.conf.Positional[Path],
    /,
    out: Path,
    on: str = "cpu",
) -> int:
    """Turn latents back into sound.

    Example: jaxherd music decode runs/melodyflow-text_to_music-cpu song.npz --out back.wav

    Args:
        model: the model that encoded them.
        latents: the .npz file that `jaxherd music encode` wrote; another model's is refused.
        out: .wav, .flac or .ogg.
        on: cpu, gpu or tpu.
    """
    _check_out(out, None)
    from jaxherd.data.audio.files import write_audio_pieces
    from jaxherd.data.audio.latent_file import read_latent_file

    found = read_latent_file(latents)
    loaded = _load(model, on)
    found.check(latents, loaded.sample_rate, _statistics(loaded))
    if found.statistics is None:
        print(f"note: {latents.name} does not say which model encoded it; it may be another one.")
    done = 0

    def pieces(report: Any) -> Iterator[np.ndarray]:
        nonlocal done
        for wave in loaded.decode_pieces(found.latents_FL[None], report=report):
            piece = wave[0, : found.samples - done]
            done += len(piece)
            yield piece

    with Counts() as report:
        write_audio_pieces(out, pieces(report), loaded.sample_rate, loaded.channels)
    print(f"wrote {done / loaded.sample_rate:.2f} s to {out}")
    return 0


def _statistics(loaded: Any) -> str:
    from jaxherd.data.audio.latent_file import statistics_digest

    return statistics_digest(np.asarray(loaded.mean), np.asarray(loaded.std))


def _load(model: str, on: str, text_encoder: str | None = None) -> Any:
    common.local_devices(on)
    from jaxherd.methods.music_files import load_music

    return load_music(model, text_encoder=text_encoder)


def _source(model: str, source: Path, on: str, text_encoder: str | None) -> tuple[np.ndarray, Any]:
    """Return (wave [T, C] at the model's rate, the model); the file is read before the model."""
    from jaxherd.data.audio.files import audio_info, read_audio, resample, with_channels

    info = audio_info(source, max_seconds=600.0)
    wave, rate = read_audio(source, max_seconds=600.0)
    loaded = _load(model, on, text_encoder)
    _tell_source(source, info, loaded)
    _tell_silence(source, float(np.abs(wave).max()))
    wave = with_channels(wave, loaded.channels)
    if rate != loaded.sample_rate:
        wave = resample(wave, rate, loaded.sample_rate)
    return wave, loaded


def _tell_source(source: Path, info: Any, loaded: Any) -> None:
    """Say what is done to a recording before the codec sees it, or that it cannot be."""
    from jaxherd.data.audio.files import check_channels

    check_channels(info.channels, loaded.channels, source)
    if info.channels != loaded.channels:
        print(f"note: {source.name} has {info.channels} channel(s), made {loaded.channels}.")
    if info.sample_rate != loaded.sample_rate:
        print(
            f"note: {source.name} is at {info.sample_rate} Hz, resampled to the model's "
            f"{loaded.sample_rate} Hz."
        )
    if info.streamed:
        print(
            f"note: the header of {source.name} does not say how long it is; it is read to its end, "
            "and whether it was cut off cannot be told."
        )


def _tell_silence(source: Path, peak: float) -> None:
    if peak < 1e-4:
        print(f"note: {source.name} is silent throughout.")


def _tell_prompt(prompt: str | None) -> None:
    if prompt is not None and not prompt.strip():
        print("note: the prompt is empty, so the music follows no condition.")


def _tell_length(seconds: float, loaded: Any) -> None:
    # Rounding to whole frames is no reason for a note.
    if seconds > loaded.clip_seconds + 1.5 / loaded.frame_rate:
        print(
            f"note: {seconds:.2f} s is more than the {loaded.clip_seconds:.2f} s of the clips that "
            "the model was trained on; expect it to lose its way beyond them."
        )


def _check_out(out: Path, plot: Path | None) -> None:
    from jaxherd.data.audio.files import check_output

    check_output(out)
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise JaxherdError(f"--plot {plot}: name a .png file in a folder that exists.")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "report", "--plot")


def _write(out: Path, wave: np.ndarray, rate: int) -> None:
    from jaxherd.data.audio.files import write_audio

    write_audio(out, wave, rate)
    print(f"wrote {len(wave) / rate:.2f} s to {out}")


def _finish(
    loaded: Any, made: Any, out: Path, plot: Path | None, before: np.ndarray | None = None
) -> None:
    for note in made.notes:
        print(f"note: {note}")
    print(f"network evaluations: {made.evaluations}; latent std {made.latent_std:.3f}", end="")
    print("" if made.inverted_std is None else f"; of the inverted noise {made.inverted_std:.3f}")
    _write(out, made.wave_BTC[0], loaded.sample_rate)
    if plot is not None:
        from jaxherd.training.plots import music_figure

        waves = {"result": made.wave_BTC[0]} if before is None else {
            "source": before, "result": made.wave_BTC[0]}  # fmt: skip
        music_figure(plot, waves, made.latents_BFL[0], loaded.sample_rate, loaded.frame_rate)
        print(f"drew {plot}")


VERBS = {"generate": generate, "edit": edit, "encode": encode, "decode": decode}
