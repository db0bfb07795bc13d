"""The plan: memory against two real processes, any number of GPUs from three traces, traffic, bad options."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import plan_worker
import pytest
import torch
import torch.nn.functional as F
from training import run_ranks

from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.train import config, plan
from lejepa_fast.train.config import AverageConfig, Config, LossConfig, ModelConfig, ParallelConfig
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.parallel.blocks import find_blocks
from lejepa_fast.train.planning import memory as plan_memory
from lejepa_fast.train.planning.autocast import autocast_as_on_gpus
from lejepa_fast.train.planning.memory import Traffic, trace_step
from lejepa_fast.train.planning.memory import plan_memory as plan_of
from lejepa_fast.train.planning.plan_report import plot_memory
from lejepa_fast.train.runtime.gpu_specs import GIB, by_option

SMALL = Config(
    model=ModelConfig(name="vit_tiny", kwargs='{"depth": 4}', projector_hidden=256, projector_dim=64),
    crops=MultiCropRecipe(global_size=112, local_size=56, local_crops=2),
    loss=LossConfig(num_slices=128, impl="torch"),
    parallel=ParallelConfig(strategy="fsdp"),
    precision="fp32",
    device="cpu",
    compile="off",
)


def small(*, precision: str = "fp32", average: str = "none", **parallel: Any) -> Config:
    changed = dataclasses.replace(SMALL.parallel, **parallel)
    return dataclasses.replace(
        SMALL, parallel=changed, precision=precision, average=AverageConfig(kind=average)
    )


def test_memory_of_two_real_processes(tmp_path: Path) -> None:
    """Fake tensors on one fake rank of two against PyTorch's CPU allocator in two gloo processes.

    Under FSDP2 what is measured holds gloo's own copies of a block too, which NCCL does not make. The others
    have few images, so that the gradients which DDP keeps, and an average, are a good part of the whole.
    """
    recompute = {"activation_checkpointing": "full"}
    cases = [
        (small(), 24),
        (small(precision="bf16", average="ema", **recompute), 24),
        (small(strategy="ddp"), 4),
        (small(strategy="ddp", average="swa", **recompute), 4),
    ]
    values = [(config.to_dict(config.resolve(case)), images) for case, images in cases]
    run_ranks(plan_worker.measure, 2, str(tmp_path), values, ranks=2)
    planned = [
        trace_step(case, shards=2 if case.parallel.strategy == "fsdp" else 1, images=images).peak
        for case, images in cases
    ]
    for rank in (0, 1):
        measured = json.loads((tmp_path / f"{rank}.json").read_text())
        assert planned == pytest.approx(measured, rel=0.1)


def test_memory_without_a_wrapper() -> None:
    case = config.resolve(small(strategy="none", average="ema"))
    planned = trace_step(case, shards=1, images=4).peak
    assert planned == pytest.approx(plan_worker.allocator_peak(case, 4), rel=0.1)


def test_autocast_has_the_rules_of_gpus() -> None:
    values = torch.ones(2, 4, dtype=torch.bfloat16)

    def dtypes() -> list[torch.dtype]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = [F.layer_norm(values, (4,)), values.softmax(-1), values.sum(1), values.norm(dim=1)]
            return [each.dtype for each in (*results, values**2, F.gelu(values), values @ values.T)]

    usual = dtypes()
    with autocast_as_on_gpus():
        assert dtypes() == 5 * [torch.float32] + 2 * [torch.bfloat16]
        assert F.layer_norm(values, (4,)).dtype is torch.bfloat16  # without autocast as ever
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert values.softmax(-1, torch.bfloat16).dtype is torch.bfloat16  # asked for
    assert dtypes() == usual


def test_norms_under_fsdp_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 hands bfloat16 to the blocks. Autocast of a GPU makes a float32 copy for a norm, which keeps it
    for the backward pass; that of the CPU does not, and the norm keeps the bfloat16."""
    on_gpus = trace_step(small(precision="bf16"), shards=2, images=8).peak
    monkeypatch.setattr(plan_memory, "autocast_as_on_gpus", contextlib.nullcontext)
    on_cpus = trace_step(small(precision="bf16"), shards=2, images=8).peak
    tokens = 8 * (2 * (8 * 8 + 1) + 2 * (4 * 4 + 1))
    norms = 4 * 2 + 1  # two in a block, one behind them
    more = (on_gpus - on_cpus) / (tokens * 192 * 2)
    assert norms <= more < norms + 2  # and what a norm hands on


def test_any_number_of_gpus_from_three_traces() -> None:
    cfg = small(precision="bf16")
    found = plan_of(cfg, shards=4, images=4)
    assert found.peak(4, 4) == pytest.approx(found.traced.peak, rel=1e-9)
    for shards, images in ((1, 16), (16, 1), (32, 8)):
        direct = trace_step(cfg, shards=shards, images=images).peak
        assert found.peak(shards, images) == pytest.approx(direct, rel=0.03)


