"""What train/plan.py prints, as text, and its figure of memory against the number of GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lejepa_fast.train.runtime.gpu_specs import GIB

if TYPE_CHECKING:
    from lejepa_fast.train.parallel.parallelize import Strategy
    from lejepa_fast.train.plan import Plan, Row

_STRATEGIES: Mapping[Strategy, str] = {"none": "no wrapper", "ddp": "DDP", "fsdp": "FSDP2"}


def report(plan: Plan) -> str:
    asked = plan.row(plan.options.gpus)
    lines = [_head(plan), "", *_model(plan), "", *_memory(plan, asked), "", *_network(plan, asked), ""]
    lines += [*_budget(plan, asked), "", *_table(plan), "", _smallest(plan)]
    if plan.warning:
        lines.append(f"warning: {plan.warning}")
    return "\n".join(lines)


def _head(plan: Plan) -> str:
    options = plan.options
    groups = f" in {options.replicate} groups" if options.replicate > 1 else ""
    said = [
        f"{options.model.name} on {options.gpus} x {plan.device.name}{groups}",
        _STRATEGIES[plan.strategy(options.gpus)]
        + (", gathered once a step" if options.keep_gathered else ""),
        options.precision,
        f"activation checkpointing {options.activation_checkpointing}",
    ]
    if options.average != "none":
        said.append(f"{options.average} of the weights")
    return ", ".join([*said, f"{plan.batch:,} images a step"])


def _model(plan: Plan) -> list[str]:
    flops, options = plan.flops, plan.options
    views = [f"global {options.global_size} px {options.global_crops} x {flops.global_view / 1e9:,.1f}"]
    if options.local_crops:
        views.append(f"local {options.local_size} px {options.local_crops} x {flops.local_view / 1e9:,.1f}")
    rest = f"projector {flops.projector / 1e9:,.1f}, loss {flops.loss / 1e9:,.2f}"
    return [
        f"parameters        {plan.encoder_parameters / 1e6:,.1f} M encoder, "
        f"{(plan.parameters - plan.encoder_parameters) / 1e6:,.1f} M projector",
        f"GFLOP per image   {flops.per_image / 1e9:,.1f}: {', '.join(views)}, {rest} (forward and backward)",
    ]


def _memory(plan: Plan, asked: Row) -> list[str]:
    parts = sorted(plan.memory(asked.gpus).traced.at_peak.items(), key=lambda part: -part[1])
    said = ", ".join(f"{name.lower()} {_gib(size)}" for name, size in parts if size >= 0.005 * asked.peak)
    share = asked.peak / (plan.device.memory_gib * GIB)
    verdict = "fits" if asked.fits else "DOES NOT FIT"
    return [
        f"memory per GPU    {_gib(asked.peak)} GiB at the peak, {share:.0%} of {plan.device.memory_gib:g}: "
        f"{verdict} ({plan.options.reserve:.0%} kept free)",
        f"                  {said} (GiB)",
    ]


def _network(plan: Plan, asked: Row) -> list[str]:
    if asked.gpus == 1:
        return ["network           nothing to send"]
    ratio = asked.network_seconds / asked.compute_seconds
    within, between = plan.bandwidths(asked.gpus)
    shards, copies = plan.layout(asked.gpus)
    rate = f"{between if shards == 1 else within:g} GB/s"
    if shards > 1 and copies > 1 and between != within:
        rate += f" within a group, {between:g} between groups"
    verdict = "hidden behind it" if ratio < 1 else "the network sets the pace"
    of = "MFU" if plan.options.precision == "bf16" else "of the float32 peak"
    return [
        f"network           {asked.sent / 1e9:,.1f} GB sent by each GPU a step: "
        f"{1e3 * asked.network_seconds:,.0f} ms at {rate}",
        f"compute           {1e3 * asked.compute_seconds:,.0f} ms a step at {plan.options.mfu:.0%} {of}; "
        f"network / compute {ratio:.2f}: {verdict}",
    ]


def _budget(plan: Plan, asked: Row) -> list[str]:
    options = plan.options
    steps = round(options.epochs * (options.images // plan.batch))
    days = steps * asked.step_seconds / 86400
    return [
        f"budget            {options.epochs:g} epochs of {options.images:,} images: {steps:,} steps, "
        f"{days:,.2f} days, {days * asked.gpus * 24:,.0f} GPU hours",
    ]


def _table(plan: Plan) -> list[str]:
    steps = plan.options.epochs * (plan.options.images // plan.batch)
    rows = [
        [
            f"{row.gpus:,}" + ("*" if row.gpus == plan.options.gpus else ""),
            f"{row.images:,}",
            _gib(row.peak),
            "yes" if row.fits else "no",
            f"{row.sent / 1e9:,.1f}",
            f"{1e3 * row.network_seconds:,.0f}",
            f"{1e3 * row.compute_seconds:,.0f}",
            f"{plan.batch / row.step_seconds:,.0f}",
            f"{steps * row.step_seconds / 86400:,.2f}",
        ]
        for row in plan.table()
    ]
    header = [
        "GPUs",
        "images/GPU",
        "GiB/GPU",
        "fits",
        "GB sent",
        "network ms",
        "compute ms",
        "images/s",
        "days",
    ]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in [header, *rows]
    ]


def _smallest(plan: Plan) -> str:
    found = plan.smallest()
    if found is not None:
        under = _STRATEGIES[plan.strategy(found.gpus)]
        each = f"{_gib(found.peak)} GiB each, {under}"
        return f"smallest number of GPUs that fits this batch: {found.gpus:,} ({each})"
    better = {"none": "selective or full", "selective": "full"}.get(plan.options.activation_checkpointing)
    helps = [f"--activation-checkpointing {better}"] if better else []
    if plan.strategy(max(plan.possible())) != "fsdp":
        helps.append("--strategy fsdp")
    return (
        "no number of GPUs that divides this batch fits; try "
        f"{', '.join(helps)}{', ' if helps else ''}a smaller --batch or fewer crops"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size < 10 * GIB else f"{size / GIB:,.1f}"


def plot_memory(
    path: Path, curves: Mapping[tuple[str, str], Sequence[tuple[int, float]]], *, title: str
) -> None:
    """Peak GiB per GPU against the number of GPUs: a curve of (GPUs, GiB) for each (model, variant).

    A model has one colour, and each of its variants another line.
    """
    from matplotlib.ticker import FuncFormatter

    from lejepa_fast.train.report.plots import TARGET, TRAINED, UNTRAINED, report_figure

    models = list(dict.fromkeys(model for model, _ in curves))
    variants = list(dict.fromkeys(variant for _, variant in curves))
    colours = dict(zip(models, itertools.cycle((TRAINED, UNTRAINED, TARGET)), strict=False))
    lines = dict(zip(variants, itertools.cycle(("-", "--", ":")), strict=False))
    with report_figure(path, 7.6, 5.0) as drawing:
        axes = drawing.subplots()
        for (model, variant), points in curves.items():
            gpus, gib = zip(*points, strict=True)
            look: dict[str, Any] = {"color": colours[model], "linestyle": lines[variant]}
            axes.plot(gpus, gib, marker="o", markersize=4, label=f"{model}, {variant}", **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("GPUs")
        axes.set_ylabel("peak GiB per GPU")
        axes.set_title(title)
        drawing.legend(loc="outside lower center", ncols=max(1, len(models)), fontsize=8)
