"""The text that train/plan.py prints."""

from __future__ import annotations

from lejepa_fast.train.config import small_batch_warning
from lejepa_fast.train.planning.estimate import Plan, Row
from lejepa_fast.train.runtime.gpu_specs import GIB

_STRATEGIES = {"none": "no wrapper", "ddp": "DDP", "fsdp": "FSDP2"}
_HEADER = "GPUs|images/GPU|GiB/GPU|fits|GB sent|network ms|compute ms|images/s|days"


def report(plan: Plan) -> str:
    """Return parameters, operations, memory, network, budget, a table by GPUs, and the smallest that fits."""
    asked, smallest = plan.row(plan.options.gpus), plan.smallest()
    lines = [
        _head(plan),
        "",
        f"parameters        {plan.encoder_parameters / 1e6:,.1f} M encoder, "
        f"{(plan.parameters - plan.encoder_parameters) / 1e6:,.1f} M projector",
        f"GFLOP per image   {_flops(plan)}",
        "",
        f"memory per GPU    {_memory(plan, asked)}",
        *_network(plan, asked),
        f"budget            {plan.steps:,} steps, {_days(plan, asked):,.2f} days, "
        f"{_days(plan, asked) * asked.gpus * 24:,.0f} GPU hours",
        "",
        *_table(plan),
        "",
        _no_fit(plan)
        if smallest is None
        else f"smallest number of GPUs that fits this batch: {smallest.gpus:,} "
        f"({_gib(smallest.peak)} GiB each, {_STRATEGIES[plan.strategy(smallest.gpus)]})",
    ]
    if warning := small_batch_warning(plan.batch):
        lines.append(f"warning: {warning}")
    return "\n".join(lines)


def _head(plan: Plan) -> str:
    cfg, parallel = plan.cfg, plan.cfg.parallel
    groups = f" in {parallel.replicate} groups" if parallel.replicate > 1 else ""
    kept = ", gathered once a step" if parallel.keep_gathered else ""
    average = f", {cfg.average.kind} of the weights" if cfg.average.kind != "none" else ""
    return (
        f"{cfg.model.name} on {plan.options.gpus} x {plan.gpu.name}{groups}, "
        f"{_STRATEGIES[plan.strategy(plan.options.gpus)]}{kept}, {cfg.precision}, activation checkpointing "
        f"{parallel.activation_checkpointing}{average}, {plan.batch:,} images a step"
    )


def _flops(plan: Plan) -> str:
    flops, crops = plan.flops, plan.cfg.crops
    views = f"global {crops.global_size} px {crops.global_crops} x {flops.global_view / 1e9:,.1f}"
    if crops.local_crops:
        views += f", local {crops.local_size} px {crops.local_crops} x {flops.local_view / 1e9:,.1f}"
    return (
        f"{flops.per_image / 1e9:,.1f}: {views}, projector {flops.projector / 1e9:,.1f}, "
        f"loss {flops.loss / 1e9:,.2f} (forward and backward)"
    )


def _memory(plan: Plan, asked: Row) -> str:
    share = asked.peak / (plan.gpu.memory_gib * GIB)
    verdict = "fits" if asked.fits else "DOES NOT FIT"
    state = min(asked.peak, plan.memory(asked.gpus).traced.state)
    return (
        f"{_gib(asked.peak)} GiB at the peak, {share:.0%} of {plan.gpu.memory_gib:g}: {verdict} "
        f"({plan.options.reserve:.0%} kept free); weights and moments {_gib(state)}, activations, gradients "
        f"and gathered parameters {_gib(asked.peak - state)}"
    )


def _network(plan: Plan, asked: Row) -> list[str]:
    if asked.gpus == 1:
        return ["network           nothing to send"]
    ratio = asked.network_seconds / asked.compute_seconds
    within, between = plan.bandwidths(asked.gpus)
    shards, copies = plan.layout(asked.gpus)
    rate = f"{between if shards == 1 else within:g} GB/s"
    if shards > 1 and copies > 1 and between != within:
        rate += f" within a group, {between:g} between groups"
    verdict = "hidden by computation" if ratio < 1 else "the network limits the speed"
    return [
        f"network           {asked.sent / 1e9:,.1f} GB sent by each GPU a step: "
        f"{1e3 * asked.network_seconds:,.0f} ms at {rate}",
        f"compute           {1e3 * asked.compute_seconds:,.0f} ms a step at {plan.options.mfu:.0%} MFU; "
        f"network / compute {ratio:.2f}: {verdict}",
    ]


def _table(plan: Plan) -> list[str]:
    lines = [_HEADER.split("|")]
    for row in plan.table():
        cells = [
            f"{row.gpus:,}" + ("*" if row.gpus == plan.options.gpus else ""),
            f"{row.images:,}",
            _gib(row.peak),
            "yes" if row.fits else "no",
            f"{row.sent / 1e9:,.1f}",
            f"{1e3 * row.network_seconds:,.0f}",
            f"{1e3 * row.compute_seconds:,.0f}",
            f"{plan.batch / row.step_seconds:,.0f}",
            f"{_days(plan, row):,.2f}",
        ]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _no_fit(plan: Plan) -> str:
    helps = [f"--parallel.activation-checkpointing {mode}" for mode in ("selective", "full")]
    helps = helps[("none", "selective", "full").index(plan.cfg.parallel.activation_checkpointing) :]
    if plan.strategy(max(plan.possible())) != "fsdp":
        helps.append("--parallel.strategy fsdp")
    helps.append("a smaller --batch-size")
    return f"no number of GPUs that divides this batch fits; try {', '.join(helps)}"


def _days(plan: Plan, row: Row) -> float:
    return plan.steps * row.step_seconds / 86400


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size < 10 * GIB else f"{size / GIB:,.1f}"
