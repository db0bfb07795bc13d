"""The plan: memory against real processes, any number of GPUs from three traces, traffic, bad options."""

import json
import math
from dataclasses import replace
from typing import Any

import parallel_worker as worker
import pytest
import torch
import torch.nn.functional as F
from training import run_ranks

from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.train import config, plan
from lejepa_fast.train.config import Config, DataConfig, MaskedConfig, ModelConfig, ParallelConfig, from_dict
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.parallel.blocks import find_blocks
from lejepa_fast.train.planning.autocast import autocast_as_on_gpus
from lejepa_fast.train.planning.estimate import Plan
from lejepa_fast.train.planning.memory import Traffic, plan_memory, trace_step
from lejepa_fast.train.planning.options import PlanOptions
from lejepa_fast.train.runtime.gpu_specs import GIB

MODEL = {"name": "vit_tiny", "projector_hidden": 256, "projector_dim": 64}


def small(*, depth=2, precision="fp32", average="none", center_from="views", **parallel):
    return from_dict(
        {
            "model": MODEL | {"kwargs": json.dumps({"depth": depth})},
            "crops": {"global_size": 112, "local_size": 56, "local_crops": 2},
            "loss": {"num_slices": 128, "impl": "torch", "center_from": center_from},
            "parallel": {"strategy": "fsdp", **parallel},
            "average": {"kind": average},
            "precision": precision,
            "device": "cpu",
            "compile": "off",
        }
    )


def test_memory_of_real_processes(tmp_path):
    """Fake tensors on one fake rank of two against PyTorch's CPU allocator in two gloo processes.

    Under FSDP2 what is measured holds gloo's own copies of a block too, which NCCL does not make. DDP has few
    images, so that the gradients which it keeps, and an average, are a good part of the whole. One process is
    in the next test.
    """
    fsdp = small(precision="bf16", average="ema", center_from="average")
    cases = [(fsdp, 8), (small(strategy="ddp", average="swa", activation_checkpointing="full"), 4)]
    values = [(config.to_dict(config.resolve(case)), images) for case, images in cases]
    run_ranks(worker.measure, 2, str(tmp_path), values, ranks=2)
    planned = [trace_step(case, shards=n, images=i).peak for (case, i), n in zip(cases, (2, 1), strict=True)]
    for rank in (0, 1):
        assert planned == pytest.approx(json.loads((tmp_path / f"{rank}.json").read_text()), rel=0.1)


@pytest.mark.parametrize("objective", ["ijepa", "masked-lejepa"])
def test_memory_of_masked_prediction(objective):
    """Target encoder and predictor count; against PyTorch's CPU allocator, and in proportion to images."""
    cfg = config.resolve(masked(objective, strategy="none"))
    found = plan_memory(cfg, shards=1, images=4)
    assert found.traced.peak == pytest.approx(worker.allocator_peak(cfg, 4), rel=0.1)
    assert found.peak(1, 10) == pytest.approx(trace_step(cfg, shards=1, images=10).peak, rel=0.03)
    model = build_model(cfg, meta=True)
    sizes = [4 * (3 if p.requires_grad else 1) * p.numel() for p in model.parameters()]
    assert found.traced.state == pytest.approx(sum(sizes), rel=0.01)
    if objective != "ijepa":
        return  # among ranks it is I-JEPA without the target encoder
    for parallel, shards in ({"strategy": "ddp"}, 1), ({"strategy": "fsdp"}, 4):
        trace = trace_step(masked(objective, **parallel), shards=shards, images=4)
        # Cut along the first dimension: that of positions is 1, and is filled up to one for each rank.
        parts = [math.ceil(p.shape[0] / shards) / p.shape[0] for p in model.parameters()]
        own = sum(size * part for size, part in zip(sizes, parts, strict=True))
        assert trace.state == pytest.approx(own, rel=0.01)
        trained = zip(model.parameters(), parts, strict=True)
        gradients = sum(4 * p.numel() * part * shards for p, part in trained if p.requires_grad)
        sent = trace.traffic.summed if shards == 1 else trace.traffic.scattered
        assert sent == pytest.approx(gradients, rel=0.01)