def test_one_gpu_and_groups_of_one() -> None:
    """One shard runs other operators than several: no gather, and a copy in place of the scatter."""
    alone = plan_of(small(), shards=1, images=4)
    assert alone.traced.shards == 1
    assert alone.peak(1, 4) == pytest.approx(alone.traced.peak, rel=0.03)
    assert alone.peak(8, 4) == pytest.approx(trace_step(small(), shards=8, images=4).peak, rel=1e-9)
    parameters = sum(p.numel() for p in build_model(small(), meta=True).parameters())
    copies = plan_of(small(replicate=4), shards=1, images=4).traffic
    assert copies.summed == pytest.approx(4 * parameters, rel=0.02)


@pytest.mark.parametrize("replicate", [1, 4])
def test_state_is_sharded_within_a_group(replicate: int) -> None:
    cfg = small(replicate=replicate)
    trace = trace_step(cfg, shards=4, images=2)
    parameters = sum(p.numel() for p in build_model(cfg, meta=True).parameters())
    assert trace.at_peak["Sharded Param"] == pytest.approx(4 * parameters / 4, rel=0.02)
    assert trace.at_peak["OptState"] == pytest.approx(8 * parameters / 4, rel=0.02)
    assert trace.traffic.scattered == pytest.approx(4 * parameters, rel=0.02)
    assert trace.traffic.summed == pytest.approx(4 * parameters if replicate > 1 else 0, rel=0.02)


def test_blocks_are_gathered_twice_for_each_size_of_crops() -> None:
    cfg = small(precision="bf16", activation_checkpointing="full")
    model = build_model(cfg, meta=True)
    blocks = sum(p.numel() for block in find_blocks(model.encoder).values() for p in block.parameters())
    gathered = trace_step(cfg, shards=2, images=2).traffic.gathered
    # Forward and backward of two sizes; what is outside of the blocks is gathered once.
    rest = sum(p.numel() for p in model.parameters()) - blocks
    assert 2 * 4 * blocks <= gathered <= 2 * 5 * blocks + 4 * rest


def test_what_a_rank_sends() -> None:
    traffic = Traffic(gathered=800, scattered=400, summed=400)
    assert traffic.sent(shards=1, replicas=1) == (0, 0)
    assert traffic.sent(shards=4, replicas=1) == (900, 0)  # 3/4 of 1200
    assert traffic.sent(shards=4, replicas=2) == (900, 2 * 100 * 0.5)  # a shard of 100, there and back


def test_gigantic_over_64_ranks() -> None:
    cfg = plan.run_config(
        plan.PlanOptions(
            model=ModelConfig("vit_gigantic"), activation_checkpointing="full", gpus=64, strategy="fsdp"
        ),
        batch=512,
    )
    trace = trace_step(cfg, shards=64, images=8)
    parameters = 1_851_500_000  # encoder 1,842.8 M and projector 8.7 M
    assert trace.at_peak["OptState"] == pytest.approx(8 * parameters / 64, rel=0.02)
    assert trace.traffic.scattered == pytest.approx(4 * parameters, rel=0.02)
    assert trace.peak < 8 * GIB


@pytest.fixture(scope="module")
def tight() -> plan.Plan:
    """ViT-tiny under FSDP2 where only two hundredths of an L4 may be used."""
    return plan.Plan(
        plan.PlanOptions(
            model=ModelConfig("vit_tiny"), gpus=8, gpu="l4", batch=256, reserve=0.98, strategy="fsdp"
        )
    )


def test_the_smallest_that_fits(tight: plan.Plan) -> None:
    smallest = tight.smallest()
    assert smallest is not None
    assert smallest.peak <= 0.02 * 22 * GIB
    fewer = [gpus for gpus in tight.possible() if gpus < smallest.gpus]
    assert fewer
    assert all(tight.row(gpus).peak > 0.02 * 22 * GIB for gpus in fewer)


def test_times_follow_from_flops_and_bytes(tight: plan.Plan) -> None:
    row = tight.row(16)
    assert row.images == 16
    assert row.compute_seconds == pytest.approx(tight.flops.per_image * 16 / (121e12 * 0.4))
    assert row.network_seconds == pytest.approx(row.sent / 12.5e9)  # beyond one machine
    assert tight.row(8).network_seconds == pytest.approx(tight.row(8).sent / 32e9)
    assert row.step_seconds == max(row.compute_seconds, row.network_seconds)


