"""Turn finished runs into rows of bench/results/pretrain.jsonl: python bench/pretrain_rows.py RUN [RUN ...]

A row holds the report's summary of a run, with this machine: call it where the runs were made. Draws
pretrain.png, the accuracies of these runs; without RUN, those of the rows that are there.
"""

import json
from pathlib import Path

from benchlib import Row, Rows, command_line, read_rows
from matplotlib.figure import Figure


def plot(rows: list[Row], path: Path) -> None:
    """Bars of accuracy, untrained and trained, means over the runs with a dot for each."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    probes = ("knn", "linear")
    for offset, which, color in ((0.2, "untrained", "#b8b8b8"), (-0.2, "trained", "#2a6fbb")):
        values = [[row[f"{probe}_{which}"] for row in rows] for probe in probes]
        places, means = [offset, 1 + offset], [sum(each) / len(each) for each in values]
        axis.barh(places, means, 0.38, color=color, label=f"{which} encoder")
        axis.plot(values, [[place] * len(rows) for place in places], "k.", markersize=4)
    axis.axvline(rows[-1]["majority_class"], color="k", linestyle=":", label="always the largest class")
    axis.set_yticks(range(2), ["nearest neighbors", "linear classifier"])
    axis.set(xlim=(0, 100), xlabel="accuracy on held-out images, %")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="run folders with report/summary.json")
    options = parser.parse_args(arguments)
    summaries = [run / "report" / "summary.json" for run in options.runs]
    for path in summaries:
        if not path.is_file():
            parser.error(f"runs: expected a finished run, got one without {path}")
    path = options.out / "pretrain.jsonl"
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in summaries]
    if rows:
        Rows(path, "pretrain").write(*rows)
    plot(rows or read_rows(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
