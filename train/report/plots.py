"""Figures of the report. Every function writes one PNG.

They use matplotlib's object interface: `pyplot` is never imported, and the caller's figures, backend and
rcParams stay as they are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from lejepa_fast.train.evaluation.collapse import covariance_eigenvalues

Rows = Sequence[Mapping[str, Any]]
_Panel = tuple[str, str, float | None, str]

TRAINED, UNTRAINED, TARGET = "#0b6bcb", "#d9822b", "#3b4252"
MUTED = "#616e7c"
_STYLE = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": "#1f2933",
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}
_DIRECTIONS = 256  # that embeddings are projected on


@contextmanager
def report_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of width x height inches in the report's style, saved to `path` at the end."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
        yield figure
        FigureCanvasAgg(figure).print_png(path)  # savefig would draw twice


def series(rows: Rows, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, ascending, and finite values of `key` in rows of `kind`; of two rows of a step, the later."""
    points = {
        int(row["step"]): float(row[key])
        for row in rows
        if row.get("kind") == kind and isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
    }
    steps = sorted(points)
    return np.array(steps, dtype=float), np.array([points[step] for step in steps])


def plot_losses(path: Path, rows: Rows, *, sigreg_floor: float, batch: int) -> None:
    """Losses and embedding std over steps of `batch` images; `sigreg_floor` is the expectation of SIGReg
    under N(0, I)."""
    panels: list[_Panel] = [
        ("loss", "total loss", None, ""),
        ("prediction", "prediction loss", None, ""),
        ("sigreg", f"SIGReg of {batch} images", sigreg_floor, f"N(0, I): {sigreg_floor:.2f}"),
        ("embedding_std", "embedding std", 1.0, "target: 1"),
    ]
    _plot_panels(path, rows, panels)


def plot_targets(path: Path, rows: Rows) -> None:
    """Of a masked objective: prediction loss, and how the targets spread, over steps."""
    panels: list[_Panel] = [
        ("prediction", "prediction loss", None, ""),
        ("embedding_std", "std between images", None, ""),
        ("between_rank", "effective rank between images", None, ""),
        ("target_std", "std of the targets", None, ""),
        ("within_std", "std within images", None, ""),
        ("within_rank", "effective rank within images", None, ""),
    ]
    _plot_panels(path, rows, panels)


def _plot_panels(path: Path, rows: Rows, panels: Sequence[_Panel]) -> None:
    """Two lines of panels of rows of kind "train": key, title, and a level with its label or None."""
    columns = len(panels) // 2
    with report_figure(path, 5.0 * columns, 5.6) as figure:
        for ax, (key, title, level, label) in zip(figure.subplots(2, columns).flat, panels, strict=True):
            steps, values = series(rows, "train", key)
            ax.set_title(title)
            if not len(steps):
                ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color=MUTED)
                ax.set(xticks=[], yticks=[])
                continue
            _plot_curve(ax, steps, values)
            if level is not None:
                ax.axhline(level, color=TARGET, linestyle="--", linewidth=1.3)
                _note(ax, label, (0.995, level), ("axes fraction", "data"), color=TARGET, fontsize=9)
            log_if_wide(ax, "y", values)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.set_xlabel("step")


