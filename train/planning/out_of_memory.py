"""Out of memory: one line that names the settings that help, instead of the allocator's report."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lejepa_fast.errors import RunError
from lejepa_fast.train.config import AverageConfig, Config, DataConfig, LossConfig
from lejepa_fast.train.parallel.parallelize import Strategy, compute_dtype
from lejepa_fast.train.planning.options import PlanOptions
from lejepa_fast.train.runtime.gpu_specs import by_device_name
from lejepa_fast.train.runtime.world import World


@contextmanager
def settings_that_help(cfg: Config, world: World, strategy: Strategy, images: int) -> Iterator[None]:
    """Raise RunError with `describe`, which gets the arguments, if an allocation inside fails."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise RunError(describe(cfg, world, strategy, images)) from error


def describe(cfg: Config, world: World, strategy: Strategy, images: int) -> str:
    """Return what ran out, and the settings that need less memory, the cheapest first.

    `strategy` is how the run shares the model, `images` the number of images of an epoch.
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
    planned = PlanOptions(
        **{name: getattr(cfg, name) for name in ("crops", "model", "parallel", "epochs", "max_steps")},
        data=DataConfig(batch_size=batch),
        loss=LossConfig(num_slices=cfg.loss.num_slices),
        average=AverageConfig(kind=cfg.average.kind),
        precision="auto" if compute_dtype(cfg, world.device) else "fp32",
        gpus=world.size,
        gpu=gpu.name if gpu else PlanOptions.gpu,
        images=images,
    )
    plan = shlex.join(["python", "train/plan.py", *_differences(planned, PlanOptions(), "--")])
    helps = ", ".join(way for way, useful in ways.items() if useful)
    return f"{what}; what helps: {helps}; what fits: {plan}"


def _differences(chosen: Any, default: Any, prefix: str) -> list[str]:
    """Return the options for the fields of a dataclass that differ from the default."""
    words: list[str] = []
    for field in dataclasses.fields(chosen):
        value, usual = getattr(chosen, field.name), getattr(default, field.name)
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            words += _differences(value, usual, f"{prefix}{name}.")
        elif value != usual and isinstance(value, bool):
            words.append(prefix + ("" if value else "no-") + name)
        elif value != usual:
            words += [prefix + name, *map(str, value if isinstance(value, tuple) else [value])]
    return words