def masked(objective, **parallel):
    """The same model on one view."""
    cfg = small(**parallel)
    crops = replace(cfg.crops, global_crops=1, local_crops=0)
    predictor = MaskedConfig(predictor_width=96, predictor_depth=2, predictor_heads=4)
    return replace(cfg, objective=objective, crops=crops, masked=predictor)


def test_autocast_has_the_rules_of_gpus():
    values = torch.ones(2, 4, dtype=torch.bfloat16)

    def dtypes():
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


def test_any_number_of_gpus_from_three_traces():
    """Also of one shard, which runs other operators: no gather, and a copy in place of the scatter."""
    cfg = small(precision="bf16")
    found = plan_memory(cfg, shards=4, images=4)
    assert found.peak(4, 4) == found.traced.peak
    for shards, images in ((1, 16), (32, 8)):
        direct = trace_step(cfg, shards=shards, images=images).peak
        assert found.peak(shards, images) == pytest.approx(direct, rel=0.03)


@pytest.mark.parametrize(("replicate", "shards"), [(1, 4), (4, 4), (4, 1)])
def test_state_is_sharded_within_a_group_and_nothing_is_left(replicate, shards):
    cfg = small(depth=4, replicate=replicate)
    resize = torch.UntypedStorage.resize_
    trace = trace_step(cfg, shards=shards, images=2)
    assert not torch.distributed.is_initialized()
    assert torch.UntypedStorage.resize_ is resize
    parameters = sum(p.numel() for p in build_model(cfg, meta=True).parameters())
    assert trace.state == pytest.approx(12 * parameters / shards, rel=0.02)  # weights and two moments
    assert trace.traffic.scattered == pytest.approx(4 * parameters if shards > 1 else 0, rel=0.02)
    assert trace.traffic.summed == pytest.approx(4 * parameters if replicate > 1 else 0, rel=0.02)


def test_blocks_are_gathered_twice_for_each_size_of_crops():
    model = build_model(small(), meta=True)
    blocks = sum(p.numel() for block in find_blocks(model.encoder).values() for p in block.parameters())
    rest = sum(p.numel() for p in model.parameters()) - blocks
    options = {"precision": "bf16", "activation_checkpointing": "full"}
    gathered = trace_step(small(**options), shards=2, images=2).traffic.gathered
    assert 2 * 4 * blocks <= gathered <= 2 * 5 * blocks + 4 * rest
    # The second model of a center from the average gathers them once more, and its tensors are the average.
    trace = trace_step(small(**options, average="ema", center_from="average"), shards=2, images=2)
    # 5 bytes of the rest: tensors of one row are filled up to one for each rank.
    assert 2 * blocks <= trace.traffic.gathered - gathered <= 2 * blocks + 5 * rest
    assert trace.state == pytest.approx(4 * 4 * (blocks + rest) / 2, rel=0.02)


def test_what_a_rank_sends():
    traffic = Traffic(gathered=800, scattered=400, summed=400)
    assert traffic.sent(shards=1, copies=1) == (0, 0)
    assert traffic.sent(shards=4, copies=1) == (900, 0)  # 3/4 of 1200
    assert traffic.sent(shards=4, copies=2) == (900, 2 * 100 * 0.5)  # a shard of 100, there and back


def test_four_blocks_of_gigantic_over_64_ranks():
    """Without recomputation, or on 8 ranks, they take more."""
    parallel = ParallelConfig(strategy="fsdp", activation_checkpointing="full")
    crops, model = MultiCropRecipe(local_crops=0), ModelConfig("vit_gigantic", kwargs='{"depth": 4}')
    cfg = Config(model=model, crops=crops, parallel=parallel, precision="bf16", device="cpu")
    trace = trace_step(cfg, shards=64, images=8)
    # Cut along the first dimension, which is filled up to a multiple of 64.
    tensors = build_model(cfg, meta=True).parameters()
    parameters = sum(64 * math.ceil(p.shape[0] / 64) / p.shape[0] * p.numel() for p in tensors)
    assert trace.state == pytest.approx(12 * parameters / 64, rel=0.02)
    assert trace.traffic.scattered == pytest.approx(4 * parameters, rel=0.02)
    assert trace.peak < 0.9 * GIB


