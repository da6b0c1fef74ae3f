"""Figures in the house style; needs the extra `report`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxherd.core.errors import missing_extra

Values = Sequence[int | float] | np.ndarray

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5a9e", "#e0912f", "#4d4d4d")


def new_figure(width: float = 7.0, height: float = 3.6) -> tuple[Any, Any]:
    """Return (figure, axes) without a window system.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "report", "drawing plots") from error
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the running mean over up to `window` last values."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def curves(
    path: Path,
    series: Mapping[str, tuple[Values, Values]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_y: bool = False,
    window: int = 1,
    marked: Sequence[str] = (),
) -> None:
    """Draw named (x, y) curves; with `window` the running mean over a pale raw curve.

    Args:
      marked: names drawn as points joined by a line.
    """
    figure, axes = new_figure()
    for number, (name, (x, y)) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        values = np.asarray(y, float)
        if name in marked:
            axes.plot(x, values, "o-", color=colour, label=name, markersize=4)
            continue
        if window > 1 and len(values) > window:
            axes.plot(x, values, color=colour, alpha=0.2, linewidth=0.7)
            values = smooth(values, window)
        axes.plot(x, values, color=colour, label=name, linewidth=1.6)
    if log_y:
        axes.set_yscale("log")
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if len(series) > 1:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def heat_map(
    path: Path,
    values: np.ndarray,
    *,
    x_label: str,
    y_label: str,
    title: str,
    value_label: str,
    x_ticks: Sequence[str] | None = None,
    y_ticks: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a matrix [y, x] as colours with a bar."""
    figure, axes = new_figure(7.0, max(2.4, 0.35 * values.shape[0] + 1.4))
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label=value_label)
    axes.grid(False)
    if x_ticks is not None:
        axes.set_xticks(range(len(x_ticks)), x_ticks)
    if y_ticks is not None:
        axes.set_yticks(range(len(y_ticks)), y_ticks)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def seed_curves(
    path: Path,
    panels: Sequence[Mapping[str, Any]],
) -> None:
    """Draw panels side by side; in each a thin line a seed and a thick one for the mean.

    Args:
      path: of the file; the suffix decides its format.
      panels: each has "x", "series" (name to one list of y a seed), "x_label", "y_label",
        "title", and may have "log_x", "limits" of y and "lines" (name to height).
    """
    figure, axes = new_figure(5.2 * len(panels), 3.8)
    figure.clear()
    named: dict[str, Any] = {}
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        x = panel["x"]
        for index, (name, seeds) in enumerate(panel["series"].items()):
            colour = COLOURS[index % len(COLOURS)]
            for values in seeds:
                axes.plot(x, values, color=colour, alpha=0.35, linewidth=0.8)
            mean = np.mean(np.asarray(seeds, float), axis=0)
            axes.plot(x, mean, "o-", color=colour, label=name, linewidth=1.8, markersize=4)
        for name, height in panel.get("lines", {}).items():
            axes.axhline(height, color="#777777", linewidth=0.9, linestyle="--", zorder=0)
            axes.annotate(
                name, (0.01, height), xycoords=("axes fraction", "data"), fontsize=7,
                color="#555555", va="bottom",
            )  # fmt: skip
        if panel.get("log_x"):
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [str(value) for value in x])
        if "limits" in panel:
            axes.set_ylim(*panel["limits"])
        axes.set_xlabel(panel["x_label"])
        axes.set_ylabel(panel["y_label"])
        axes.set_title(panel["title"], fontsize=10)
        named |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    # One legend below all panels: inside, it would cover lines.
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def music_figure(
    path: Path,
    waves: Mapping[str, np.ndarray],
    latents: np.ndarray,
    sample_rate: int,
    frame_rate: float,
) -> None:
    """Draw a spectrogram of each wave and the latents below, over the same seconds.

    Args:
      path: of the file.
      waves: name to samples [T, C].
      latents: [F, L], standardised.
      sample_rate: Hz; frame_rate: latent frames a second.
    """
    rows = len(waves) + 1
    figure, axes = new_figure(8.0, 2.4 * rows)
    figure.clear()
    panels = figure.subplots(rows, 1, sharex=True)
    for axes, (name, wave) in zip(panels, waves.items()):
        mono = np.asarray(wave, float).mean(axis=1) + 1e-9 * np.random.default_rng(0).normal(
            size=len(wave)
        )
        window = 1 << min(10, max(4, (len(mono) // 4).bit_length() - 1))
        *_, image = axes.specgram(
            mono,
            NFFT=window,
            noverlap=window * 3 // 4,
            Fs=sample_rate,
            cmap="magma",
            vmin=-130,
            vmax=-30,
        )
        axes.set(ylabel="Hz", title=f"{name}: power in dB")
        axes.set_ylim(0, min(16000, sample_rate / 2))
        figure.colorbar(image, ax=axes)
    seconds = len(latents) / frame_rate
    image = panels[-1].imshow(
        latents.T,
        aspect="auto",
        origin="lower",
        cmap="RdBu",
        vmin=-3,
        vmax=3,
        extent=(0, seconds, 0, latents.shape[1]),
    )
    panels[-1].set(xlabel="seconds", ylabel="latent channel", title="standardised latents")
    figure.colorbar(image, ax=panels[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
