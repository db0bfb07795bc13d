"""Can SIGReg stand in for I-JEPA's teacher? In small: python bench/objectives_bench.py [--runs NAME ...]

Trains one vision transformer by each of `RUNS` with the settings of the preset ijepa-laptop, and scores it
beside its untrained twin: kNN and linear probe on photographs of the kind it was trained on, how its patches
spread between and within images, and low-level numbers on pictures that it has not seen
(bench/shapes_data.py): how many shapes there are, how far the nearest one is from the center.

Each run is a row of bench/results/objectives.jsonl, written when it ends. Called again, it goes on where it
was stopped: a run with the same settings that has a row is not trained again.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchlib import Row, Rows, command_line, print_table, read_rows
from shapes_data import write_set

from lejepa_fast.data import eval_loader
from lejepa_fast.errors import RunError
from lejepa_fast.train import evaluate, pretrain
from lejepa_fast.train.checkpoint.trained_model import load_trained
from lejepa_fast.train.evaluation.collapse import effective_rank, embedding_std
from lejepa_fast.train.evaluation.protocol import open_splits
from lejepa_fast.train.model.model import build_model, evaluated
from lejepa_fast.train.runtime import files

_MASKED = ["--objective", "masked-lejepa", "--loss.sigreg-over"]
# Like the crops and colors of benchlib.SHORT_RUN, at the size that the transformer takes.
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
_PATCHES = 4096  # of all validation images, drawn at random for the effective rank within images


def train(name: str, extra: Sequence[str], folder: Path) -> Path:
    """Train a run, or go on with it; returns its folder, which those of other options do not share."""
    options = [*RUNS[name], *extra]
    digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:8]
    run = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{digest}"
    _succeed(pretrain.main, ["--preset", "ijepa-laptop", *options, "--out", str(run)])
    return run


def measure(run: Path, shapes: Path) -> Row:
    """What a finished run's report says, `spread`, and R2 of the numbers of the shapes."""
    summary = _summary(run)
    found: Row = {key: summary[key] for key in ("steps", "state", "embedding_std", "effective_rank")}
    found |= {f"{p}_{which}": summary[f"{p}_{which}"] for p in _PROBES for which in ("trained", "untrained")}
    found |= spread(run)
    rows = [row for row in files.read_rows(run / "metrics.jsonl") if row["kind"] == "eval"]
    found["evaluations"] = [[row["step"], *(round(row[probe], 2) for probe in _PROBES)] for row in rows]
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


@torch.no_grad()
def spread(run: Path) -> Row:
    """How the encoder's patches spread on validation images, trained and untrained: `between`, the means of
    the images, and `within`, patches around the mean of their image; std and effective rank."""
    trained = load_trained(run)
    cfg, size = trained.cfg, trained.cfg.crops.global_size
    _, images = open_splits(cfg.data)
    mean, std = cfg.crops.mean, cfg.crops.std
    batches = [x for x, _ in eval_loader(images, image_size=size, batch_size=64, mean=mean, std=std)]
    found: Row = {}
    for which, model in (("trained", trained.model), ("untrained", evaluated(build_model(cfg)))):
        encoder: Any = model.encoder.eval()
        features = torch.cat([encoder.forward_features(x) for x in batches])
        tokens = features[:, encoder.num_prefix_tokens :]
        means = tokens.mean(dim=1)
        patches = (tokens - means[:, None]).flatten(0, 1)
        chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:_PATCHES]
        for name, values in (("between", means), ("within", patches[chosen])):
            found[f"{name}_std_{which}"] = embedding_std(values)
            found[f"{name}_rank_{which}"] = effective_rank(values)
    return found


def _succeed(command: Any, arguments: list[str]) -> None:
    if code := command(arguments):
        raise RunError(f"{' '.join(arguments)}: exit code {code}")


def _summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report" / "summary.json").read_text(encoding="utf-8")))


def show(rows: Sequence[Row]) -> None:
    """Print two tables, trained with the untrained twin in parentheses."""
    cells = [f"{probe} (untrained)" for probe in _PROBES]
    kinds = ("between_rank", "within_rank", "between_std", "within_std")
    header = ["objective, seed", *cells, *(kind.replace("_", ", ") for kind in kinds), "state"]
    lines, numbers = [], []
    for row in rows:
        name = f"{row['name']}, {row['seed']}"
        lines.append([name, *(_pair(row, probe, ".1f") for probe in _PROBES)])
        lines[-1] += [*(_pair(row, kind, ".3g") for kind in kinds), row["state"]]
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
