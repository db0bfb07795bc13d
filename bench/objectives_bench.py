"""Can SIGReg stand in for I-JEPA's teacher? In small: python bench/objectives_bench.py [--runs NAME ...]

Trains one vision transformer by each of `RUNS` with the settings of the preset ijepa-laptop, and scores it
beside its untrained twin: kNN and linear probe on photographs of the kind it was trained on, how its patches
spread between and within images, and low-level numbers on pictures that it has not seen
(bench/shapes.py): how many shapes there are, how far the nearest one is from the center.

Each run is a row of bench/results/objectives.jsonl, written when it ends. Called again, it goes on where it
was stopped: a run with the same settings that has a row is not trained again.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchlib import Row, Rows, command_line, print_rows
from shapes import write_set

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
TABLES = ("count", "distance")  # of bench/shapes.py
PICTURES = (2000, 500)  # to train on and to measure on
_PROBES = ("knn", "linear")
_PATCHES = 4096  # of all validation images, drawn at random for the effective rank within images


def measure(options: Sequence[str], work: Path, shapes: Path) -> Row:
    """Train a run, or go on with it: what its report says, `spread`, and R2 of the numbers of the shapes.

    Its folder is in `work`; other options have another one.
    """
    run = work / hashlib.sha256(json.dumps(options).encode()).hexdigest()[:8]
    summary = _run(pretrain.main, ["--preset", "ijepa-laptop", *options], run)
    found: Row = {key: summary[key] for key in ("steps", "state", "embedding_std", "effective_rank")}
    found |= {f"{p}_{which}": summary[f"{p}_{which}"] for p in _PROBES for which in ("trained", "untrained")}
    found |= spread(run)
    rows = [row for row in files.read_rows(run / "metrics.jsonl") if row["kind"] == "eval"]
    found["evaluations"] = [[row["step"], *(round(row[probe], 2) for probe in _PROBES)] for row in rows]
    batch = summary["config"]["data"]["batch_size"]
    found["minutes"] = round(summary["steps"] * batch / summary["images_per_second"] / 60, 1)
    for table in TABLES:
        about = ["--checkpoint", str(run), "--data", str(shapes), "--labels", str(shapes / f"{table}.csv")]
        scores = _run(evaluate.main, about, run / table)
        for which, suffix in (("trained", ""), ("untrained", "_untrained")):
            r2 = scores[f"regression{suffix}"]
            found |= {f"{table}_{p}_{which}": r2[p]["r2"] for p in _PROBES}
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


def _run(command: Any, arguments: list[str], out: Path) -> dict[str, Any]:
    """Run a command of the trainer, and return the summary in its folder `out`."""
    if code := command([*arguments, "--out", str(out)]):
        raise RunError(f"{' '.join(arguments)}: exit code {code}")
    return dict(json.loads((out / "report" / "summary.json").read_text(encoding="utf-8")))


def show(rows: Sequence[Row]) -> None:
    """Print two tables, trained with the untrained twin in parentheses."""
    run, pair = {"objective, seed": "{name}, {seed}"}, "{{{0}_trained:{1}}} ({{{0}_untrained:{1}}})".format
    columns = run | {f"{probe} (untrained)": pair(probe, ".1f") for probe in _PROBES}
    for kind in ("between_rank", "within_rank", "between_std", "within_std"):
        columns[kind.replace("_", ", ")] = pair(kind, ".3g")
    print_rows(rows, columns | {"state": "{state}"})
    print("\nR2 of numbers")
    numbers = [(table, probe) for table in TABLES for probe in _PROBES]
    print_rows(rows, run | {f"{t}, {p} (untrained)": pair(f"{t}_{p}", ".3f") for t, p in numbers})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="(all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="folder (%(default)s)")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="options of every training")
    options = parser.parse_args(arguments)
    shapes = options.work / "shapes"
    if not (shapes / f"{TABLES[0]}.csv").is_file():  # written last
        write_set(shapes, *PICTURES)
    writer, rows = Rows(options.out / "objectives.jsonl", "objectives", torch.device("cpu")), []
    for seed in options.seeds:
        for name in options.runs:
            wanted = {"name": name, "seed": seed, "options": [*RUNS[name], *options.extra]}
            if not (found := writer.known(wanted)):
                every = [*RUNS[name], *options.extra, "--seed", str(seed)]
                found = writer.write({**wanted, **measure(every, options.work, shapes)})
                print(found[-1], flush=True)
            rows.append(found[-1])
    show(rows)


if __name__ == "__main__":
    main()
