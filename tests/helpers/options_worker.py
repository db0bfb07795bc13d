"""What each rank runs for test_options_on_ranks.py; imported by spawned processes."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_worker import run_config, train

from lejepa_fast.train.config import AverageConfig, Config, EvalConfig, ParallelConfig
from lejepa_fast.train.runtime.world import World

STEPS, MIDDLE = 6, 3
KEPT = ParallelConfig(strategy="fsdp", keep_gathered=True, activation_checkpointing="full")


def options_config(images: str, out: Path, **changes: Any) -> Config:
    """Four steps an epoch; an average over all of them, both probes after the first epoch."""
    cfg = run_config(images, out, max_steps=STEPS, checkpoint_every=MIDDLE)
    cfg = replace(
        cfg,
        average=AverageConfig(kind="ema", decay=0.7, start=0.0),
        eval=EvalConfig(every=1, linear_steps=20, batch_size=16, k=3),
        keep_checkpoints=9,
    )
    return replace(cfg, **changes)


def middle_of(run: Path) -> str:
    return str(run / "checkpoints" / f"step-{MIDDLE:08d}")


def run(rank: int, size: int, folder: str, images: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=size)
    world, root = World(torch.device("cpu"), rank=rank, size=size), Path(folder)
    jobs = {
        "ddp": {"parallel": ParallelConfig(strategy="ddp"), "wandb": "birds"},
        "fsdp": {"parallel": KEPT},
        "one to fsdp": {"parallel": KEPT, "resume": middle_of(root / "one")},
    }
    try:
        for name, changes in jobs.items():
            train(options_config(images, root / name, **changes), world, whole=name == "fsdp")
    finally:
        gc.collect()
        dist.destroy_process_group()
