"""What several tests of the trainer share: running one and reading its rows."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from lejepa_fast.train.config import Config
from lejepa_fast.train.engine.metrics import read_rows
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.world import World

CPU = World(torch.device("cpu"))

Make = Callable[..., Config]


def run_ranks(worker: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """`worker(rank, *arguments)` in a process for each rank. They are forked from one that has imported the
    trainer, which takes each of them seconds otherwise."""
    multiprocessing.set_forkserver_preload(["lejepa_fast.train.engine.trainer"])
    mp.start_processes(worker, arguments, nprocs=ranks, start_method="forkserver")


def train_only(cfg: Config) -> Trainer:
    """`Trainer.run` without the evaluation at the end."""
    trainer = Trainer(cfg, CPU)
    trainer.finish = lambda: Path()  # type: ignore[method-assign]
    trainer.run()
    return trainer


def rows_of(cfg: Config, kind: str = "train") -> list[dict[str, Any]]:
    assert cfg.out is not None
    return [row for row in read_rows(cfg.out / "metrics.jsonl") if row["kind"] == kind]


def course_of(cfg: Config) -> list[tuple[Any, ...]]:
    """Everything in the train rows that does not depend on the clock."""
    keys = ("step", "epoch", "loss", "prediction", "sigreg", "lr", "grad_norm", "embedding_std")
    return [tuple(row[key] for key in keys) for row in rows_of(cfg)]