def test_float32_has_peaks_of_its_own(tight: plan.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products are float32, and convolutions TF32 where PyTorch lets them."""
    options = dataclasses.replace(tight.options, precision="fp32")
    monkeypatch.setattr(tight, "options", options)
    flops = tight.flops
    patches = 2 * 3 * 14 * 14 * 192 * 2  # forward and backward, for each patch, without the images' gradient
    assert flops.convolutions == pytest.approx(patches * (2 * 256 + 6 * 49))
    expected = (flops.per_image - flops.convolutions) / 30.3e12 + flops.convolutions / 60.5e12
    assert tight.row(16).compute_seconds == pytest.approx(16 * expected / 0.4)
    assert by_option("mi300x").convolution_tflops == by_option("mi300x").fp32_tflops


def test_groups_inside_a_machine_gather_over_its_link() -> None:
    found = plan.Plan(
        plan.PlanOptions(model=ModelConfig("vit_tiny"), gpus=16, gpu="l4", batch=256, replicate=2)
    )
    within, between = found.memory(16).traffic.sent(8, 2)
    assert min(within, between) > 0
    assert found.row(16).network_seconds == pytest.approx(within / 32e9 + between / 12.5e9)
    assert found.bandwidths(8) == (32, 32)
    assert found.bandwidths(32) == (12.5, 12.5)  # groups of 16 reach beyond a machine
    assert found.bandwidths(12) == (12.5, 12.5)  # one of the groups of 6 does


def test_auto_plans_what_the_trainer_takes() -> None:
    """One process, DDP for a small model on several; under DDP all GPUs hold all, and sum its gradients."""
    shallow = ModelConfig("vit_tiny", kwargs='{"depth": 2}')
    found = plan.Plan(plan.PlanOptions(model=shallow, gpus=1, gpu="l4", batch=256))
    assert [found.strategy(gpus) for gpus in (1, 2, 16)] == ["none", "ddp", "ddp"]
    assert found.row(1).sent == 0
    gradients = 4 * found.parameters
    assert found.row(2).sent == pytest.approx(gradients)
    assert found.row(16).sent == pytest.approx(gradients * 2 * 15 / 16)
    assert found.row(16).network_seconds == pytest.approx(found.row(16).sent / 12.5e9)  # beyond a machine
    one, two, many = (found.memory(gpus).peak(1, 64) for gpus in (1, 2, 16))
    assert two == many
    assert gradients / 2 < two - one <= gradients  # without DDP there are none when activations are most


def test_the_report(tight: plan.Plan) -> None:
    from lejepa_fast.train.planning.plan_report import report

    text = report(tight)
    steps = 100 * (1_281_167 // 256)
    assert f"{steps:,} steps" in text
    assert "5.5 M encoder" in text
    assert f"smallest number of GPUs that fits this batch: {tight.smallest().gpus}" in text
    lines = [line.split() for line in text.splitlines()]
    assert {"8*", "16", "32"} <= {line[0] for line in lines if line}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_gigantik"], "did you mean vit_gigantic"),
        (["--gpu", "h2000"], "did you mean h200? known: a10, a100"),
        (["--gpus", "6", "--batch", "512"], "cannot be split evenly over 6 processes"),
        (["--gpus", "8", "--replicate", "3"], "8 GPUs cannot be split evenly into 3 groups"),
        (["--gpus", "64", "--batch", "64"], "rule of thumb: 256 or more in all"),
        (["--batch", "512", "--batch-per-gpu", "8"], "give one of them"),
        (["--mfu", "40"], "mfu: expected a share between 0 and 1, got 40"),
        (["--bandwidth", "0"], "bandwidth: expected a number above 0"),
        (["--images", "100"], "images: expected at least one batch of 512, got 100"),
        (["--gpus", "0"], "gpus: expected at least 1, got 0"),
        (["--model", "vit_tiny", "--local-size", "100"], "multiple of its patch size 14"),
        (["--batchsize", "512"], "did you mean --batch-size?"),
        (["--model", "vit_tiny", "--strategy", "none"], "none trains 8 separate models"),
        (["--model", "vit_tiny", "--keep-gathered"], "nothing is gathered without FSDP"),
        (["--parallel.strategy", "ddp"], "did you mean --strategy?"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_few_images_for_sigreg() -> None:
    assert config.small_batch_warning(256) is None
    assert "rule of thumb: at least 256 (linear accuracy of the paper's ViT-L: 72.2 % with 128" in str(
        config.small_batch_warning(255)
    )


def test_a_plan_leaves_nothing_behind() -> None:
    before = plan_memory.ShardingPropagator._propagate_tensor_meta_non_cached
    trace_step(small(), shards=2, images=2)
    assert not torch.distributed.is_initialized()
    assert plan_memory.ShardingPropagator._propagate_tensor_meta_non_cached is before


def test_the_figure(tmp_path: Path) -> None:
    curves = {("one", "plain"): [(1, 80.0), (8, 10.0)], ("two", "plain"): [(8, 40.0), (64, 5.0)]}
    plot_memory(tmp_path / "plan.png", curves, title="memory")
    less = tmp_path / "less.png"
    plot_memory(less, {("one", "plain"): [(1, 1.0)]}, title="memory")
    assert (tmp_path / "plan.png").read_bytes() != less.read_bytes()
