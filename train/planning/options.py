"""Options of train/plan.py: those of a training run, and what it is planned for."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt, Lt

from lejepa_fast.train.config import AtLeast1, AverageConfig, Config, DataConfig, LossConfig, Positive

OpenShare = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True)
class PlanOptions(Config):
    gpus: AtLeast1 = 8
    """GPUs of the run, over all machines."""
    gpu: str = "h200"
    """Their kind: a100, h100, h200, b200, l40s, mi300x, ...; an unknown name lists all."""
    images: AtLeast1 = 1_281_167
    """Images of an epoch; the default is ImageNet-1k's training split."""
    mfu: OpenShare = 0.4
    """Share of the GPUs' dense bf16 peak that the run will reach: an assumption until it is measured."""
    bandwidth: Positive | None = None
    """GB/s that one GPU sends; None: of the link inside a machine of 8 GPUs, of the network beyond."""
    reserve: OpenShare = 0.1
    """Share of a GPU's memory to keep free: CUDA's context, NCCL's buffers, fragmentation."""


def command_of(cfg: Config, *, gpus: int, gpu: str | None, bf16: bool, images: int) -> str:
    """Return the shell command that plans a run.

    Args:
        cfg: its configuration.
        gpus: number of processes.
        gpu: their kind as `--gpu` has it; None if unknown.
        bf16: whether it computes in bfloat16.
        images: images of an epoch.
    """
    options = PlanOptions(
        data=DataConfig(batch_size=cfg.data.batch_size),
        crops=cfg.crops,
        model=cfg.model,
        loss=LossConfig(num_slices=cfg.loss.num_slices),
        parallel=cfg.parallel,
        average=AverageConfig(kind=cfg.average.kind),
        epochs=cfg.epochs,
        max_steps=cfg.max_steps,
        precision="auto" if bf16 else "fp32",
        gpus=gpus,
        gpu=gpu or PlanOptions.gpu,
        images=images,
    )
    return shlex.join(["python", "train/plan.py", *_differences(options, PlanOptions(), "--")])


def _differences(chosen: Any, default: Any, prefix: str) -> list[str]:
    """Return the options for the fields of a dataclass that differ from the default."""
    words: list[str] = []
    for each in dataclasses.fields(chosen):
        value, usual = getattr(chosen, each.name), getattr(default, each.name)
        name = each.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            words += _differences(value, usual, f"{prefix}{name}.")
        elif value != usual and isinstance(value, bool):
            words.append(prefix + ("" if value else "no-") + name)
        elif value != usual:
            words += [prefix + name, *map(str, value if isinstance(value, tuple) else [value])]
    return words
