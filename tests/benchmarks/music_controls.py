"""A trained music model against what it must beat: Gaussian predictors, noise, shuffled frames.

    python tests/benchmarks/music_controls.py RUN [--clips 60] [--seed 0] [--embeddings log-mel ...]

RUN is a folder that `jaxherd run melodyflow/text_to_music` leaves.  Prints one JSON object:

- loss: of the velocity network on held-out latents at five times, without a condition, beside those
  of Gaussian predictors fitted to the training clips: a covariance of whole clips as it is ("full"),
  averaged over equal lags ("stationary", which has 96 times fewer numbers to fit), the mean of both
  ("shrunk"), and independent values ("white").  "gaussian" is whichever of them is best on the
  held-out clips themselves, which favours it;
- frechet: a row for each embedding, those of a trained network among them (they need the extra
  `music-metrics`, and "tagger", which is not among the default ones, `music-tags`): distance from real held-out clips through the codec of generated clips, of other
  real clips (the floor), of decoded noise, of real latents with frames shuffled.
"""

import argparse
import json

import numpy as np


def full_covariance(clips):
    """Return (mean, covariance) of whole clips [N, F, C], flattened."""
    flat = clips.reshape(len(clips), -1).astype(np.float64)
    return flat.mean(axis=0), np.cov(flat, rowvar=False)


def stationary_covariance(clips):
    """Return (mean, covariance) in which only the lag between two frames counts."""
    _, frames, channels = clips.shape
    centre = clips.mean(axis=(0, 1), dtype=np.float64)
    x = clips.astype(np.float64) - centre
    whole = np.zeros((frames, channels, frames, channels))
    for lag in range(frames):
        count = len(x) * (frames - lag)
        at = np.einsum("nfc,nfd->cd", x[:, lag:], x[:, : frames - lag], optimize=True) / count
        for f in range(frames - lag):
            whole[f + lag, :, f, :] = at
            whole[f, :, f + lag, :] = at.T
    size = frames * channels
    return np.tile(centre, frames), whole.reshape(size, size)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    names = ("log-mel", "notes", "onsets", "contours")
    parser.add_argument("--embeddings", nargs="+", choices=(*names, "tagger"), default=names)
    a = parser.parse_args()

    from jaxherd.cli import common

    common.local_devices("cpu")
    import pathlib

    import jax
    import jax.numpy as jnp

    from jaxherd.data.audio.latent_tracks import LatentFolder
    from jaxherd.methods.flow_sampling import SamplingPlan
    from jaxherd.methods.music_embeddings import embed_all, embedding
    from jaxherd.methods.music_files import load_music
    from jaxherd.methods.music_metrics import frechet_of

    embeddings = {name: embedding(name) for name in a.embeddings}
    model = load_music(a.run)
    latents = LatentFolder.open(pathlib.Path(a.run) / "latents")
    frames = round(model.clip_seconds * model.frame_rate)
    chance = np.random.default_rng(a.seed)

    def clips(split: str, count: int) -> np.ndarray:
        """Clips with their posterior noise, labels in turn."""
        tracks, found = latents.load(split), []
        for number in range(count):
            own = [t for t in tracks if t.label == number % len(latents.labels)]
            track = own[int(chance.integers(len(own)))]
            start = int(chance.integers(len(track) - frames + 1))
            mean, std = track.read(start, frames)
            found.append(latents.standardise(mean + std * chance.standard_normal(mean.shape)))
        return np.stack(found).astype(np.float32)

    times = (0.1, 0.3, 0.5, 0.7, 0.9)
    held, train = clips("heldout", 256), clips("train", 4096)
    noise = chance.standard_normal(held.shape).astype(np.float32)
    predictors = {"full": full_covariance(train), "stationary": stationary_covariance(train)}
    predictors["shrunk"] = tuple((a + b) / 2 for a, b in zip(*predictors.values()))
    spectra = {
        name: (centre, *np.linalg.eigh(covariance))
        for name, (centre, covariance) in predictors.items()
    }
    loss = {}
    network = jax.jit(lambda z, t: model.velocity(z, t, None))
    for t in times:
        z = t * held + (1 - t) * noise
        v = np.concatenate([
            np.asarray(network(jnp.asarray(part), jnp.full(len(part), t)))
            for part in np.split(z, 8)
        ])  # fmt: skip
        target = held - noise
        row = {"network": float(np.square(v - target).mean())}
        for name, (centre, values, vectors) in spectra.items():
            # The optimal linear predictor of x1 - x0 from z_t under that covariance.
            values = np.maximum(values, 1e-6)
            gain = (t * values - (1 - t)) / (t**2 * values + (1 - t) ** 2)
            turned = (z.reshape(len(z), -1) - t * centre) @ vectors
            linear = ((turned * gain) @ vectors.T + centre).reshape(z.shape)
            row[name] = float(np.square(linear - target).mean())
        white = (t - (1 - t)) / (t**2 + (1 - t) ** 2) * z
        row["white"] = float(np.square(white - target).mean())
        loss[str(t)] = row
    mean = {kind: float(np.mean([row[kind] for row in loss.values()])) for kind in loss["0.1"]}
    best = min((kind for kind in mean if kind != "network"), key=lambda kind: mean[kind])
    mean["gaussian"] = mean[best]
    labels = [model.labels[i % len(model.labels)] for i in range(a.clips)]
    made = model.generate(
        labels, model.clip_seconds, SamplingPlan(32, "midpoint", cfg_coef=1.0),
        jax.random.key(a.seed),
    ).latents_BFL  # fmt: skip
    real, other = clips("heldout", a.clips), clips("heldout", a.clips)
    shuffled = np.stack([clip[chance.permutation(frames)] for clip in other])
    kinds = {
        "generated": made,
        "real": other,
        "noise": chance.standard_normal(real.shape).astype(np.float32),
        "shuffled": shuffled,
    }

    waves = {name: model.decode(rows) for name, rows in (kinds | {"reference": real}).items()}
    frechet = {}
    for name, embed in embeddings.items():
        rows = {kind: embed_all(clips, model.sample_rate, embed) for kind, clips in waves.items()}
        reference = rows.pop("reference")
        frechet[name] = {kind: frechet_of(found, reference) for kind, found in rows.items()}
    report = {
        "frames": frames, "loss": loss, "mean_loss": mean, "best_gaussian": best, "frechet": frechet
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