def plan_for(gpus, kwargs="{}", **parallel):
    """ViT-tiny where only two hundredths of the memory may be used."""
    sections: dict[str, Any] = {
        "model": ModelConfig("vit_tiny", kwargs=kwargs),
        "data": DataConfig(batch_size=256),
        "parallel": ParallelConfig(**parallel),
    }
    return Plan(PlanOptions(**sections, gpus=gpus, gpu="l4", reserve=0.98))


def test_the_plan_of_sharded_gpus():
    """The smallest number that fits, times that follow from operations and bytes, and the text."""
    tight = plan_for(8, kwargs='{"depth": 4}', strategy="fsdp")
    smallest = tight.smallest()
    assert smallest is not None
    assert smallest.peak <= 0.02 * 22 * GIB
    fewer = [gpus for gpus in tight.possible() if gpus < smallest.gpus]
    assert fewer
    assert all(tight.row(gpus).peak > 0.02 * 22 * GIB for gpus in fewer)

    row = tight.row(16)
    assert row.images == 16
    assert row.compute_seconds == pytest.approx(tight.flops.per_image * 16 / (121e12 * 0.4))
    assert row.network_seconds == pytest.approx(row.sent / 12.5e9)  # beyond one machine
    assert tight.row(8).network_seconds == pytest.approx(tight.row(8).sent / 32e9)
    assert row.step_seconds == max(row.compute_seconds, row.network_seconds)

    text = tight.report()
    assert f"{100 * (1_281_167 // 256):,} steps" in text
    assert "1.9 M encoder" in text
    assert f"smallest number of GPUs that fits: {smallest.gpus}" in text
    lines = [line.split() for line in text.splitlines()]
    assert {"8*", "16", "32"} <= {line[0] for line in lines if line}


def test_groups_inside_a_machine_gather_over_its_link():
    found = plan_for(16, kwargs='{"depth": 2}', replicate=2)
    within, between = found.memory.traced.traffic.sent(8, 2)
    assert min(within, between) > 0
    assert found.row(16).network_seconds == pytest.approx(within / 32e9 + between / 12.5e9)
    assert found.bandwidths(8) == (32, 32)
    # Groups of 16 reach beyond a machine, and so does one of the groups of 6.
    assert found.bandwidths(32) == found.bandwidths(12) == (12.5, 12.5)


def test_auto_plans_what_the_trainer_takes():
    """No wrapper on one GPU, DDP for a small model on several: each holds all, and sums its gradients."""
    one, several = (plan_for(gpus, kwargs='{"depth": 2}') for gpus in (1, 16))
    assert (one.strategy, several.strategy) == ("none", "ddp")
    assert one.row(1).sent == 0

    gradients = 4 * several.parameters
    assert several.row(2).sent == pytest.approx(gradients)
    assert several.row(16).sent == pytest.approx(gradients * 2 * 15 / 16)
    assert gradients / 2 < several.memory.peak(1, 64) - one.memory.peak(1, 64) <= gradients


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_gigantik"], "did you mean vit_gigantic"),
        (["--gpu", "h2000"], "did you mean h200? known: a10, a100"),
        (["--gpus", "6", "--batch", "512"], "cannot be split evenly over 6 processes"),
        (["--gpus", "8", "--parallel.replicate", "3"], "8 processes cannot be split evenly into 3 groups"),
        (["--mfu", "40"], "mfu: expected below 1, got 40.0"),
        (["--bandwidth", "0"], "bandwidth: expected above 0, got 0.0"),
        (["--images", "100"], "images: expected at least one batch of 512, got 100"),
        (["--gpus", "0"], "gpus: expected at least 1, got 0"),
        (["--model", "vit_tiny", "--crops.local-size", "100"], "use --crops.local-size 98, which it takes"),
        (["--model", "vit_tiny", "--parallel.strategy", "none"], "none trains 8 separate models"),
        (["--strategy", "ddp"], "did you mean --parallel.strategy?"),
    ],
)
def test_bad_options(arguments, message, capsys):
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
