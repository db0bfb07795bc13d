"""Options of train/plan.py: those of a training run, and what it is planned for."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from lejepa_fast.train.config.settings import AtLeast1, Config, Positive

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
