"""What the processes run that test_saving.py kills: few imports here, since it starts forty of them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lejepa_fast.train.checkpoint import saving
from lejepa_fast.train.checkpoint.saving import Saver
from lejepa_fast.train.runtime.world import World

SHAPE = (20_000, 300)  # 24 MB: large enough that writing, and not planning, is most of a save


def save_without_end(rank: int, folder: str, attempt: int, step: int) -> None:
    """One of two ranks: saves steps `step`, `step + 1`, ..., a tensor full of its step, half on each rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{attempt}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    saver = Saver(Path(folder) / "checkpoints", World(torch.device("cpu"), rank=rank, size=2), keep=3)
    while True:
        half = torch.full((SHAPE[0] // 2, SHAPE[1]), float(step))
        saver.start(step, {"model.weight": DTensor.from_local(half, mesh, [Shard(0)])}, {"config": {}})
        saver.wait()
        step += 1


def train_and_never_finish_a_save(arguments: list[str], threads: int, step: int, stage: str) -> None:
    """The trainer's command, whose save of this step stops for good: with "half a shard" on the disk, or with
    all but the "name"."""
    from lejepa_fast.train import pretrain

    torch.set_num_threads(threads)
    write_shard, sync_folder, folder = saving.write_shard, saving.sync_folder, f".step-{step:08d}."

    def save_half(path: Path, *args: Any) -> None:
        write_shard(path, *args)
        if path.parent.name.startswith(folder):
            os.truncate(path, path.stat().st_size // 2)
            time.sleep(600)

    def stop_before_the_name(path: Path) -> None:
        sync_folder(path)
        if path.name.startswith(folder):
            time.sleep(600)

    if stage == "half a shard":
        saving.write_shard = save_half
    else:
        saving.sync_folder = stop_before_the_name
    pretrain.main(arguments)
