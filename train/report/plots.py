"""Figures of the report. Every function writes one PNG.

They use matplotlib's object interface: `pyplot` is never imported, and the caller's figures, backend and
rcParams stay as they are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from lejepa_fast.train.report.runs import Rows, series

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


class Panel(NamedTuple):
    """What `plot_curves` draws of rows of metrics.jsonl."""

    title: str
    key: str
    kind: str = "train"
    levels: tuple[tuple[float, str], ...] = ()
    """Horizontal lines, the first dashed, the second dotted: value and label."""


TARGETS = (  # of a masked objective: prediction loss, and how the targets spread
    Panel("prediction loss", "prediction"),
    Panel("std between images", "embedding_std"),
    Panel("effective rank between images", "between_rank"),
    Panel("std of the targets", "target_std"),
    Panel("std within images", "within_std"),
    Panel("effective rank within images", "within_rank"),
)
RUNS = (
    Panel("kNN accuracy (%)", "knn", kind="eval"),
    Panel("total loss", "loss"),
    Panel("prediction loss", "prediction"),
    Panel("SIGReg of a batch", "sigreg"),
)


@contextmanager
def report_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of width x height inches in the report's style, saved to `path` at the end."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
        yield figure
        FigureCanvasAgg(figure).print_png(path)  # savefig would draw twice


def loss_panels(*, sigreg_floor: float, batch: int) -> tuple[Panel, ...]:
    """Losses and embedding std over steps of `batch` images; `sigreg_floor` is the expectation of SIGReg
    under N(0, I)."""
    return (
        Panel("total loss", "loss"),
        Panel("prediction loss", "prediction"),
        Panel(
            f"SIGReg of {batch} images", "sigreg", levels=((sigreg_floor, f"N(0, I): {sigreg_floor:.2f}"),)
        ),
        Panel("embedding std", "embedding_std", levels=((1.0, "target: 1"),)),
    )


def plot_curves(path: Path, runs: Mapping[str, Rows], panels: Sequence[Panel]) -> None:
    """Figures of metrics.jsonl over steps, in one panel or two lines of them; of one run or several by name.

    From 60 values on, their running median, and of one run the values, too. Several runs have colors and a
    legend, and the untrained encoder, in an "eval" row of step 0, a dotted line.
    """
    single, columns = len(runs) == 1, (len(panels) + 1) // 2
    legend = 0.0 if single else 0.4 + 0.25 * math.ceil(len(runs) / 3)
    colors = [TRAINED] if single else [f"C{i}" for i in range(10)]
    lines = {
        name: Line2D([], [], color=colors[i % 10], linestyle=("-", "--", "-.")[i // 10 % 3], label=name)
        for i, name in enumerate(runs)
    }
    size = (8.4, 4.2) if len(panels) == 1 else (5.0 * columns, 5.6 + legend)
    with report_figure(path, *size) as figure:
        axes = figure.subplots(min(2, len(panels)), columns, squeeze=False)
        for ax, panel in zip(axes.flat, panels, strict=True):
            drawn = []
            for name, rows in runs.items():
                steps, values = series(rows, panel.kind, panel.key)
                if not len(steps):
                    continue
                drawn.append(values)
                style: dict[str, Any] = {"color": lines[name].get_color(), "ls": lines[name].get_linestyle()}
                if panel.kind == "train" and len(values) >= 60:
                    if single:
                        ax.plot(steps, values, **style, alpha=0.25, linewidth=0.9)
                    values = _running_median(values)
                marker = "o" if len(steps) < 25 else None
                ax.plot(steps, values, **style, marker=marker, markersize=3.5)
                if not single and steps[0] == 0:
                    ax.axhline(values[0], color=style["color"], linestyle=":", linewidth=1.2)
            ax.set(title=panel.title, xlabel="step")
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if not drawn:
                ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color=MUTED)
                ax.set(xlabel="", xticks=[], yticks=[])
                continue
            for (level, label), dashes in zip(panel.levels, ("--", ":"), strict=False):
                ax.axhline(level, color=TARGET, linestyle=dashes, linewidth=1.3)
                place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
                ax.annotate(label, (0.995, level), (0, 4), ha="right", color=TARGET, fontsize=9, **place)
            if panel.kind == "train":
                log_if_wide(ax, "y", np.concatenate(drawn))
        if not single:
            figure.legend(handles=[*lines.values()], loc="outside lower center", ncols=3, fontsize=9)


def log_if_wide(ax: Axes, which: Literal["x", "y"], values: Any) -> None:
    """A logarithmic axis for positive values over a wide range, labeled 0.2, 0.5, 1, 2 ..."""
    if min(values) > 0 and max(values) > 8 * min(values):
        ax.set(**{f"{which}scale": "log"})
        axis = ax.xaxis if which == "x" else ax.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _running_median(values: np.ndarray) -> np.ndarray:
    window = max(5, len(values) // 40) | 1
    padded = np.pad(values, window // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


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
