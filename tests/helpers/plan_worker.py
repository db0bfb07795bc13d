"""What each rank runs for test_plan.py: the planned step on real tensors, its memory counted by PyTorch's
CPU allocator. Imported by spawned processes."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from lejepa_fast.train.config import Config, from_dict
from lejepa_fast.train.planning.memory import PlannedStep


def measure(rank: int, world_size: int, folder: str, cases: list[tuple[dict[str, Any], int]]) -> None:
    """Write this rank's peak bytes of each configuration and number of images to `folder/RANK.json`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    peaks = [allocator_peak(from_dict(values), images) for values, images in cases]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(peaks))
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def allocator_peak(cfg: Config, images: int) -> int:
    """The most bytes of the second step: all allocations and releases since before the model was made.

    The profiler does not see what other threads release (gloo's, where the weights are dealt out): it is what
    seems to be alive when all is gone.
    """
    gc.collect()  # what is left of another case must not be released, and so subtracted, in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = PlannedStep(cfg, images, fake=False)
        step.run()
        gc.collect()
        with torch.profiler.record_function("measured step"):
            step.run()
        del step
        gc.collect()
    events = recorded.profiler.kineto_results.events()
    window = next(event for event in events if event.name() == "measured step")
    sizes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = peak = 0
    for when, size in sizes:
        alive += size
        if window.start_ns() <= when <= window.end_ns():
            peak = max(peak, alive)
    return peak - alive
