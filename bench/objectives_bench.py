"""Can SIGReg stand in for I-JEPA's teacher? In small: python bench/objectives_bench.py [--runs NAME ...]

Trains one vision transformer by each of `RUNS` with the settings of the preset ijepa-laptop, and scores it
beside its untrained twin: kNN and linear probe on photographs of the kind it was trained on, ranks of the
targets, and low-level numbers on pictures that it has not seen (bench/shapes_data.py): how many shapes there
are, how far the nearest one is from the center.

Each run is a row of bench/results/objectives.jsonl, written when it ends. Called again, it goes on where it
was stopped: a run with the same settings that has a row is not trained again.
"""

import argparse
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchlib import Row, Rows, command_line, print_table, read_rows
from shapes_data import write_set

from lejepa_fast.errors import RunError
from lejepa_fast.train import evaluate, pretrain
from lejepa_fast.train.runtime.files import read_rows as metrics_of

_MASKED = ["--objective", "masked-lejepa", "--loss.sigreg-over"]
# Crops and colors of the preset laptop, at the size that the transformer takes.
_VIEWS = ["--crops.global-crops", "2", "--crops.local-crops", "2", "--crops.local-size", "32"]
_VIEWS += ["--crops.local-scale", "0.1", "0.4", "--crops.flip-prob", "0.5", "--crops.jitter-prob", "0.8"]
_VIEWS += ["--crops.grayscale-prob", "0.1", "--crops.blur-prob", "0.5", "--crops.blur-kernel", "5"]
RUNS: dict[str, list[str]] = {
    "I-JEPA": [],
    "masked LeJEPA, position": [*_MASKED, "position"],
    "masked LeJEPA, token": [*_MASKED, "token"],
    "masked LeJEPA, image": [*_MASKED, "image"],
    "masked, neither teacher nor SIGReg": ["--objective", "masked-lejepa", "--loss.lambd", "0"],
    "LeJEPA": ["--objective", "lejepa", *_VIEWS, "--optim.final-weight-decay", "None"],
}
TABLES = ("count", "distance")  # of bench/shapes_data.py
_PROBES = ("knn", "linear")
_METRICS = ("loss", "target_std", "between_rank", "within_rank")  # means of the last rows of metrics.jsonl
_LAST = 5


def train(name: str, extra: Sequence[str], folder: Path) -> Path:
    """Train a run, or go on with it; returns its folder, which those of other options do not share."""
    options = [*RUNS[name], *extra]
    digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:8]
    run = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{digest}"
    _succeed(pretrain.main, ["--preset", "ijepa-laptop", *options, "--out", str(run)])
    return run


def measure(run: Path, shapes: Path) -> Row:
    """What a finished run's report says, and R2 of the numbers of the shapes, trained and untrained."""
    summary = _summary(run)
    rows = [row for row in metrics_of(run / "metrics.jsonl") if row["kind"] == "train"][-_LAST:]
    found: Row = {key: summary[f"{key}"] for key in ("steps", "state", "embedding_std", "effective_rank")}
    found |= {f"{p}_{which}": summary[f"{p}_{which}"] for p in _PROBES for which in ("trained", "untrained")}
    found |= {key: statistics.fmean(row[key] for row in rows) for key in _METRICS if key in rows[0]}
    batch = summary["config"]["data"]["batch_size"]
    found["minutes"] = round(summary["steps"] * batch / summary["images_per_second"] / 60, 1)
    for table in TABLES:
        out = run / table
        options = ["--checkpoint", str(run), "--data", str(shapes), "--labels", str(shapes / f"{table}.csv")]
        _succeed(evaluate.main, [*options, "--out", str(out)])
        for which, suffix in (("trained", ""), ("untrained", "_untrained")):
            scores: Mapping[str, Any] = _summary(out)[f"regression{suffix}"]
            found |= {f"{table}_{p}_{which}": scores[p]["r2"] for p in _PROBES}
    return found


def _succeed(command: Any, arguments: list[str]) -> None:
    if code := command(arguments):
        raise RunError(f"{' '.join(arguments)}: exit code {code}")


def _summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report" / "summary.json").read_text(encoding="utf-8")))


def show(rows: Sequence[Row]) -> None:
    """Print two tables, trained with the untrained twin in parentheses."""
    cells = [f"{probe} (untrained)" for probe in _PROBES]
    header = ["objective, seed", *cells, "rank between", "rank within", "target std", "state"]
    lines, numbers = [], []
    for row in rows:
        name = f"{row['name']}, {row['seed']}"
        lines.append([name, *(_pair(row, probe, ".1f") for probe in _PROBES)])
        ranks = ("between_rank", "within_rank", "target_std")
        lines[-1] += [f"{row[key]:.3g}" if key in row else "" for key in ranks] + [row["state"]]
        numbers.append([name, *(_pair(row, f"{t}_{p}", ".3f") for t in TABLES for p in _PROBES)])
    print_table(header, lines)
    print()
    print_table(["R2 of numbers", *(f"{table}, {cell}" for table in TABLES for cell in cells)], numbers)


def _pair(row: Row, key: str, form: str) -> str:
    return f"{row[f'{key}_trained']:{form}} ({row[f'{key}_untrained']:{form}})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, rehearse="two steps of each run on small sets; the rows are marked")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="(all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="folder (%(default)s)")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="options of every training")
    options = parser.parse_args(arguments)
    work = options.work / "rehearsal" if options.rehearse else options.work
    extra = [*options.extra, *(["--max-steps", "2"] if options.rehearse else [])]
    shapes = work / "shapes"
    if not (shapes / f"{TABLES[0]}.csv").is_file():  # written last
        write_set(shapes, *((40, 20) if options.rehearse else (2000, 500)))
    path = options.out / "objectives.jsonl"
    writer, rows = Rows(path, "objectives", torch.device("cpu"), rehearsal=options.rehearse), []
    for seed in options.seeds:
        for name in options.runs:
            wanted = {"name": name, "seed": seed, "options": [*RUNS[name], *extra]}
            found = [row for row in read_rows(path) if wanted.items() <= row.items()]
            if not found:
                run = train(name, [*extra, "--seed", str(seed)], work / f"seed-{seed}")
                found = writer.write({**wanted, **measure(run, shapes)})
                print(found[-1], flush=True)
            rows.append(found[-1])
    show(rows)


if __name__ == "__main__":
    main()
