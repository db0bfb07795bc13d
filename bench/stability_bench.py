"""How much LeJEPA's hyperparameters matter, in small: python bench/stability_bench.py [--part lambda ...]

Sweeps of lambda, batch, views, slices and knots, one at a time, and a grid of 24 runs (lambda, rate, weight
decay) for C(alpha), the rank correlation of loss / lambda^alpha with accuracy. A small ResNet sees the
images at 48 px in a few epochs. One run for each value and one seed: differences below the standard error of
the validation images, which is printed, mean nothing.

Each run is a row of bench/results/stability.jsonl, written when it ends, with the figures of its untrained
twin; the plot is stability.png. Called again, it goes on where it was stopped: a run of as many epochs on the
same data that has a row is not trained again.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchlib import SHORT_RUN, Row, Rows, command_line, print_rows, read_rows

from lejepa_fast.errors import UsageError
from lejepa_fast.train import sweep
from lejepa_fast.train.config import flat
from lejepa_fast.train.report.plots import report_figure
from lejepa_fast.train.report.results_table import standard_error
from lejepa_fast.train.report.run_plots import COLORS, PROBE_LABELS, draw_correlations, draw_loss_plane
from lejepa_fast.train.report.runs import RunRecord, read_run
from lejepa_fast.train.report.selection import PROBES, correlate

# Epochs, so that runs with other batches see as many images.
EPOCHS = 4
OPTIONS = [*SHORT_RUN, "--eval.every", "0", "--no-tensorboard"]
OPTIONS += ["--checkpoint-every", "100000", "--keep-checkpoints", "1"]

PARTS: dict[str, list[str]] = {
    "lambda": ["loss.lambd=0.01,0.05,0.1,0.2,0.5"],
    "batch": ["data.batch_size=32,64,128,256"],
    "views": ["crops.local_crops=2,4,6,8"],
    "slices": ["loss.num_slices=16,64,256,1024"],
    "knots": ["loss.t_max=1.0,3.0,5.0", "loss.n_points=5,17"],
    "alpha": ["loss.lambd=0.02,0.05,0.1,0.2", "optim.lr=5e-4,2e-3,5e-3", "optim.weight_decay=1e-1,1e-5"],
}
# The paper's accuracies (arXiv 2511.08544), linear probe on ImageNet or a part of it.
PAPER = {
    "lambda": "ResNet-50, ImageNet-100: 83.6, 84.3, 83.7, 82.2, 77.7 at 0.01, 0.05, 0.1, 0.2, 0.5",
    "batch": "ViT-L: 72.2, 74.2, 74.7, 74.1 with 128, 256, 512, 1024 images",
    "views": "ViT-L: 72.3, 73.1, 74.2, 74.1 with 2, 4, 6, 8 local views beside 2 global ones",
    "slices": "ViT-L: 74.2, 74.7 with 512, 2048 slices, knots up to 3",
    "knots": "ViT-L: 72.1, 74.2, 74.2 with 17 knots up to 1, 3, 5",
    "alpha": "five pairs of model and data: C(0) = 0.60 to 0.90, C(0.4) = 0.95 to 0.99",
}


def train_part(part: str, options: Sequence[str], runs: Path, writer: Rows, length: Row, jobs: int) -> int:
    """Train what has no row of a part, write a row for each run as it ends, return how many failed.

    `length`: settings that say how long and on what the runs train; rows of others do not count.
    """
    known = [row["values"] for row in rows_of(writer, length) if row["part"] == part]
    points = [p for p in sweep.make_points(PARTS[part], options, runs / part) if p.values not in known]

    def write(point: sweep.Point) -> None:
        run = read_run(point.folder)
        # A run that an earlier call finished may have had other threads.
        writer.about["threads"] = run.summary["machine"]["torch_threads"]
        writer.write({"part": part, "values": point.values, **figures_of(run)})

    failed = sweep.run_points(points, jobs=jobs, ended=write)
    for folder, reason in failed.items():
        print(f"{folder}: {reason}")
    return len(failed)


def rows_of(writer: Rows, length: Row) -> list[Row]:
    return [row for row in read_rows(writer.path) if length.items() <= row["settings"].items()]


def figures_of(run: RunRecord) -> Row:
    """What a row holds of a run."""
    names = [f"{name}_{which}" for name in PROBES for which in ("trained", "untrained")]
    names += ["effective_rank", "effective_rank_untrained", "rankme", "rankme_untrained"]
    names += ["state", "val_images"]
    settings = {key: value for key, value in flat(run.config).items() if key not in ("out", "resume")}
    losses = {"loss": run.loss, "prediction": run.prediction, "sigreg": run.sigreg}
    return {"steps": run.steps, **losses, **{n: run.summary.get(n) for n in names}, "settings": settings}


def record_of(row: Mapping[str, Any]) -> RunRecord:
    """The run of a row, as far as selection needs it."""
    losses = {name: row[name] for name in ("loss", "prediction", "sigreg")}
    settings = {"objective": "lejepa", "loss": {"lambd": row["settings"]["loss.lambd"]}}
    return RunRecord(Path(row["part"]), settings, row["steps"], summary=dict(row), **losses)


def show(rows: Sequence[Row], path: Path) -> None:
    """Print a table of each part with the paper's figures below it, and draw all of them."""
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        if not own:
            continue
        print(f"\n{part}")
        columns = {", ".join(own[0]["values"]): "{label}"}
        columns |= {f"{p} (untrained)": f"{{{p}_trained:.1f}} ({{{p}_untrained:.1f}})" for p in PROBES}
        print_rows([{**row, "label": _values(row, ", ")} for row in own], columns)
        for probe in PROBES:
            spread = [row[f"{probe}_trained"] for row in own]
            print(
                f"{probe}: {min(spread):.1f} to {max(spread):.1f} %, standard error about {_error(own):.1f}"
            )
            if part == "alpha" and (found := correlate([record_of(row) for row in own], probe)):
                line = "C(0) = {0:.2f}, C(0.4) = {c_at_alpha:.2f}, best C({best_alpha:g}) = {c_at_best:.2f}, "
                line += "effective rank {effective_rank:.2f}, RankMe {rankme:.2f}"
                print(f"{probe}, {found['runs']} runs: {line.format(found['c'][0], **found)}")
        print(f"paper: {PAPER[part]}")
    plot(rows, path)
    print(f"\nplot: {path}")


