# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # MelodyFlow in jaxherd, on a CPU, in three minutes
#
# MelodyFlow makes and edits music in two parts: a *codec* that turns a 48 kHz stereo wave into a
# few smooth numbers a frame (no quantiser) and back, and a *velocity network* that carries noise, at
# $t = 0$, to such latents, at $t = 1$, along paths that training makes as straight as it can. To
# edit a recording is to carry it back towards noise and forth again under another prompt. Here you
# train both on real music, listen, and edit a clip that neither has heard.
#
# Networks trained for a minute sound bad: expect a codec as if heard through a wall, and a generator
# that rumbles and plays no tune. What is worth looking at is that each part does what it should.

# %%
# In Colab: install jaxherd first (the repository's README says from where).
import importlib.util

if importlib.util.find_spec("jaxherd") is None:
    raise SystemExit("Run: !pip install 'jaxherd[demo,audio] @ git+URL-OF-THE-REPOSITORY'")

# %%
import dataclasses
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Audio, display

from jaxherd.core import catalog

BLUE, RED = "#1b6ca8", "#c1440e"

# %% [markdown]
# ## Recordings
# Two instrumental pieces by Anttis, released free by their author, that the game library `arcade`
# brings along (43 MB; only these files are used, nothing of it is installed). The first minute and a
# half of each is cut into stretches of eight seconds, and the title is the label. Two stretches
# of each piece are held out whole. They come from the same two pieces as those trained on, so the
# results below say less than results on pieces never heard would.
#
# For music of your own let `groups` name folders, one a label, with at least two recordings in each:
# `AudioGroup("jazz", ("/path/to/jazz",))`. The recipe's own are whole pieces from Debian packages,
# which Debian and Ubuntu machines can fetch: leave `groups` as `recordings.groups` then.

# %%
from jaxherd.data.audio.files import read_audio, write_audio
from jaxherd.data.audio.tracks import AudioGroup
from jaxherd.data.sources import resolve

SECONDS, STRETCHES = 8, 12
workdir = pathlib.Path(tempfile.mkdtemp())
music = resolve("pypi://arcade==3.3.3/arcade/resources/assets/music")
groups = []
for file, label in (("1918", "1918"), ("funkyrobot", "funky robot")):
    wave, rate = read_audio(music / f"{file}.mp3")
    folder = workdir / "music" / label
    folder.mkdir(parents=True)
    for number in range(STRETCHES):
        piece = wave[number * SECONDS * rate : (number + 1) * SECONDS * rate]
        write_audio(folder / f"{number:02}.flac", piece, rate)
    groups.append(AudioGroup(label, (str(folder),)))
    print(
        f"{label}: {len(wave) / rate:.0f} s at {rate} Hz, the first {STRETCHES * SECONDS} s of it"
    )
    display(Audio(wave[: 6 * rate].T, rate=rate))

# %% [markdown]
# ## Train codec and flow
# The very recipe of `jaxherd run melodyflow/text_to_music --on cpu`, on these recordings and made
# shorter by overrides. Three of its stages: `codec` learns to reconstruct; `latents` encodes every
# recording once; `flow` learns to carry noise to the latents. Two to four minutes go by; a line every
# ten seconds says how far it is.

# %%
from jaxherd.core.runner import run_experiment

experiment = catalog.load("melodyflow/text_to_music", "cpu")
recordings = dataclasses.replace(experiment.stage("codec").data, groups=tuple(groups))
# The recipe's last stage, `samples`, draws clips; here that is done by hand, further down.
stages = [experiment.stage(name) for name in ("codec", "latents", "flow")]
stages[:2] = [dataclasses.replace(stage, data=recordings) for stage in stages[:2]]
experiment = dataclasses.replace(experiment, stages=tuple(stages)).with_overrides(
    [
        "run_config.loggers=jsonl",
        "codec.run_config.steps=160",
        "codec.run_config.eval_every=40",
        "codec.step.average_decay=0.95",
        f"flow.model.conditioner.num_labels={len(groups)}",
        "flow.data.coupling_group=32",
        "flow.data.batch_size=32",
        "flow.data.eval_batch_size=16",
        "flow.optimizer.schedule.warmup_steps=20",
        "flow.run_config.steps=90",
        "flow.run_config.eval_every=30",
        "flow.step.average_decay=0.95",
    ]
)
run = workdir / "run"
summary = run_experiment(
    experiment,
    run,
    target="cpu",
    devices=tuple(jax.devices("cpu")[:1]),
)
for split in ("train", "heldout"):
    counts = [len(tracks) for tracks in recordings.tracks(split)]
    print(f"{split}: {counts[0]} and {counts[1]} stretches")

# %%
from jaxherd.training.loggers import read_records


def curve(stage, kind, name):
    records = [r for r in read_records(run / stage / "metrics.jsonl") if r["kind"] == kind]
    return [r["step"] for r in records], [r[name] for r in records]


figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
for axis, (stage, name, title, unit) in zip(
    axes,
    (
        ("codec", "snr_db", "codec: signal to noise", "dB"),
        ("flow", "loss", "flow: squared error of the velocity", "loss"),
    ),
):
    axis.plot(*curve(stage, "train", name), color=BLUE, lw=0.8, alpha=0.7, label="training")
    axis.plot(*curve(stage, "eval", f"heldout/{name}"), "o-", color=RED, label="held out")
    axis.set(title=title, xlabel="step", ylabel=unit)
    axis.legend()
axes[0].set_ylim(-3, None)
plt.show()

# %% [markdown]
# The held-out points use the running mean of the weights, which lags in so short a training. A codec
# of 0 dB would do no better than silence. A flow that knew nothing of music but that its latents have
# unit variance would stay near 1.7, the mean of $1/(t^2 + (1-t)^2)$ over the times that training
# draws.
#
# ## What the codec keeps
# A run's folder is a model source. Held-out clips go through the codec: 48,000 times 2 samples a
# second become 100 frames of 32 numbers and come back.

# %%
from jaxherd.methods.music_files import load_music

model = load_music(run)
rate = model.sample_rate
length = 2 * rate
heldout = [tracks[0].read(2 * rate, length) for tracks in recordings.tracks("heldout")]
clips = np.stack(heldout)
latents = model.encode(clips)
# `held`: the clips are cut out of longer ones, so their ends are not silence to the decoder.
decoded = model.decode(latents, held=True)[:, :length]


def spectrograms(waves, title):
    figure, axes = plt.subplots(1, len(waves), figsize=(11, 3), sharey=True, layout="constrained")
    for axis, (name, wave) in zip(axes, waves.items()):
        mono = wave.mean(axis=1) + 1e-7
        *_, image = axis.specgram(
            mono, NFFT=1024, noverlap=768, Fs=rate, cmap="magma", vmin=-130, vmax=-40
        )
        axis.set(title=name, xlabel="seconds", ylim=(0, 6000))
    axes[0].set_ylabel("Hz")
    figure.colorbar(image, ax=axes, label="dB")
    figure.suptitle(title)
    plt.show()


def snr(wave, other):
    return 10 * np.log10((wave**2).sum() / ((wave - other) ** 2).sum())


for label, before, after in zip(model.labels, clips, decoded):
    print(f"{label}: before, after the codec ({snr(before, after):.1f} dB)")
    display(Audio(before.T, rate=rate), Audio(after.T, rate=rate))
spectrograms({"before": clips[1], "after the codec": decoded[1]}, f"held out: {model.labels[1]}")

# %% [markdown]
# Beats and the loud low partials come back; most of what lies above 600 Hz is lost. A loss of the
# wave cares for energy, and that is low down. The lines at even distances are the codec's own: what
# the strides of its decoder repeat. Codecs that sound well add a discriminator and train for days.
#
# ## The latents
# Standardised by the statistics of all training recordings, so that noise of unit variance is what
# the flow may start from. They are no noise: most are small, and all are large where a beat falls.

# %%
figure, axes = plt.subplots(
    1, 2, figsize=(11, 3.2), layout="constrained", gridspec_kw={"width_ratios": (2, 1)}
)
image = axes[0].imshow(
    latents[1].T,
    aspect="auto",
    origin="lower",
    cmap="RdBu",
    vmin=-3,
    vmax=3,
    extent=(0, 2, -0.5, 31.5),
)
axes[0].set(title=f"latents of {model.labels[1]}", xlabel="seconds", ylabel="channel")
figure.colorbar(image, ax=axes[0])
values = np.linspace(-4, 4, 81)
axes[1].hist(latents.ravel(), bins=values, density=True, color=BLUE, alpha=0.7, label="held out")
axes[1].plot(values, np.exp(-(values**2) / 2) / np.sqrt(2 * np.pi), color=RED, label="N(0, 1)")
axes[1].set(title=f"all values, deviation {latents.std():.2f}", xlabel="value", ylabel="density")
axes[1].legend()
plt.show()

# %% [markdown]
# ## Generate
# The solver goes from noise to data in steps that the *sway* grid packs near noise, where the
# direction is still to be decided: $t(u) = u + s\,(\cos(\pi u / 2) - 1 + u)$ with $s = -0.8$.
# Guidance doubles the network's evaluations: $v = (1 + w)\,v_{\mathrm{label}} - w\,v_{\mathrm{null}}$.

# %%
from jaxherd.methods.flow_sampling import SamplingPlan, sway_grid

plan = SamplingPlan(32, "midpoint", cfg_coef=1.0)
made = model.generate(list(model.labels), model.clip_seconds, plan, jax.random.key(0))
print(f"{made.evaluations} evaluations, latent std {made.latent_std:.2f}")
for label, wave in zip(model.labels, made.wave_BTC):
    print(label)
    display(Audio(wave.T, rate=rate))
