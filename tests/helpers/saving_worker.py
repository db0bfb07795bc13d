"""What the processes run that test_checkpoint.py kills: few imports here, since it starts forty of them."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lejepa_fast.train.checkpoint.saving import Saver
from lejepa_fast.train.runtime.world import World

SHAPE = (8_000, 300)  # 10 MB: large enough that writing, and not planning, is most of a save


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
