"""What several tests of the trainer share: running one and reading its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lejepa_fast.train.config import Config
from lejepa_fast.train.loop import Trainer
from lejepa_fast.train.metrics import read_rows
from lejepa_fast.train.world import World

CPU = World(torch.device("cpu"))

Make = Callable[..., Config]


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