spectrograms(dict(zip(model.labels, made.wave_BTC)), "generated")

# %% [markdown]
# A rumble in the register that the codec knows, with no beat yet and little between the labels. How
# few steps would do? The same noise is carried to data in $N$ evaluations by either solver and
# compared with 512. Were all paths straight and run at constant speed, one step would be exact.

# %%
from jaxherd.methods.flow_measures import exact_samples, path_curvature, sampling_error

noise = jax.random.normal(jax.random.key(1), (2, 96, latents.shape[2]))
exact = exact_samples(model.velocity, None, noise)
counts = (4, 8, 16)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
for sway, color in ((0.0, "gray"), (-0.8, BLUE)):
    axes[0].plot(np.arange(17) / 16, sway_grid(16, sway), "o-", color=color, label=f"sway {sway}")
axes[0].set(title="times of 16 steps", xlabel="step / 16", ylabel="t (0 noise, 1 data)")
for solver, color in (("euler", "gray"), ("midpoint", BLUE)):
    errors = [
        sampling_error(
            model.velocity, None, noise, SamplingPlan(count, solver, cfg_coef=0.0), exact
        )
        for count in counts
    ]
    axes[1].loglog(counts, errors, "o-", color=color, label=solver)
axes[1].set(title="error of few-step sampling", xlabel="evaluations", ylabel="mean squared error")
axes[1].set_xticks(counts, map(str, counts), minor=False)
axes[1].minorticks_off()
for axis in axes:
    axis.legend()
plt.show()
print(f"curvature of the paths: {path_curvature(model.velocity, None, noise):.3f} (0 is straight)")

# %% [markdown]
# ## Edit a clip that was held out
# Regularised latent inversion goes from the clip at $t = 1$ down to `target_flowstep`. Each step is
# solved for the velocity at its *destination*, so that the way back is the same way, and pulled a
# little towards the velocity at the clip freshly noised to that time. Then it goes up again under the other title. SDEdit,
# beside it, only adds noise.

# %%
from jaxherd.methods.latent_inversion import inversion
from jaxherd.methods.music_metrics import chroma_correlation

source, old, new = clips[1][: 96 * 480], model.labels[1], model.labels[0]
through = model.decode(model.encode(source[None]), held=True)[0, : len(source)]
kept = chroma_correlation(source, through, sample_rate=rate)
other = chroma_correlation(source, clips[0][: len(source)], sample_rate=rate)
print(f"{old}, held out; the same through the codec, unedited: chroma kept {kept:.2f}")
print(f"a clip of {new}, which has nothing to do with it: {other:.2f}")
display(Audio(source.T, rate=rate), Audio(through.T, rate=rate))
edited = {}
for method in ("regularized", "sdedit"):
    plan = inversion(method, steps=12, target_flowstep=0.05)
    result = model.edit(source[None], new, plan, jax.random.key(0), cfg_coef=4.0, sample=False)
    edited[method] = result.wave_BTC[0]
    kept = chroma_correlation(source, edited[method], sample_rate=rate)
    print(
        f"{method}, to {new}: chroma kept {kept:.2f}, {snr(through, edited[method]):.1f} dB from the "
        f"unedited, latent std of the inverted noise {result.inverted_std:.2f}, "
        f"{result.evaluations} evaluations"
    )
    display(Audio(edited[method].T, rate=rate))
spectrograms({"source through the codec": through, **edited}, f"{old}, edited to {new}")

# %% [markdown]
# The inverted clip is still known by its beats; what the label changes is slight, as so short a
# training has taught little about labels. SDEdit's noise has the right deviation by construction and
# the clip is gone. The inverted noise falls short of a deviation of 1, where generation was trained
# to start.
#
# Chroma is the share that each of the twelve pitch classes has of the sound, frame by frame; "chroma
# kept" is its correlation with the source's. 1 is the same harmony at the same moments. What the codec
# alone keeps is about as much as an edit can, and what the clip of the other piece has comes of mere
# chance: an edit near the first figure still has the harmony, one near the second has lost the clip.
# In a second of music the figure moves by a tenth for little, so an edit may well be above the codec.
#
# One clip proves nothing. `jaxherd claims melodyflow/edits` compares the methods over many clips and
# three seeds at an equal rate of success, and says where the paper's claim did not come out.
#
# ## Go on
# - `jaxherd run melodyflow/text_to_music --on cpu`: 15 minutes, 220 minutes of music, three labels.
# - `jaxherd music edit RUN song.ogg --prompt "heavy metal" --out edited.wav`: the same from a shell.
# - `jaxherd plan melodyflow/text_to_music --on v5e:8x8 --stage flow`: the network of 1B parameters.
