"""What a run will need, before there is a GPU to run it: python train/plan.py --model vit_gigantic --gpus 256

Parameters, operations per image by view, memory per GPU (the trainer's step under FSDP2, DDP or no wrapper on
fake tensors, see plan_memory.py), bytes over the network against compute time, steps and days of an epoch
budget, the same for other numbers of GPUs, and the smallest number that fits. Exit code 2 for what cannot
work: an unknown model or GPU, a batch that does not divide.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.config import (
    AverageConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
)
from lejepa_fast.train.model.flops import Flops, count_flops
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.parallel.parallelize import Strategy, choose_strategy
from lejepa_fast.train.planning.memory import MemoryPlan, plan_memory
from lejepa_fast.train.runtime.command import parse_options, run_command
from lejepa_fast.train.runtime.gpu_specs import GIB, Accelerator, by_option

GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class PlanOptions:
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="vit_large"))
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
    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """As --parallel.strategy of pretrain.py: auto plans one GPU without a wrapper, several under FSDP2 from
    half a billion parameters and under DDP below."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again; as --parallel.activation-checkpointing of pretrain.py."""
    replicate: int = 1
    """Groups of GPUs that each hold the whole model under FSDP2 (HSDP)."""
    keep_gathered: bool = False
    """Under FSDP2 parameters are sent once a step and kept whole, as by --parallel.keep-gathered."""
    average: Literal["none", "ema", "swa"] = "none"
    """Averaged weights, kept beside those in training; as --average of pretrain.py."""
    precision: Literal["bf16", "fp32"] = "bf16"
    num_slices: int = 1024
    """As --loss.num-slices of pretrain.py."""
    epochs: float = 100
    images: int = 1_281_167
    """Images of an epoch; ImageNet-1k's training split if not given."""
    mfu: float = 0.4
    """Share of the GPUs' dense peak, bf16 or float32, that the run will reach: an assumption, until it is
    measured."""
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
        """FSDP2 and DDP send while they compute: the longer of the two counts."""
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
        self.strategy(options.gpus)  # UsageError for one that cannot be had
        self.flops: Flops = count_flops(self.cfg, model)
        self._memory: dict[Strategy, MemoryPlan] = {}

    def strategy(self, gpus: int) -> Strategy:
        """How this many GPUs share the model. One GPU stands in the table of several under their strategy."""
        wanted, asked = self.cfg.parallel, self.options.gpus
        alone = gpus == asked == 1 and wanted.strategy in ("auto", "none") and not wanted.keep_gathered
        return choose_strategy(wanted, self.parameters, ranks=None if alone else gpus)

    def layout(self, gpus: int) -> tuple[int, int]:
        """Shards of one copy of the model, and copies."""
        strategy, copies = self.strategy(gpus), self.options.replicate
        return (gpus // copies, copies) if strategy == "fsdp" else (1, gpus)

    def memory(self, gpus: int) -> MemoryPlan:
        """The step on this many GPUs, traced once for each strategy on the GPUs that were asked for."""
        strategy, asked = self.strategy(gpus), self.options.gpus
        if strategy not in self._memory:
            parallel = dataclasses.replace(self.cfg.parallel, strategy=strategy)
            cfg = dataclasses.replace(self.cfg, parallel=parallel)
            shards = self.layout(gpus if asked == 1 else asked)[0]
            self._memory[strategy] = plan_memory(cfg, shards=shards, images=self.batch // asked)
        return self._memory[strategy]

    def row(self, gpus: int) -> Row:
        """The same global batch on this many GPUs; they divide it, and `replicate` divides them."""
        options, device = self.options, self.device
        (shards, copies), images, memory = self.layout(gpus), self.batch // gpus, self.memory(gpus)
        peak = memory.peak(shards, images)
        within, between = memory.traffic.sent(shards, copies)
        inside, outside = self.bandwidths(gpus)
        compute = self.seconds_per_image() / options.mfu
        return Row(
            gpus=gpus,
            images=images,
            peak=peak,
            sent=within + between,
            compute_seconds=compute * images,
            network_seconds=(within / inside + between / outside) / 1e9,
            fits=peak <= (1 - options.reserve) * device.memory_gib * GIB,
        )

    def seconds_per_image(self) -> float:
        """At the GPU's peak. In float32 it has one for convolutions and one for matrix products."""
        flops, device = self.flops, self.device
        if self.options.precision == "bf16":
            return flops.per_image / (device.tflops * 1e12)
        products = flops.per_image - flops.convolutions
        return products / (device.fp32_tflops * 1e12) + flops.convolutions / (
            device.convolution_tflops * 1e12
        )

    def bandwidths(self, gpus: int) -> tuple[float, float]:
        """GB/s that one of this many GPUs sends within its group, and between groups (HSDP) or GPUs (DDP).

        A group whose size divides a machine's GPUs does not reach beyond it, as torchrun numbers ranks.
        """
        if self.options.bandwidth is not None:
            return self.options.bandwidth, self.options.bandwidth
        link, network = self.device.link_gb_s, self.device.network_gb_s
        if gpus <= GPUS_OF_A_MACHINE:
            return link, link
        return (network if GPUS_OF_A_MACHINE % (gpus // self.options.replicate) else link), network

    def possible(self) -> Iterator[int]:
        """Numbers of GPUs that the batch, the groups and the strategy allow, smallest first."""
        if self.options.strategy == "none":
            yield 1
            return
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
        model=options.model,
        loss=LossConfig(num_slices=options.num_slices, impl="torch"),
        parallel=ParallelConfig(
            strategy=options.strategy,
            replicate=options.replicate,
            activation_checkpointing=options.activation_checkpointing,
            keep_gathered=options.keep_gathered,
        ),
        average=AverageConfig(kind=options.average),
        precision=options.precision,
        device="cpu",
        compile="off",
    )


def options_of(cfg: Config, *, gpus: int, gpu: str | None, bf16: bool, images: int) -> PlanOptions:
    """The plan of a run, the inverse of `run_config`. `gpu`: as `--gpu` has it; None: unknown. `images` make
    an epoch."""
    crops, parallel, batch = cfg.crops, cfg.parallel, cfg.data.batch_size
    epochs: float = cfg.epochs
    if cfg.max_steps is not None:
        epochs = float(f"{cfg.max_steps / max(1, images // batch):.3g}")
    return PlanOptions(
        model=cfg.model,
        gpus=gpus,
        gpu=gpu or PlanOptions.gpu,
        batch=batch,
        global_crops=crops.global_crops,
        global_size=crops.global_size,
        local_crops=crops.local_crops,
        local_size=crops.local_size,
        strategy=parallel.strategy,
        activation_checkpointing=parallel.activation_checkpointing,
        replicate=parallel.replicate,
        keep_gathered=parallel.keep_gathered,
        average=cfg.average.kind,
        precision="bf16" if bf16 else "fp32",
        num_slices=cfg.loss.num_slices,
        epochs=epochs,
        images=images,
    )


def command_of(options: PlanOptions) -> str:
    """The line for a shell that asks for this plan: model, GPUs, batch, and what is not the default."""
    line = ["--model", options.model.name, "--gpus", str(options.gpus), "--batch", str(options.batch)]
    said = {"name", "gpus", "batch"}

    def add(chosen: Any, defaults: Any, prefix: str) -> None:
        for each in dataclasses.fields(chosen):
            value, default = getattr(chosen, each.name), getattr(defaults, each.name)
            if dataclasses.is_dataclass(value):
                add(value, default, f"{prefix}{each.name}.")
            elif each.name not in said and value != default:
                option = f"{prefix}{each.name}".replace("_", "-")
                if isinstance(value, bool):
                    line.append(f"--{option}" if value else f"--no-{option}")
                else:
                    line.extend([f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)])

    add(options, PlanOptions(), "")
    return shlex.join(["python", "train/plan.py", *line])


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
    from lejepa_fast.train.planning.plan_report import report

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
