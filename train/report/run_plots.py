"""Figures over several runs. Every function writes one PNG, in the style of plots.py."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lejepa_fast.train.report.plots import TARGET, TRAINED, UNTRAINED, log_if_wide, report_figure
from lejepa_fast.train.report.runs import RunRecord
from lejepa_fast.train.report.selection import PROBES

PROBE_LABELS = {"linear": "linear probe", "knn": "kNN"}
COLORS = {"linear": TRAINED, "knn": UNTRAINED}


def plot_selection(path: Path, chosen: Mapping[str, Any]) -> None:
    """What `selection.select` found. Left: C(alpha) by probe, and RankMe's correlation as a dotted line.
    Right: accuracy against loss / lambda^alpha, colored by lambda."""
    probe = next(probe for probe in PROBES if probe in chosen["correlations"])
    with report_figure(path, 10.0, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        draw_correlations(left, chosen["correlations"])
        left.axvline(chosen["alpha"], color=TARGET, linestyle="--", linewidth=1.2)
        runs = chosen["correlations"][probe]["runs"]
        left.set_title(f"Rank correlation with accuracy, {runs} runs")
        groups = [row["group"] for row in chosen["runs"]]
        largest = max(sorted(groups), key=groups.count)  # as in `select`
        shown = [row for row in chosen["runs"] if row["group"] == largest and row["lambda"]]
        x, y = [row["score"] for row in shown], [row[probe] for row in shown]
        _colored(figure, right, x, y, [math.log10(row["lambda"]) for row in shown], "log10(lambda)")
        right.set(xlabel=f"loss / lambda^{chosen['alpha']:g}", ylabel=f"{PROBE_LABELS[probe]} (%)")
        right.set_title("Accuracy against the score")
        log_if_wide(right, "x", x)


def draw_correlations(ax: Axes, correlations: Mapping[str, Mapping[str, Any]]) -> None:
    """C(alpha) of each probe, and the correlation of RankMe as a dotted line; see `selection.correlate`."""
    for name, found in correlations.items():
        color, label = COLORS[name], PROBE_LABELS[name]
        ax.plot(found["alphas"], found["c"], color=color, marker="o", markersize=4, label=label)
        if found["rankme"] is not None and math.isfinite(found["rankme"]):
            ax.axhline(found["rankme"], color=color, linestyle=":", label=f"RankMe, {label}")
    ax.set(xlabel="alpha", ylabel="C(alpha)", ylim=(min(-0.05, ax.get_ylim()[0]), 1.05))
    ax.legend(loc="best", fontsize=8.5)


def plot_loss_plane(path: Path, runs: Sequence[RunRecord]) -> None:
    """Runs in the plane of the two losses at the end of the training, colored by accuracy."""
    with report_figure(path, 6.4, 4.6) as figure:
        draw_loss_plane(figure, figure.subplots(), runs)


def draw_loss_plane(figure: Figure, ax: Axes, runs: Sequence[RunRecord]) -> None:
    """Draw `plot_loss_plane` into one panel of a figure."""
    probe = next((p for p in PROBES if any(math.isfinite(r.figure(f"{p}_trained")) for r in runs)), "linear")
    accuracy = [run.figure(f"{probe}_trained") for run in runs]
    x, y = [run.sigreg for run in runs], [run.prediction for run in runs]
    _colored(figure, ax, x, y, accuracy, f"{PROBE_LABELS[probe]} (%)")
    ax.set(title="Accuracy over the losses", xlabel="SIGReg", ylabel="prediction loss")
    log_if_wide(ax, "x", x)
    log_if_wide(ax, "y", y)


def _colored(
    figure: Figure, ax: Axes, x: Sequence[float], y: Sequence[float], color: Sequence[float], label: str
) -> None:
    """Points colored by a value; in one color if it is known of none."""
    if not np.isfinite(color).any():
        ax.scatter(x, y, color=TRAINED, s=44)
        return
    points = ax.scatter(x, y, c=color, cmap="viridis", s=44, edgecolors="white", linewidths=0.6, zorder=3)
    figure.colorbar(points, ax=ax, label=label)


def plot_grid(path: Path, values: Sequence[Mapping[str, Any]], runs: Sequence[RunRecord]) -> None:
    """kNN, linear probe and loss over a grid, a panel for each option: dots for runs, a line of their means.

    Args:
        path: the PNG.
        values: the value of each option in each run, by the option's name.
        runs: the runs, in the same order.
    """
    levels = {name: _ordered([each[name] for each in values]) for name in values[0]}
    varied = [name for name in levels if name != "seed" and len(levels[name]) > 1] or list(levels)[:1]
    figures = {
        "kNN accuracy (%)": np.array([run.figure("knn_trained") for run in runs]),
        "linear accuracy (%)": np.array([run.figure("linear_trained") for run in runs]),
        "training loss": np.array([run.loss for run in runs]),
    }
    figures = {title: found for title, found in figures.items() if np.isfinite(found).any()}

    def mean(found: np.ndarray, key: str, level: Any) -> float:
        """Over the runs with this value that have the figure."""
        here = found[[each[key] == level for each in values]]
        return float(np.nanmean(here)) if np.isfinite(here).any() else math.nan

    with report_figure(path, 4.2 * len(figures), 3.6 * len(varied)) as figure:
        panels = figure.subplots(len(varied), len(figures), squeeze=False)
        for column, (title, found) in enumerate(figures.items()):
            for ax, key in zip(panels[:, column], varied, strict=True):
                places = [levels[key].index(each[key]) for each in values]
                ax.plot(places, found, ".", color=TRAINED, alpha=0.5, markersize=9, label="runs")
                ax.plot([mean(found, key, level) for level in levels[key]], color=TRAINED, label="mean")
                ax.set_xticks(range(len(levels[key])), map(str, levels[key]))
                ax.set(xlabel=key, title=title)


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Distinct values: numbers ascending, others as they come."""
    distinct = [value for i, value in enumerate(values) if value not in values[:i]]
    numbers = all(isinstance(value, (int, float)) for value in distinct)
    return sorted(distinct) if numbers else distinct
