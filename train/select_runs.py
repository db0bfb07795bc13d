"""Rank runs without labels: `python train/select_runs.py RUN RUN ...`, or `lejepa-select RUN RUN ...`.

Reads the run folders alone: no images, no GPU. `report/selection.py` has the rules. Exit codes: 0 done, 1 the
disk refuses, 2 wrong usage.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from annotated_types import Ge, Le

from lejepa_fast.errors import UsageError
from lejepa_fast.train.runtime.command import aligned, run_with_options
from lejepa_fast.train.runtime.files import disk_errors_named


@dataclass(frozen=True)
class Options:
    """Rank runs without labels, by loss / lambda^alpha, effective rank and RankMe; with labels, also say how
    well each rule ranks them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, finished ones at best."""
    alpha: Annotated[float, Ge(0), Le(10)] = 0.4
    """Exponent of lambda. The paper finds about 0.4."""
    out: Path | None = None
    """Folder that gets select.json and, with labels, select.png; None: print only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_with_options(Options, _select, argv)


def _select(options: Options) -> None:
    from lejepa_fast.train.report.runs import json_text, read_run  # after --help
    from lejepa_fast.train.report.selection import select

    runs = []
    for folder in {folder.resolve(): folder for folder in options.runs}.values():
        try:
            runs.append(read_run(folder))
        except UsageError as problem:  # such as a folder beside the runs, or a run without a finished step
            print(f"warning: left out: {problem}", file=sys.stderr)
    if len(runs) < 2:
        raise UsageError(f"runs: expected 2 run folders or more, got {len(runs)}")
    chosen = select(runs, options.alpha)
    print(table(chosen))
    if options.out is None:
        return
    with disk_errors_named(options.out, "choose another --out"):
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "select.json").write_text(json_text(chosen), encoding="utf-8")
        if chosen["correlations"]:
            from lejepa_fast.train.report.run_plots import plot_selection

            plot_selection(options.out / "select.png", chosen)


def table(chosen: Mapping[str, Any]) -> str:
    """The runs of `select`, the best first, with their places by each rule; below, what to trust."""
    from lejepa_fast.train.report.selection import LOSS, NEITHER, PROBES, RANKS

    alpha, runs = chosen["alpha"], chosen["runs"]
    several = len({row["group"] for row in runs}) > 1
    probes = [probe for probe in PROBES if any(math.isfinite(row[probe]) for row in runs)]
    header = ["run", "group"] if several else ["run"]
    header += ["lambda", "steps", "loss", f"loss/lambda^{alpha:g}", "eff. rank", "RankMe", "state"]
    lines = [[*header, *probes]]
    for row in runs:
        cells = [row["run"], f"{row['group'] + 1}"] if several else [row["run"]]
        cells += [f"{row['lambda']:g}", f"{row['steps']}", f"{row['loss']:.4g}"]
        for name, place in row["places"].items():
            cells.append("-" if place is None else f"{row[name]:.4g} ({place})")
        accuracies = ["-" if math.isnan(row[probe]) else f"{row[probe]:.1f}" for probe in probes]
        lines.append([*cells, row["state"], *accuracies])
    texts = [aligned(lines)]
    if chosen["warning"]:
        texts.append(f"warning: {chosen['warning']}")
    if chosen["rule"] == NEITHER:
        texts.append("trusted rule: loss / lambda^alpha within each group; none between groups")
    else:
        by_loss, best = chosen["rule"] == LOSS, runs[0]
        name = best["run"] + " (collapsed)" * (best["state"] == "collapsed")
        if by_loss and best["places"]["score"] is None:
            name = "none, as no run has a score"
        rule = f"{LOSS}, alpha {alpha:g}" if by_loss else chosen["rule"]
        texts.append(f"trusted rule: {rule}; best: {name}")
    for probe, found in chosen["correlations"].items():
        line = (
            f"rank correlation with {probe} accuracy over {found['runs']} runs: C(0) = {found['c'][0]:.2f}, "
            f"C({alpha:g}) = {found['c_at_alpha']:.2f}, "
            f"best C({found['best_alpha']:g}) = {found['c_at_best']:.2f}"
        )
        for name, label in RANKS.items():
            line += "" if found[name] is None else f", {label} {found[name]:.2f}"
        texts.append(f"{line}; without any relation 0 ± {(found['runs'] - 1) ** -0.5:.2f}")
    return "\n".join(texts)


if __name__ == "__main__":
    sys.exit(main())