def _values(row: Row, between: str) -> str:
    return between.join(f"{value:g}" for value in row["values"].values())


def _error(rows: Sequence[Row]) -> float:
    """Standard error of an accuracy, in percent."""
    mean = sum(row["linear_trained"] for row in rows) / len(rows)
    return standard_error(mean, rows[0]["val_images"])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over each option, trained and untrained; C(alpha); accuracy over the plane of the losses."""
    parts = [part for part in PARTS if any(row["part"] == part for row in rows)]
    with report_figure(path, 13.0, 6.6) as figure:
        panels = figure.subplots(2, 4)
        *free, plane = panels.flat
        for ax, part in zip(free, parts, strict=False):
            own = [row for row in rows if row["part"] == part]
            ax.set_title(part)
            if part == "alpha":
                records = [record_of(row) for row in own]
                draw_correlations(ax, {p: found for p in PROBES if (found := correlate(records, p))})
                ax.set_title(f"C(alpha), {len(own)} runs")
                continue
            keys = list(own[0]["values"])
            labels = [_values(row, "\n") for row in own]
            for probe in PROBES:
                for which, style in (("trained", "o-"), ("untrained", ":")):
                    values = [row[f"{probe}_{which}"] for row in own]
                    label = f"{PROBE_LABELS[probe]}, {which}"
                    ax.plot(range(len(own)), values, style, color=COLORS[probe], label=label)
            ax.set_xticks(range(len(own)), labels)
            ax.set(xlabel=", ".join(keys), ylabel="accuracy (%)")
        for ax in free[len(parts) :]:
            ax.set_axis_off()
        if grid := [record_of(row) for row in rows if row["part"] in ("alpha", "lambda")]:
            draw_loss_plane(figure, plane, grid)
        else:
            plane.set_axis_off()
        if parts != ["alpha"]:
            free[len(parts)].legend(*free[0].get_legend_handles_labels(), loc="center left")


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/stability"), help="run folders (%(default)s)")
    about = "runs at a time, which share the cores (%(default)s)"
    parser.add_argument("--jobs", type=int, default=2, help=about)
    parser.add_argument("--data", default="trashnet96", help="labeled images (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each run (%(default)s)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"jobs: expected at least 1, got {options.jobs}")
    shared = [*OPTIONS, "--data", options.data, "--epochs", str(options.epochs)]
    length = {"max_steps": None, "epochs": options.epochs, "data.path": options.data}
    writer = Rows(options.out / "stability.jsonl", "stability")
    # A net this small gains little from a second thread.
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    writer.about["jobs"] = options.jobs
    try:
        parts = [
            train_part(part, shared, options.runs, writer, length, options.jobs) for part in options.part
        ]
    except UsageError as error:
        parser.error(str(error).replace("--out", "--runs"))
    rows = rows_of(writer, length)
    newest = {json.dumps([row["part"], row["values"]]): row for row in rows}
    if newest:
        show(list(newest.values()), options.out / "stability.png")
    return int(sum(parts) > 0)


if __name__ == "__main__":
    sys.exit(main())
