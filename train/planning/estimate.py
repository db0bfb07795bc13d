"""What a training run needs: memory, traffic and time for any number of GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.config import Config
from lejepa_fast.train.model.flops import count_flops
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.parallel.parallelize import Strategy, choose_strategy
from lejepa_fast.train.planning.memory import MemoryPlan, plan_memory
from lejepa_fast.train.planning.options import PlanOptions
from lejepa_fast.train.runtime.gpu_specs import GIB, by_option

GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Row:
    """One number of GPUs."""

    gpus: int
    images: int
    """Images per step and GPU."""
    peak: int
    """Bytes per GPU."""
    sent: float
    """Bytes that one GPU sends per step."""
    compute_seconds: float
    network_seconds: float
    fits: bool

    @property
    def step_seconds(self) -> float:
        """FSDP2 and DDP send while they compute, so the longer of the two counts."""
        return max(self.compute_seconds, self.network_seconds)


class Plan:
    """The estimate for one set of options; UsageError for options that cannot work."""

    def __init__(self, options: PlanOptions):
        self.options = options
        self.gpu = by_option(options.gpu)
        self.batch = options.data.batch_size
        config.validate(options, options.gpus)
        if options.images < self.batch:
            raise UsageError(
                f"images: expected at least one batch of {self.batch}, got {options.images}; "
                "use a smaller --batch-size"
            )
        self.steps = config.total_steps(options, options.images // self.batch)
        precision = "fp32" if options.precision == "fp32" else "bf16"
        self.cfg: Config = dataclasses.replace(options, precision=precision, device="cpu")
        model = build_model(self.cfg, meta=True)
        self.encoder_parameters = sum(p.numel() for p in model.encoder.parameters())
        self.parameters = sum(p.numel() for p in model.parameters())
        self.strategy(options.gpus)  # UsageError before the long work
        self.flops = count_flops(self.cfg, model)
        self._memory: dict[Strategy, MemoryPlan] = {}

    def strategy(self, gpus: int) -> Strategy:
        """Return how this many GPUs share the model; one GPU in the table of several shares it like those."""
        parallel = self.cfg.parallel
        alone = gpus == self.options.gpus == 1 and parallel.strategy in ("auto", "none")
        return choose_strategy(parallel, self.parameters, ranks=None if alone else gpus)

    def layout(self, gpus: int) -> tuple[int, int]:
        """Return the shards of one copy of the model, and the copies."""
        copies = self.cfg.parallel.replicate
        return (gpus // copies, copies) if self.strategy(gpus) == "fsdp" else (1, gpus)

    def memory(self, gpus: int) -> MemoryPlan:
        """Return the memory of a step, traced once per strategy, with the images per GPU of `--gpus`."""
        strategy, asked = self.strategy(gpus), self.options.gpus
        if strategy not in self._memory:
            parallel = dataclasses.replace(self.cfg.parallel, strategy=strategy)
            shards = self.layout(gpus if asked == 1 else asked)[0]
            cfg = dataclasses.replace(self.cfg, parallel=parallel)
            self._memory[strategy] = plan_memory(cfg, shards=shards, images=self.batch // asked)
        return self._memory[strategy]

    def row(self, gpus: int) -> Row:
        """Return the estimate of the same global batch on this many GPUs, which must divide it."""
        (shards, copies), images, memory = self.layout(gpus), self.batch // gpus, self.memory(gpus)
        peak = memory.peak(shards, images)
        within, between = memory.traced.traffic.sent(shards, copies)
        inside, outside = self.bandwidths(gpus)
        return Row(
            gpus=gpus,
            images=images,
            peak=peak,
            sent=within + between,
            compute_seconds=images * self.flops.per_image / (self.gpu.tflops * 1e12 * self.options.mfu),
            network_seconds=(within / inside + between / outside) / 1e9,
            fits=peak <= (1 - self.options.reserve) * self.gpu.memory_gib * GIB,
        )

    def bandwidths(self, gpus: int) -> tuple[float, float]:
        """Return the GB/s that one GPU sends within its group, and between groups (HSDP) or GPUs (DDP).

        A group whose size divides a machine's GPUs stays inside it, as torchrun numbers ranks.
        """
        if self.options.bandwidth is not None:
            return self.options.bandwidth, self.options.bandwidth
        link, network = self.gpu.link_gb_s, self.gpu.network_gb_s
        if gpus <= GPUS_OF_A_MACHINE:
            return link, link
        return (network if GPUS_OF_A_MACHINE % (gpus // self.cfg.parallel.replicate) else link), network

    def possible(self) -> Iterator[int]:
        """Yield the numbers of GPUs that batch, groups and strategy allow, smallest first."""
        groups = self.cfg.parallel.replicate
        most = 1 if self.cfg.parallel.strategy == "none" else self.batch // 2
        return (gpus for gpus in range(groups, most + 1, groups) if self.batch % gpus == 0)

    def smallest(self) -> Row | None:
        """Return the smallest number of GPUs that fits."""
        return next((row for row in map(self.row, self.possible()) if row.fits), None)

    def table(self) -> list[Row]:
        """Return powers of two around the number asked for, and the smallest that fits."""
        asked, smallest = self.options.gpus, self.smallest()
        near = {n for n in self.possible() if n & (n - 1) == 0 and asked / 64 <= n <= 8 * asked}
        return [self.row(n) for n in sorted(near | {asked} | ({smallest.gpus} if smallest else set()))]
