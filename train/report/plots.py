"""Figures of the report, drawn with matplotlib's object interface on the Agg canvas.

`pyplot` is never imported and no global style is changed: a caller's figures, backend and rcParams
stay as they are. Every function writes one PNG.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from lejepa_fast.train.evaluation.collapse import covariance_eigenvalues

Rows = Sequence[Mapping[str, Any]]

TRAINED, UNTRAINED, TARGET = "#0b6bcb", "#d9822b", "#3b4252"
_INK, _MUTED, _GRID = "#1f2933", "#616e7c", "#e4e7eb"
_STYLE = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}
_DPI = 130
_DIRECTIONS = 256  # that embeddings are projected on


@contextmanager
def report_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of width x height inches in the report's style, saved to `path` at the end."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, format="png")


def series(rows: Rows, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `key` in the metric rows of `kind`, in the order of the steps."""
    points = {
        int(row["step"]): float(row[key])  # a step run twice (after a resume) counts once, the later row
        for row in rows
        if row.get("kind") == kind and isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
    }
    steps = sorted(points)
    return np.array(steps, dtype=float), np.array([points[step] for step in steps])


def plot_losses(path: Path, rows: Rows, *, sigreg_floor: float) -> None:
    """Total, prediction and SIGReg loss and the embeddings' deviation over steps.

    `sigreg_floor` is the expectation of SIGReg for exact Gaussian embeddings, drawn as a reference.
    """
    panels = [
        ("loss", "total loss", None, ""),
        ("prediction", "prediction loss", None, ""),
        ("sigreg", "SIGReg", sigreg_floor, f"N(0, I): {sigreg_floor:.2f}"),
        ("embedding_std", "embedding std", 1.0, "target: 1"),
    ]
    with report_figure(path, 10.0, 5.6) as figure:
        for ax, (key, title, level, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            steps, values = series(rows, "train", key)
            ax.set_title(title)
            if not len(steps):
                _say(ax, "not logged")
                continue
            _curve(ax, steps, values)
            if level is not None:
                ax.axhline(level, color=TARGET, linestyle="--", linewidth=1.3)
                ax.annotate(
                    label,
                    (0.995, level),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="right",
                    va="bottom",
                    color=TARGET,
                    fontsize=9,
                )
            if values.min() > 0 and values.max() > 8 * values.min():
                _log_axis(ax)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.set_xlabel("step")


def _curve(ax: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """The raw values; where there are many, pale under their running median."""
    if len(steps) < 60:
        ax.plot(steps, values, color=TRAINED, marker="o" if len(steps) < 25 else None, markersize=3.5)
        return
    ax.plot(steps, values, color=TRAINED, alpha=0.25, linewidth=0.9)
    window = max(5, len(values) // 40) | 1
    padded = np.pad(values, window // 2, mode="edge")
    ax.plot(steps, np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1), color=TRAINED)


def plot_knn(
    path: Path,
    rows: Rows,
    *,
    steps: int,
    trained: float,
    untrained: float,
    majority: float,
) -> None:
    """kNN accuracy over steps between the untrained encoder's level and the final value, all in percent."""
    at, values = series(rows, "eval", "knn")
    between = (at > 0) & (at < steps)  # the ends come from the closing evaluation of both encoders
    at = np.concatenate([[0], at[between], [steps]])
    values = np.concatenate([[untrained], values[between], [trained]])
    with report_figure(path, 8.4, 4.2) as figure:
        ax = figure.subplots()
        ax.plot(at, values, color=TRAINED, marker="o", markersize=5, label="trained", zorder=3)
        ax.axhline(untrained, color=UNTRAINED, linestyle="--", label=f"untrained encoder: {untrained:.1f} %")
        ax.axhline(majority, color=TARGET, linestyle=":", label=f"always the largest class: {majority:.1f} %")
        ax.annotate(
            f"{trained:.1f} %",
            (steps, trained),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color=TRAINED,
            fontweight="bold",
        )
        low, high = min(*values, majority), max(*values, majority)
        ax.set_ylim(max(0, low - 0.12 * (high - low) - 1), min(104, high + 0.2 * (high - low) + 1))
        ax.set(
            title="kNN accuracy on the validation images", xlabel="step", ylabel="top-1 accuracy in percent"
        )
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.legend(loc="best")


def plot_views(
    path: Path,
    views: Sequence[Tensor],
    *,
    num_global: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """A grid of augmented views at their true relative sizes: a row per image, six at most,
    and a column per view.

    Args:
        path: the PNG to write.
        views: tensors (B, 3, S, S), normalised by `mean` and `std`; the first `num_global` are global views.
        num_global: how many of them are global.
        mean, std: three numbers each, the normalisation that is undone here.
    """
    rows = min(6, len(views[0]))
    tiles = [[_pixels(view[row], mean, std) for view in views] for row in range(rows)]
    sizes = [view.shape[-1] for view in views]
    largest, gap = max(sizes), max(2, max(sizes) // 24)
    left = np.concatenate([[0], np.cumsum([size + gap for size in sizes])])
    canvas = np.ones((rows * (largest + gap) - gap, left[-1] - gap, 3))
    for row, images in enumerate(tiles):
        for column, image in enumerate(images):
            top = row * (largest + gap) + (largest - len(image)) // 2
            canvas[top : top + len(image), left[column] : left[column] + image.shape[1]] = image
    scale = min(10.0 / canvas.shape[1], 8.5 / canvas.shape[0])  # inches per pixel
    with report_figure(path, scale * canvas.shape[1], scale * canvas.shape[0] + 0.3) as figure:
        ax = figure.subplots()
        ax.imshow(canvas)
        ax.set_axis_off()
        for column, size in enumerate(sizes):
            name = f"global {column + 1}" if column < num_global else f"local {column + 1 - num_global}"
            ax.text(left[column] + size / 2, -gap, name, ha="center", va="bottom", color=_MUTED, fontsize=9.5)


def _pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image (3, S, S) as an array (S, S, 3) in 0 .. 1."""
    image = image.detach().float().cpu()
    image = image * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def plot_projections(path: Path, trained: Tensor, untrained: Tensor) -> None:
    """Histograms of embeddings (n, K) projected on random unit directions, against the N(0, 1) density."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(trained.shape[1], _DIRECTIONS, generator=generator, dtype=torch.float64)
    A = A / A.norm(dim=0)
    with report_figure(path, 10.0, 4.2) as figure:
        panels = figure.subplots(1, 2)
        for ax, z, name, color in zip(
            panels, (untrained, trained), ("untrained", "trained"), (UNTRAINED, TRAINED), strict=True
        ):
            p = (z.double() @ A).numpy()
            width = float(p.std(axis=0).mean())
            reach = max(4.0, float(np.quantile(np.abs(p), 0.995)))
            # Bins fine enough for a narrow peak, within reason: a collapsed model is narrower than any bin.
            bins = np.linspace(-reach, reach, 2 * int(np.clip(4 * reach / max(width, 1e-9), 40, 300)) + 1)
            ax.hist(
                p.ravel(),
                bins=bins,
                density=True,
                color=color,
                alpha=0.3,
                label=f"all {_DIRECTIONS} directions",
            )
            # Pooled over directions, a collapsed model with an offset would look Gaussian; its single
            # directions are needles.
            for column in range(8):
                label = "single directions" if column == 0 else None
                curve = _smooth_density(p[:, column], narrowest=reach / 500)
                ax.plot(*curve, color=color, alpha=0.7, linewidth=0.9, label=label)
            grid = np.linspace(-reach, reach, 401)
            density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
            ax.plot(grid, density, color=TARGET, linestyle="--", linewidth=1.6, label="N(0, 1), the target")
            ax.set_xlim(-reach, reach)
            ax.set(
                title=f"{name}: std {width:.3g}, offset {np.abs(p.mean(axis=0)).mean():.2g}",
                xlabel="projection of an embedding",
                ylabel="density",
            )
            ax.legend(loc="upper left", fontsize=8.5, handlelength=1.4)


def _smooth_density(values: np.ndarray, *, narrowest: float) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian kernel density of values (n,) by Silverman's rule: points and densities, (201,) each.

    Values that spread less than `narrowest` are drawn as a needle of about that width.
    """
    centre, width = values.mean(), max(values.std(), narrowest)
    bandwidth = 1.06 * width * len(values) ** -0.2
    grid = np.linspace(centre - 4 * width, centre + 4 * width, 201)
    # From a fine histogram: the cost does not grow with n.
    counts, edges = np.histogram(values, bins=400, range=(grid[0], grid[-1]))
    middles = (edges[1:] + edges[:-1]) / 2
    kernel = np.exp(-(((grid[:, None] - middles) / bandwidth) ** 2) / 2)
    return grid, kernel @ counts / (len(values) * bandwidth * math.sqrt(2 * math.pi))


def plot_spectrum(path: Path, trained: Tensor, untrained: Tensor) -> None:
    """Eigenvalues of the embeddings' covariance, largest first, beside an N(0, I) sample of equal size."""
    generator = torch.Generator().manual_seed(0)
    ideal = torch.randn(trained.shape, generator=generator, dtype=torch.float64)
    curves = [
        (ideal, "N(0, I) sample of the same size", TARGET, "--", 1.6),
        (untrained, "untrained", UNTRAINED, "-", 2.0),
        (trained, "trained", TRAINED, "-", 2.0),
    ]
    shown = min(trained.shape[1], trained.shape[0] - 1)
    with report_figure(path, 8.4, 4.4) as figure:
        ax = figure.subplots()
        lowest, largest = math.inf, 0.0
        for z, label, color, line, width in curves:
            # A log axis has no 0; a value far below the visible range leaves it at the bottom.
            values = covariance_eigenvalues(z)[:shown].clamp_min(1e-30).numpy()
            lowest, largest = min(lowest, float(values[-1])), max(largest, float(values[0]))
            ranks = np.arange(1, shown + 1)
            ax.plot(ranks, values, color=color, linestyle=line, linewidth=width, label=label)
        ax.set_yscale("log")
        ax.set_ylim(max(lowest / 2, largest * 1e-9), largest * 2)
        ax.set(
            title="Eigenvalues of the embeddings' covariance",
            xlabel="rank of the eigenvalue",
            ylabel="variance",
        )
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], loc="best")


def _log_axis(ax: Axes) -> None:
    """Log scale labelled in plain numbers: 0.2, 0.5, 1, 2 ..."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=_MUTED)
    ax.set(xticks=[], yticks=[])
