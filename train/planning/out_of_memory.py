"""Out of memory: one line that names the settings that help, instead of the allocator's report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lejepa_fast.errors import RunError
from lejepa_fast.train.config import Config
from lejepa_fast.train.parallel.parallelize import Strategy, compute_dtype
from lejepa_fast.train.planning.options import command_of
from lejepa_fast.train.runtime.gpu_specs import by_device_name
from lejepa_fast.train.runtime.world import World

_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextmanager
def settings_that_help(cfg: Config, world: World, strategy: Strategy, images: int) -> Iterator[None]:
    """Raise RunError with `describe` if an allocation inside fails; the arguments are those of `describe`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_ALLOCATOR not in str(error):
            raise
        raise RunError(describe(cfg, world, strategy, images)) from error


def describe(cfg: Config, world: World, strategy: Strategy, images: int) -> str:
    """Return what ran out, and the settings that need less memory, the cheapest first.

    Args:
        cfg: the configuration.
        world: the processes.
        strategy: how the run shares the model.
        images: images of an epoch.
    """
    parallel, batch, mode = cfg.parallel, cfg.data.batch_size, cfg.parallel.activation_checkpointing
    better = {"none": "selective or full", "selective": "full"}.get(mode)
    ways = {
        f"--parallel.activation-checkpointing {better} (now {mode})": better,
        "no --parallel.keep-gathered": parallel.keep_gathered,
        f"--parallel.strategy fsdp (now {strategy})": strategy != "fsdp" and world.size > 1,
        f"fewer groups than --parallel.replicate {parallel.replicate}": parallel.replicate > 1,
        f"no --average {cfg.average.kind}": cfg.average.kind != "none",
        f"a smaller --batch-size (now {batch}, {batch // world.size} images per process)": True,
        "more processes" + ("" if strategy == "fsdp" else " with --parallel.strategy fsdp"): True,
    }
    what, gpu = "out of memory", None
    if world.device.type == "cuda":
        held = torch.cuda.max_memory_allocated(world.device) / 2**30
        total = torch.cuda.get_device_properties(world.device).total_memory / 2**30
        what = f"out of GPU memory (up to {held:.1f} of {total:.1f} GiB in tensors)"
        gpu = by_device_name(torch.cuda.get_device_name(world.device))
    bf16 = compute_dtype(cfg, world.device) is not None
    plan = command_of(cfg, gpus=world.size, gpu=gpu.name if gpu else None, bf16=bf16, images=images)
    helps = ", ".join(way for way, useful in ways.items() if useful)
    return f"{what}; what helps: {helps}; what fits: {plan}"
