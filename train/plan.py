"""What a run will need, before there is a GPU to run it: python train/plan.py --model vit_gigantic --gpus 256

Parameters, operations per image by view, memory per GPU (FSDP2 on fake tensors, see plan_memory.py), bytes
over the network against compute time, steps and days of an epoch budget, the same for other numbers of GPUs,
and the smallest number that fits. Exit code 2 for what cannot work: an unknown model or GPU, a batch that
does not divide.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.accelerators import GIB, Accelerator, by_option
from lejepa_fast.train.command_line import parse_options, run_command
from lejepa_fast.train.config import Config, DataConfig, LossConfig, ModelConfig, ParallelConfig
from lejepa_fast.train.flops import Flops, count_flops
from lejepa_fast.train.model import build_model
from lejepa_fast.train.plan_memory import MemoryPlan, plan_memory

GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class PlanOptions:
    model: str = "vit_large"
    """Any timm model, or vit_tiny|small|base|large|huge|giant|gigantic (patch 14)."""
    gpus: int = 8
    """GPUs of the run, over all machines."""
    gpu: str = "h200"
    """Their kind: a100, h100, h200, b200, l40s, mi300x, ...; an unknown name lists all."""
    batch: Annotated[int | None, tyro.conf.arg(aliases=["--batch-size"])] = None
    """Images per step over all GPUs; None: 512, or --batch-per-gpu times --gpus."""
    batch_per_gpu: int | None = None
    """Images per step and GPU, in place of --batch."""
    global_crops: int = 2
    global_size: int = 224
    local_crops: int = 6
    local_size: int = 98
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again; as --parallel.activation-checkpointing of pretrain.py."""
    replicate: int = 1
    """Groups of GPUs that each hold the whole model (HSDP)."""
    keep_gathered: bool = False
    """Parameters are sent once a step and kept whole; as --parallel.keep-gathered of pretrain.py."""
    precision: Literal["bf16", "fp32"] = "bf16"
    epochs: float = 100
    images: int = 1_281_167
    """Images of an epoch; ImageNet-1k's training split if not given."""
    mfu: float = 0.4
    """Share of the GPUs' dense bf16 peak that the run will reach: an assumption, until it is measured."""
    bandwidth: float | None = None
    """GB/s that one GPU sends; None: of the link inside a machine of 8 GPUs, of the network beyond."""
    reserve: float = 0.1
    """Share of a GPU's memory that the plan leaves free: CUDA's context, NCCL's buffers, fragmentation."""


@dataclass(frozen=True)
class Row:
    """One number of GPUs."""

    gpus: int
    images: int
    peak: int
    """Bytes per GPU."""
    sent: float
    """Bytes that one GPU sends in a step."""
    compute_seconds: float
    network_seconds: float
    fits: bool

    @property
    def step_seconds(self) -> float:
        """FSDP2 sends while it computes: the longer of the two counts."""
        return max(self.compute_seconds, self.network_seconds)


