"""Rank runs without labels: `python train/select_runs.py RUN RUN ...`, or `lejepa-select RUN RUN ...`.

Reads the run folders alone: no images, no GPU. `report/selection.py` has the rules. Exit codes: 0 done, 1 the
disk refuses, 2 wrong usage.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from lejepa_fast.errors import UsageError
from lejepa_fast.train.runtime.command import aligned, run_with_options
from lejepa_fast.train.runtime.files import disk_errors_named

if TYPE_CHECKING:
    from lejepa_fast.train.report.selection import Selection


@dataclass(frozen=True)
class Options:
    """Rank runs without labels, by loss / lambda^alpha, effective rank and RankMe; with labels, also say how
    well each rule ranks them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, finished ones at best."""
    alpha: float = 0.4
    """Exponent of lambda. The paper finds about 0.4."""
    out: Path | None = None
    """Folder that gets select.json and, with labels, select.png; None: print only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_with_options(Options, _select, argv)


def _select(options: Options) -> None:
    from lejepa_fast.train.report.runs import read_run  # after --help
    from lejepa_fast.train.report.selection import select

    if not 0 <= options.alpha <= 10:  # NaN, too
        raise UsageError(f"alpha: expected a number from 0 to 10, got {options.alpha}")
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
        (options.out / "select.json").write_text(chosen.to_json(), encoding="utf-8")
        if chosen.correlations:
            from lejepa_fast.train.report.run_plots import plot_selection

            plot_selection(options.out / "select.png", chosen)


def table(chosen: "Selection") -> str:
    """The runs, the best first, with their places by each rule; below, what to trust."""
    from lejepa_fast.train.report.selection import LOSS, NEITHER, PROBES

    runs, alpha = chosen.runs, chosen.alpha
    ranks = {name: [-run.figure(name) for run in runs] for name in ("effective_rank", "rankme")}
    by_loss = chosen.places(chosen.scores, grouped=True)
    places = {name: chosen.places(values, grouped=False) for name, values in ranks.items()}
    several = len(set(chosen.groups)) > 1

    def placed(value: float, place: int | None) -> str:
        return "-" if place is None else f"{value:.4g} ({place})"

    names = [str(run.folder) for run in runs]
    header = ["run", "group"] if several else ["run"]
    header += ["lambda", "steps", "loss", f"loss/lambda^{alpha:g}", "eff. rank", "RankMe", "state"]
    probes = [p for p in PROBES if any(math.isfinite(run.figure(f"{p}_trained")) for run in runs)]
    rows = [[*header, *probes]]
    for i in chosen.order():
        run = runs[i]
        cells = [names[i], f"{chosen.groups[i] + 1}"] if several else [names[i]]
        cells += [f"{run.lambd:g}", f"{run.steps}", f"{run.loss:.4g}", placed(chosen.scores[i], by_loss[i])]
        cells += [placed(-values[i], places[name][i]) for name, values in ranks.items()]
        accuracies = [f"{run.figure(f'{probe}_trained'):.1f}".replace("nan", "-") for probe in probes]
        rows.append([*cells, run.state, *accuracies])
    lines = [aligned(rows)]
    if chosen.warning:
        lines.append(f"warning: {chosen.warning}")
    best = runs[chosen.order()[0]]
    if chosen.rule != NEITHER:
        rule = f"{chosen.rule}, alpha {alpha:g}" if chosen.rule == LOSS else chosen.rule
        lines.append(
            f"trusted rule: {rule}; best: {best.folder}{' (collapsed)' * (best.state == 'collapsed')}"
        )
    else:
        lines.append("trusted rule: loss / lambda^alpha within each group; none between groups")
    for probe, found in chosen.correlations.items():
        ranks_found = [
            f"{label} {found[name]:.2f}"
            for name, label in (("effective_rank", "effective rank"), ("rankme", "RankMe"))
            if found[name] is not None
        ]
        lines.append(
            f"rank correlation with {probe} accuracy over {found['runs']} runs: C(0) = {found['c'][0]:.2f}, "
            f"C({alpha:g}) = {found['c_at_alpha']:.2f}, best C({found['best_alpha']:g}) = "
            f"{found['c_at_best']:.2f}{''.join(', ' + each for each in ranks_found)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
