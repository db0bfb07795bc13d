"""Out of memory: one line that says which settings help, instead of the allocator's report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lejepa_fast.errors import RunError
from lejepa_fast.train.config import Config
from lejepa_fast.train.parallel.parallelize import Strategy, compute_dtype
from lejepa_fast.train.runtime.gpu_specs import by_device_name
from lejepa_fast.train.runtime.world import World

_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextmanager
def settings_that_help(cfg: Config, world: World, strategy: Strategy, images: int) -> Iterator[None]:
    """RunError for an allocation inside that the GPU, or the machine, has no room for.

    `strategy` is what the run's own means; `images` are those of an epoch.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_ALLOCATOR not in str(error):
            raise
        raise RunError(describe(cfg, world, strategy, images)) from error


def describe(cfg: Config, world: World, strategy: Strategy, images: int) -> str:
    """What ran out, and the settings that need less, the cheapest first."""
    share = cfg.data.batch_size // world.size
    ways = []
    mode = cfg.parallel.activation_checkpointing
    if mode != "full":
        better = "full" if mode == "selective" else "selective or full"
        ways.append(f"--parallel.activation-checkpointing {better} (now {mode})")
    if cfg.parallel.keep_gathered:
        ways.append("no --parallel.keep-gathered")
    if strategy != "fsdp" and world.size > 1:
        ways.append(f"--parallel.strategy fsdp (now {strategy})")
    if cfg.parallel.replicate > 1:
        ways.append(f"fewer groups than --parallel.replicate {cfg.parallel.replicate}")
    if cfg.average.kind != "none":
        ways.append(f"no --average {cfg.average.kind}")
    ways.append(f"a smaller --batch-size (now {cfg.data.batch_size}, {share} images per process)")
    ways.append("more processes" + ("" if strategy == "fsdp" else " with --parallel.strategy fsdp"))
    return f"{_what(world)}; what helps: {', '.join(ways)}; what fits: {_plan(cfg, world, images)}"


def _plan(cfg: Config, world: World, images: int) -> str:
    """The command that plans this run, and shows the numbers of GPUs that it would fit on."""
    from lejepa_fast.train.plan import command_of, options_of

    on_gpu = world.device.type == "cuda"
    known = by_device_name(torch.cuda.get_device_name(world.device)) if on_gpu else None
    bf16 = compute_dtype(cfg, world.device) is not None
    gpu = known and known.name
    return command_of(options_of(cfg, gpus=world.size, gpu=gpu, bf16=bf16, images=images))


def _what(world: World) -> str:
    if world.device.type != "cuda":
        return "out of memory"
    held = torch.cuda.max_memory_allocated(world.device) / 2**30
    total = torch.cuda.get_device_properties(world.device).total_memory / 2**30
    return f"out of GPU memory (up to {held:.1f} of {total:.1f} GiB in tensors)"