class Plan:
    """Everything that `report` prints. Raises UsageError for options that cannot work."""

    def __init__(self, options: PlanOptions):
        self.options = options
        self.device: Accelerator = by_option(options.gpu)
        self.batch = _global_batch(options)
        self.cfg = run_config(options, self.batch)
        self.warning = _validate(options, self.batch, self.cfg)
        model = build_model(self.cfg, meta=True)
        self.encoder_parameters = sum(p.numel() for p in model.encoder.parameters())
        self.parameters = sum(p.numel() for p in model.parameters())
        self.flops: Flops = count_flops(self.cfg, model)
        shards = options.gpus // options.replicate
        self.memory: MemoryPlan = plan_memory(self.cfg, shards=shards, images=self.batch // options.gpus)

    def row(self, gpus: int) -> Row:
        """The same global batch on this many GPUs; they divide it, and `replicate` divides them."""
        options, device = self.options, self.device
        shards, images = gpus // options.replicate, self.batch // gpus
        peak = self.memory.peak(shards, images)
        within, between = self.memory.traffic.sent(shards, options.replicate)
        inside, outside = self.bandwidths(gpus)
        return Row(
            gpus=gpus,
            images=images,
            peak=peak,
            sent=within + between,
            compute_seconds=self.flops.per_image * images / (device.tflops * 1e12 * options.mfu),
            network_seconds=(within / inside + between / outside) / 1e9,
            fits=peak <= (1 - options.reserve) * device.memory_gib * GIB,
        )

    def bandwidths(self, gpus: int) -> tuple[float, float]:
        """GB/s that one of this many GPUs sends within its group, and between the groups (HSDP).

        A group whose size divides a machine's GPUs does not reach beyond it, as torchrun numbers ranks.
        """
        if self.options.bandwidth is not None:
            return self.options.bandwidth, self.options.bandwidth
        link, network = self.device.link_gb_s, self.device.network_gb_s
        if gpus <= GPUS_OF_A_MACHINE:
            return link, link
        return (network if GPUS_OF_A_MACHINE % (gpus // self.options.replicate) else link), network

    def possible(self) -> Iterator[int]:
        """Numbers of GPUs that the batch and the groups allow, smallest first."""
        for gpus in range(self.options.replicate, self.batch // 2 + 1, self.options.replicate):
            if self.batch % gpus == 0:
                yield gpus

    def smallest(self) -> Row | None:
        return next((row for row in map(self.row, self.possible()) if row.fits), None)

    def table(self) -> list[Row]:
        """Powers of two around the number asked for, with the smallest that fits."""
        asked, smallest = self.options.gpus, self.smallest()
        near = {
            gpus for gpus in self.possible() if gpus & (gpus - 1) == 0 and asked / 64 <= gpus <= 8 * asked
        }
        return [self.row(gpus) for gpus in sorted(near | {asked} | ({smallest.gpus} if smallest else set()))]


def run_config(options: PlanOptions, batch: int) -> Config:
    """The configuration of the trainer that these options stand for."""
    return Config(
        data=DataConfig(path="planned", batch_size=batch),
        crops=MultiCropRecipe(
            global_crops=options.global_crops,
            global_size=options.global_size,
            local_crops=options.local_crops,
            local_size=options.local_size,
        ),
        model=ModelConfig(name=options.model),
        loss=LossConfig(impl="torch"),
        parallel=ParallelConfig(
            strategy="fsdp",
            replicate=options.replicate,
            activation_checkpointing=options.activation_checkpointing,
            keep_gathered=options.keep_gathered,
        ),
        precision=options.precision,
        device="cpu",
        compile="off",
    )


def _global_batch(options: PlanOptions) -> int:
    for name in ("gpus", "batch", "batch_per_gpu", "replicate", "images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")
    if options.batch is not None and options.batch_per_gpu is not None:
        raise UsageError("batch and batch_per_gpu both set the batch; give one of them")
    if options.batch_per_gpu is not None:
        return options.batch_per_gpu * options.gpus
    return 512 if options.batch is None else options.batch


def _validate(options: PlanOptions, batch: int, cfg: Config) -> str | None:
    """UsageError for what cannot work; else a warning where the batch is small for SIGReg."""
    if options.gpus % options.replicate:
        raise UsageError(
            f"replicate: {options.gpus} GPUs cannot be split evenly into {options.replicate} groups; use a "
            "divisor of their number"
        )
    config.validate(cfg, options.gpus)
    if options.images < batch:
        raise UsageError(
            f"images: expected at least one batch of {batch}, got {options.images}; use a smaller --batch"
        )
    shares = {"mfu": options.mfu, "reserve": options.reserve}
    for name, value in shares.items():
        if not 0 < value < 1:
            raise UsageError(f"{name}: expected a share between 0 and 1, got {value}")
    for name, number in {"epochs": options.epochs, "bandwidth": options.bandwidth}.items():
        if number is not None and not 0 < number < float("inf"):
            raise UsageError(f"{name}: expected a number above 0, got {number}")
    return config.small_batch_warning(batch)


def main(argv: Sequence[str] | None = None) -> int:
    from lejepa_fast.train.plan_report import report

    def work() -> None:
        options = parse_options(
            PlanOptions,
            sys.argv[1:] if argv is None else argv,
            description="What a training run will need, worked out without a GPU.",
        )
        print(report(Plan(options)))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