def log_if_wide(ax: Axes, which: Literal["x", "y"], values: Any) -> None:
    """A logarithmic axis for positive values over a wide range, labeled 0.2, 0.5, 1, 2 ..."""
    if min(values) > 0 and max(values) > 8 * min(values):
        ax.set(**{f"{which}scale": "log"})
        axis = ax.xaxis if which == "x" else ax.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _plot_curve(ax: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """The raw values; from 60 on, pale under their running median."""
    if len(steps) < 60:
        ax.plot(steps, values, color=TRAINED, marker="o" if len(steps) < 25 else None, markersize=3.5)
        return
    ax.plot(steps, values, color=TRAINED, alpha=0.25, linewidth=0.9)
    ax.plot(steps, _running_median(values), color=TRAINED)


def _running_median(values: np.ndarray) -> np.ndarray:
    window = max(5, len(values) // 40) | 1
    padded = np.pad(values, window // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def _note(ax: Axes, text: str, point: tuple[float, float], coordinates: Any, **style: Any) -> None:
    """Text that ends just above `point`."""
    ax.annotate(
        text, point, xycoords=coordinates, xytext=(0, 4), textcoords="offset points", ha="right", **style
    )


def plot_knn(
    path: Path, rows: Rows, *, steps: int, trained: float, untrained: float, majority: float
) -> None:
    """kNN accuracy in percent over steps, from the untrained encoder to the trained one at `steps`."""
    at, values = series(rows, "eval", "knn")
    between = (at > 0) & (at < steps)  # both ends are known from the final evaluation
    at = np.concatenate([[0], at[between], [steps]])
    values = np.concatenate([[untrained], values[between], [trained]])
    with report_figure(path, 8.4, 4.2) as figure:
        ax = figure.subplots()
        ax.plot(at, values, color=TRAINED, marker="o", markersize=5, label="trained", zorder=3)
        ax.axhline(untrained, color=UNTRAINED, linestyle="--", label=f"untrained encoder: {untrained:.1f} %")
        ax.axhline(majority, color=TARGET, linestyle=":", label=f"always the largest class: {majority:.1f} %")
        _note(ax, f"{trained:.1f} %", (steps, trained + 0.5), "data", color=TRAINED, fontweight="bold")
        low, high = min(*values, majority), max(*values, majority)
        ax.set_ylim(max(0, low - 0.12 * (high - low) - 1), min(104, high + 0.2 * (high - low) + 1))
        ax.set(title="kNN accuracy on the validation images", xlabel="step", ylabel="top-1 accuracy (%)")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.legend(loc="best")


def plot_runs(path: Path, runs: Mapping[str, Rows]) -> None:
    """kNN, total loss, prediction loss and SIGReg of several runs over steps, a color for each.

    An "eval" row of step 0 has kNN of the untrained encoder, which is drawn as a dotted line as well.
    """
    panels = (
        ("eval", "knn", "kNN accuracy (%)"),
        ("train", "loss", "total loss"),
        ("train", "prediction", "prediction loss"),
        ("train", "sigreg", "SIGReg of a batch"),
    )
    lines = {
        name: Line2D([], [], color=f"C{i % 10}", linestyle=("-", "--", "-.")[i // 10 % 3], label=name)
        for i, name in enumerate(runs)
    }
    with report_figure(path, 10.0, 6.0 + 0.25 * math.ceil(len(runs) / 3)) as figure:
        for ax, (kind, key, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            drawn = []
            for name, rows in runs.items():
                steps, values = series(rows, kind, key)
                if not len(steps):
                    continue
                drawn.append(values)
                style = {"color": lines[name].get_color(), "linestyle": lines[name].get_linestyle()}
                smooth = values if kind == "eval" or len(values) < 60 else _running_median(values)
                ax.plot(steps, smooth, marker="o" if len(steps) < 25 else None, markersize=3.5, **style)
                if kind == "eval" and steps[0] == 0:
                    ax.axhline(values[0], color=style["color"], linestyle=":", linewidth=1.2)
            ax.set(title=title, xlabel="step")
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if not drawn:
                ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=MUTED)
                ax.set(xticks=[], yticks=[])
            elif kind == "train":
                log_if_wide(ax, "y", np.concatenate(drawn))
        figure.legend(handles=[*lines.values()], loc="outside lower center", ncols=3, fontsize=9)


def plot_views(
    path: Path, views: Sequence[Tensor], *, num_global: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    """A grid of augmented views at their relative sizes: a row per image, at most 6, a column per view.

    The `views` (B, C, S, S), the global ones first, are normalized by `mean` and `std`, which is undone here.
    Unless there are three channels, the first one is shown in gray.
    """
    rows = min(6, len(views[0]))
    sizes = [view.shape[-1] for view in views]
    largest, gap = max(sizes), max(2, max(sizes) // 24)
    left = np.concatenate([[0], np.cumsum([size + gap for size in sizes])])
    canvas = np.ones((rows * (largest + gap) - gap, left[-1] - gap, 3))
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    for column, (view, size) in enumerate(zip(views, sizes, strict=True)):
        pixels = (view[:rows].detach().float().cpu() * scale + shift).clamp(0, 1).permute(0, 2, 3, 1)
        if pixels.shape[-1] != 3:
            pixels = pixels[..., :1]
        for row, image in enumerate(pixels.numpy()):
            top = row * (largest + gap) + (largest - size) // 2
            canvas[top : top + size, left[column] : left[column] + size] = image
    inches = min(10.0 / canvas.shape[1], 8.5 / canvas.shape[0])  # per pixel
    with report_figure(path, inches * canvas.shape[1], inches * canvas.shape[0] + 0.3) as figure:
        ax = figure.subplots()
        ax.imshow(canvas)
        ax.set_axis_off()
        for column, size in enumerate(sizes):
            name = f"global {column + 1}" if column < num_global else f"local {column + 1 - num_global}"
            ax.text(left[column] + size / 2, -gap, name, ha="center", va="bottom", color=MUTED, fontsize=9.5)


def plot_projections(path: Path, trained: Tensor, untrained: Tensor) -> None:
    """Histograms of embeddings (n, K) projected on random unit directions, against the N(0, 1) density."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(trained.shape[1], _DIRECTIONS, generator=generator, dtype=torch.float64)
    A = A / A.norm(dim=0)
    sides = [("untrained", untrained, UNTRAINED), ("trained", trained, TRAINED)]
    with report_figure(path, 10.0, 4.2) as figure:
        for ax, (name, z, color) in zip(figure.subplots(1, 2), sides, strict=True):
            p = (z.double() @ A).numpy()
            width = float(p.std(axis=0).mean())
            reach = max(4.0, float(np.quantile(np.abs(p), 0.995)))
            # Bins fine enough for a narrow peak, within limits: a collapsed model is narrower than any bin.
            bins = np.linspace(-reach, reach, 2 * int(np.clip(4 * reach / max(width, 1e-9), 40, 300)) + 1)
            label = f"all {_DIRECTIONS} directions"
            ax.hist(p.ravel(), bins=bins, density=True, color=color, alpha=0.3, label=label)
            # Pooled over directions, a collapsed model with an offset looks Gaussian; one direction does not.
            for column in range(8):
                curve = _smooth_density(p[:, column], narrowest=reach / 500)
                label = "_" if column else "single directions"
                ax.plot(*curve, color=color, alpha=0.7, linewidth=0.9, label=label)
            grid = np.linspace(-reach, reach, 401)
            density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
            ax.plot(grid, density, color=TARGET, linestyle="--", linewidth=1.6, label="N(0, 1), the target")
            title = f"{name}: std {width:.3g}, offset {np.abs(p.mean(axis=0)).mean():.2g}"
            ax.set(title=title, xlabel="projection of an embedding", ylabel="density", xlim=(-reach, reach))
            ax.legend(loc="upper left", fontsize=8.5, handlelength=1.4)


def _smooth_density(values: np.ndarray, *, narrowest: float) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian kernel density of values (n,) by Silverman's rule: points and densities, (201,) each.

    A spread below `narrowest` is drawn as a needle of about that width.
    """
    center, width = values.mean(), max(values.std(), narrowest)
    bandwidth = 1.06 * width * len(values) ** -0.2
    grid = np.linspace(center - 4 * width, center + 4 * width, 201)
    kernels = np.exp(-(((grid[:, None] - values) / bandwidth) ** 2) / 2)
    return grid, kernels.mean(axis=1) / (bandwidth * math.sqrt(2 * math.pi))


def plot_spectrum(path: Path, trained: Tensor, untrained: Tensor) -> None:
    """Eigenvalues of the covariance of embeddings (n, K), and those of an N(0, I) sample of the same size."""
    generator = torch.Generator().manual_seed(0)
    ideal = torch.randn(trained.shape, generator=generator, dtype=torch.float64)
    shown = min(trained.shape[1], trained.shape[0] - 1)
    with report_figure(path, 8.4, 4.4) as figure:
        ax = figure.subplots()
        lowest, largest = math.inf, 0.0
        for z, label, color, line in (
            (trained, "trained", TRAINED, "-"),
            (untrained, "untrained", UNTRAINED, "-"),
            (ideal, "N(0, I) sample of the same size", TARGET, "--"),
        ):
            # A log axis has no 0.
            values = covariance_eigenvalues(z)[:shown].clamp_min(1e-30).numpy()
            lowest, largest = min(lowest, float(values[-1])), max(largest, float(values[0]))
            ax.plot(np.arange(1, shown + 1), values, color=color, linestyle=line, label=label)
        ax.set_yscale("log")
        ax.set_ylim(max(lowest / 2, largest * 1e-9), largest * 2)
        ax.set_title("Eigenvalues of the embeddings' covariance")
        ax.set(xlabel="rank of the eigenvalue", ylabel="variance")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.legend(loc="best")
