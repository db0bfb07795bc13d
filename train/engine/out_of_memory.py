"""Out of memory: one line that names the settings that help, instead of the allocator's report."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lejepa_fast.errors import RunError
from lejepa_fast.train.config import Config, load_json
from lejepa_fast.train.parallel.parallelize import Strategy, compute_dtype
from lejepa_fast.train.runtime.gpu_specs import GIB, by_device_name
from lejepa_fast.train.runtime.world import World


@contextmanager
def settings_that_help(cfg: Config, world: World, strategy: Strategy, images: int) -> Iterator[None]:
    """Turn an error of memory inside into a RunError that says which settings help: `describe`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise RunError(describe(cfg, world, strategy, images)) from error


def describe(cfg: Config, world: World, strategy: Strategy, images: int) -> str:
    """Return what ran out, the settings that need less memory, the cheapest first, and how to plan this run.

    `strategy` is how the run shares the model, `images` the number of images of an epoch.
    """
    parallel, batch, mode = cfg.parallel, cfg.data.batch_size, cfg.parallel.activation_checkpointing
    better = {"none": "selective or full", "selective": "full"}.get(mode)
    center = " (nor the center from it)" if cfg.loss.center_from == "average" else ""
    ways = {
        f"--parallel.activation-checkpointing {better} (now {mode})": better,
        f"--parallel.strategy fsdp (now {strategy})": strategy != "fsdp" and world.size > 1,
        f"fewer groups than --parallel.replicate {parallel.replicate}": parallel.replicate > 1,
        f"no --average {cfg.average.kind}{center}": cfg.average.kind != "none",
        f"a smaller --batch-size (now {batch}, {batch // world.size} images per process)": True,
        "more processes" + ("" if strategy == "fsdp" else " with --parallel.strategy fsdp"): True,
    }
    # The folder may still hold the settings of another run, or none.
    written = cfg.out and cfg.out / "config.json"
    own = written and written.is_file() and load_json(written) == cfg
    options = f"--config {shlex.quote(str(written))}" if own else "with this run's options,"
    plan = f"lejepa-plan {options} --gpus {world.size} --images {images}"
    if compute_dtype(cfg, world.device) is None:
        plan += " --precision fp32"
    what = "out of memory"
    if world.device.type == "cuda":
        held = torch.cuda.max_memory_allocated(world.device) / GIB
        total = torch.cuda.get_device_properties(world.device).total_memory / GIB
        what = f"out of GPU memory (up to {held:.1f} of {total:.1f} GiB in tensors)"
        if gpu := by_device_name(torch.cuda.get_device_name(world.device)):
            plan += f" --gpu {gpu.name}"
    helpful = ", ".join(way for way, useful in ways.items() if useful)
    return f"{what}; what helps: {helpful}; what fits: {plan}"
