"""What a training run needs: memory, traffic and time for any number of GPUs."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.model.flops import count_flops
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.parallel.parallelize import choose_strategy
from lejepa_fast.train.planning.memory import plan_memory
from lejepa_fast.train.planning.options import PlanOptions
from lejepa_fast.train.runtime.gpu_specs import GIB, by_option

GPUS_OF_A_MACHINE = 8
_STRATEGIES = {"none": "no wrapper", "ddp": "DDP", "fsdp": "FSDP2"}


@dataclass(frozen=True)
class Row:
    """One number of GPUs; `images` and bytes (`peak`, `sent`) are per GPU and step."""

    gpus: int
    images: int
    peak: int
    sent: float
    compute_seconds: float
    network_seconds: float
    fits: bool

    @property
    def step_seconds(self) -> float:
        return max(self.compute_seconds, self.network_seconds)  # FSDP2 and DDP send while they compute


class Plan:
    """The estimate for one set of options; UsageError for options that cannot work."""

    def __init__(self, options: PlanOptions):
        self.options = options
        self.gpu = by_option(options.gpu)
        self.batch = options.data.batch_size
        config.validate(options, options.gpus)
        if options.images < self.batch:
            raise UsageError(f"images: expected at least one batch of {self.batch}, got {options.images}")
        self.steps = config.total_steps(options, options.images // self.batch)
        model = build_model(options, meta=True)
        self.part_sizes = {
            name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
        }
        self.parameters = sum(self.part_sizes.values())
        alone = options.gpus == 1 and options.parallel.strategy in ("auto", "none")
        ranks = None if alone else options.gpus
        self.strategy = choose_strategy(options.parallel, self.parameters, ranks=ranks)
        self.flops = count_flops(options, model)
        parallel = dataclasses.replace(options.parallel, strategy=self.strategy)
        precision = "bf16" if options.precision == "auto" else options.precision
        self.cfg = dataclasses.replace(options, parallel=parallel, precision=precision, device="cpu")
        shards, _ = self.layout(options.gpus)
        self.memory = plan_memory(self.cfg, shards=shards, images=self.batch // options.gpus)

    def layout(self, gpus: int) -> tuple[int, int]:
        """Return the shards of one copy of the model, and the copies."""
        copies = self.cfg.parallel.replicate
        return (gpus // copies, copies) if self.strategy == "fsdp" else (1, gpus)

    def row(self, gpus: int) -> Row:
        """Return the estimate for the same global batch on this many GPUs, which must divide it."""
        (shards, copies), images = self.layout(gpus), self.batch // gpus
        peak = self.memory.peak(shards, images)
        within, between = self.memory.traced.traffic.sent(shards, copies)
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
        most = 1 if self.strategy == "none" else self.batch // 2
        return (gpus for gpus in range(groups, most + 1, groups) if self.batch % gpus == 0)

    def smallest(self) -> Row | None:
        return next((row for row in map(self.row, self.possible()) if row.fits), None)

    def report(self) -> str:
        """Return the text that train/plan.py prints."""
        cfg, flops, asked = self.cfg, self.flops, self.row(self.options.gpus)
        parallel, smallest = cfg.parallel, self.smallest()
        average = f", {cfg.average.kind} of the weights" if cfg.average.kind != "none" else ""
        average += " for the center" if cfg.loss.center_from == "average" else ""
        groups = f" in {parallel.replicate} groups" if parallel.replicate > 1 else ""
        state = min(asked.peak, self.memory.traced.state)
        inside, outside = self.bandwidths(asked.gpus)
        days = self.steps * asked.step_seconds / 86400
        lines = [
            f"{cfg.model.name} on {asked.gpus} x {self.gpu.name}{groups}, {_STRATEGIES[self.strategy]}, "
            f"{cfg.precision}, activation checkpointing {parallel.activation_checkpointing}{average}, "
            f"{self.batch:,} images a step",
            "parameters        "
            + ", ".join(f"{size / 1e6:,.1f} M {name}" for name, size in self.part_sizes.items() if size),
            f"GFLOP per image   {flops.per_image / 1e9:,.1f} forward and backward: {flops.summary()}",
            f"memory per GPU    {_gib(asked.peak)} GiB at the peak, "
            f"{asked.peak / (self.gpu.memory_gib * GIB):.0%} of {self.gpu.memory_gib:g}: "
            f"{'fits' if asked.fits else 'DOES NOT FIT'} ({self.options.reserve:.0%} kept free); "
            f"weights and moments {_gib(state)}, activations, gradients and gathered weights "
            f"{_gib(asked.peak - state)}",
            f"network           {asked.sent / 1e9:,.1f} GB sent by each GPU a step: "
            f"{1e3 * asked.network_seconds:,.0f} ms at {inside:g} GB/s within a group, {outside:g} beyond",
            f"compute           {1e3 * asked.compute_seconds:,.0f} ms a step at {self.options.mfu:.0%} MFU; "
            f"network / compute {asked.network_seconds / asked.compute_seconds:.2f}",
            f"budget            {self.steps:,} steps, {days:,.2f} days, {24 * days * asked.gpus:,.0f} GPU-h",
            f"\n{self._table(smallest)}\n",
            f"smallest number of GPUs that fits: {smallest.gpus:,} ({_gib(smallest.peak)} GiB each)"
            if smallest
            else "this batch does not fit; try a smaller --batch-size, "
            "--parallel.activation-checkpointing full, or more --gpus with --parallel.strategy fsdp",
        ]
        if cfg.objective != "ijepa" and (warning := config.small_batch_warning(self.batch)):
            lines.append(f"warning: {warning}")
        return "\n".join(lines)

    def _table(self, smallest: Row | None) -> str:
        """Powers of two around the number asked for, and the smallest that fits."""
        asked = self.options.gpus
        near = {n for n in self.possible() if n & (n - 1) == 0 and asked / 64 <= n <= 8 * asked}
        lines = ["GPUs  images/GPU  GiB/GPU  fits  GB sent  network ms  compute ms  images/s    days"]
        for row in map(self.row, sorted(near | {asked} | ({smallest.gpus} if smallest else set()))):
            lines.append(
                f"{f'{row.gpus:,}' + '*' * (row.gpus == asked):<5} {row.images:10,} {_gib(row.peak):>8} "
                f"{'yes' if row.fits else 'no':>5} {row.sent / 1e9:8,.1f} {1e3 * row.network_seconds:11,.0f} "
                f"{1e3 * row.compute_seconds:11,.0f} {self.batch / row.step_seconds:9,.0f} "
                f"{self.steps * row.step_seconds / 86400:7,.2f}"
            )
        return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size < 10 * GIB else f"{size / GIB:,.1f}"
