"""Figures over several runs. Every function writes one PNG, in the style of plots.py."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lejepa_fast.train.report.plots import TARGET, TRAINED, UNTRAINED, log_if_wide, report_figure
from lejepa_fast.train.report.runs import RunRecord
from lejepa_fast.train.report.selection import PROBES, Selection

PROBE_LABELS = {"linear": "linear probe", "knn": "kNN"}
COLORS = {"linear": TRAINED, "knn": UNTRAINED}
FIGURES = {
    "knn_trained": "kNN accuracy (%)",
    "linear_trained": "linear accuracy (%)",
    "loss": "training loss",
}


def plot_selection(path: Path, chosen: Selection) -> None:
    """Left: C(alpha) by probe, and RankMe's correlation as a dotted line. Right: accuracy against
    loss / lambda^alpha, colored by lambda."""
    probe = next(probe for probe in PROBES if probe in chosen.correlations)
    with report_figure(path, 10.0, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        draw_correlations(left, chosen.correlations)
        left.axvline(chosen.alpha, color=TARGET, linestyle="--", linewidth=1.2)
        runs = chosen.correlations[probe]["runs"]
        left.set_title(f"Rank correlation with accuracy, {runs} runs")
        largest = max(chosen.groups, key=chosen.groups.count)
        shown = [i for i, group in enumerate(chosen.groups) if group == largest and chosen.runs[i].lambd]
        x, y = [chosen.scores[i] for i in shown], [chosen.runs[i].figure(f"{probe}_trained") for i in shown]
        _colored(figure, right, x, y, [math.log10(chosen.runs[i].lambd) for i in shown], "log10(lambda)")
        right.set(xlabel=f"loss / lambda^{chosen.alpha:g}", ylabel=f"{PROBE_LABELS[probe]} (%)")
        right.set_title("Accuracy against the score")
        log_if_wide(right, "x", x)


def draw_correlations(ax: Axes, correlations: Mapping[str, Mapping[str, Any]]) -> None:
    """C(alpha) of each probe, and the correlation of RankMe as a dotted line; see `selection.correlate`."""
    lowest = 0.0
    for name, found in correlations.items():
        c, color, label = np.array(found["c"], dtype=float), COLORS[name], PROBE_LABELS[name]
        ax.plot(found["alphas"], c, color=color, marker="o", markersize=4, label=label)
        if found["rankme"] is not None and math.isfinite(found["rankme"]):
            ax.axhline(found["rankme"], color=color, linestyle=":", label=f"RankMe, {label}")
            lowest = min(lowest, found["rankme"])
        if np.isfinite(c).any():
            lowest = min(lowest, float(np.nanmin(c)))
    ax.set(xlabel="alpha", ylabel="C(alpha)", ylim=(lowest - 0.05, 1.05))
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
    """kNN, linear probe and loss over a grid: heat maps for two options, else a panel for each option.

    Args:
        path: the PNG.
        values: the value of each option in each run, by the option's name; runs of other seeds are averaged.
        runs: the runs, in the same order.
    """
    axes = {name: _ordered([each[name] for each in values]) for name in values[0]}
    varied = [name for name in axes if name != "seed" and len(axes[name]) > 1] or list(axes)[:1]
    figures = {name: [_figure(run, name) for run in runs] for name in FIGURES}
    figures = {name: found for name, found in figures.items() if np.isfinite(found).any()}
    heat = len(varied) == 2
    rows = 1 if heat else len(varied)
    with report_figure(path, 4.2 * len(figures), 3.6 * rows) as figure:
        panels = figure.subplots(rows, len(figures), squeeze=False)
        if heat:
            for ax, (name, found) in zip(panels[0], figures.items(), strict=True):
                _heat_map(ax, values, found, varied, [axes[each] for each in varied])
                ax.set_title(FIGURES[name])
            return
        for (axis, key), (column, (name, found)) in itertools.product(
            enumerate(varied), enumerate(figures.items())
        ):
            ax, levels = panels[axis, column], axes[key]
            places = [levels.index(each[key]) for each in values]
            ax.plot(places, found, ".", color=TRAINED, alpha=0.5, markersize=9, label="runs")
            means = [_mean(v for v, place in zip(found, places, strict=True) if place == i)
                     for i in range(len(levels))]  # fmt: skip
            ax.plot(range(len(levels)), means, color=TRAINED, label="mean")
            ax.set_xticks(range(len(levels)), [f"{level}" for level in levels])
            ax.set(xlabel=key, title=FIGURES[name])


def _figure(run: RunRecord, name: str) -> float:
    return run.loss if name == "loss" else run.figure(name)


def _heat_map(
    ax: Axes,
    values: Sequence[Mapping[str, Any]],
    found: Sequence[float],
    keys: list[str],
    levels: list[list[Any]],
) -> None:
    table = np.array(
        [
            [_mean(v for v, e in zip(found, values, strict=True) if (e[keys[0]], e[keys[1]]) == (row, column))
             for column in levels[1]]
            for row in levels[0]
        ]
    )  # fmt: skip
    ax.imshow(table, cmap="viridis", aspect="auto")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (i, j), value in np.ndenumerate(table):
        text = "-" if math.isnan(value) else f"{value:.3g}"
        ax.text(j, i, text, ha="center", va="center", color="white" if value < middle else "black")
    ax.grid(visible=False)
    ax.set_yticks(range(len(levels[0])), [f"{level}" for level in levels[0]])
    ax.set_xticks(range(len(levels[1])), [f"{level}" for level in levels[1]])
    ax.set(ylabel=keys[0], xlabel=keys[1])


def _mean(values: Any) -> float:
    """Mean of the finite values; NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Distinct values: numbers ascending, others as they come."""
    distinct = [value for i, value in enumerate(values) if value not in values[:i]]
    numbers = all(isinstance(value, (int, float)) for value in distinct)
    return sorted(distinct) if numbers else distinct
