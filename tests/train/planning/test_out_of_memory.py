"""Out of memory: one line that says which settings help, and the plan of the run."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch
from training import CPU, Make

from lejepa_fast.errors import RunError
from lejepa_fast.train import plan
from lejepa_fast.train.config import Config, ModelConfig
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.planning import out_of_memory
from lejepa_fast.train.planning.out_of_memory import settings_that_help
from lejepa_fast.train.runtime.command import parse_options
from lejepa_fast.train.runtime.world import World


def test_out_of_gpu_memory_says_which_settings_help(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(max_steps=2), CPU, settings_that_help)

    def full(views: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(trainer, "parallel", full)
    with pytest.raises(RunError) as refusal:
        trainer.run()
    text = str(refusal.value)
    assert "\n" not in text
    assert "--parallel.activation-checkpointing selective or full (now none)" in text
    assert "a smaller --batch-size (now 8, 8 images per process)" in text


def test_no_memory_for_the_average_is_told_too(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(WeightAverage, "__init__", full)
    with pytest.raises(RunError, match=r"out of memory; what helps: .*no --average ema"):
        Trainer(tiny(average={"kind": "ema"}), CPU, settings_that_help)


def test_the_plan_that_it_names_is_that_of_the_run(tiny: Make) -> None:
    cfg = tiny(
        parallel={"activation_checkpointing": "selective", "replicate": 2, "keep_gathered": True},
        average={"kind": "swa"},
        model={"kwargs": '{"depth": 2, "class_token": false}', "register_tokens": 3, "drop_path": 0.1},
        data={"batch_size": 24},
        crops={"local_crops": 3, "global_crops": 1},
        max_steps=150,
    )
    text = out_of_memory.describe(cfg, World(torch.device("cpu"), size=4), "fsdp", images=500)
    assert "no --parallel.keep-gathered" in text
    assert "no --average swa" in text
    assert "--parallel.strategy" not in text
    assert "a smaller --batch-size (now 24, 6 images per process)" in text
    words = shlex.split(text.partition("what fits: ")[2])
    assert words[:2] == ["python", "train/plan.py"]
    options = parse_options(plan.PlanOptions, words[2:], description="")
    planned = plan.run_config(options, options.batch or 0)
    assert options.gpus == 4
    assert planned.model == cfg.model
    assert planned.precision == "fp32"
    assert planned.loss.num_slices == cfg.loss.num_slices
    assert planned.data.batch_size == cfg.data.batch_size
    assert planned.parallel == cfg.parallel
    assert planned.average.kind == "swa"
    assert (options.images, options.epochs) == (500, 7.5)  # 150 steps of 24 images
    for name in ("global_crops", "global_size", "local_crops", "local_size"):
        assert getattr(planned.crops, name) == getattr(cfg.crops, name), name


def test_a_usual_run_has_a_short_plan() -> None:
    cfg = Config(model=ModelConfig("vit_giant"), precision="bf16")
    text = out_of_memory.describe(cfg, CPU, "none", images=plan.PlanOptions.images)
    assert text.endswith("what fits: python train/plan.py --model vit_giant --gpus 1 --batch 512")


def test_a_run_under_ddp_is_planned_so(tiny: Make) -> None:
    cfg = tiny(parallel={"strategy": "ddp"}, model={"name": "vit_giant"}, epochs=3)
    text = out_of_memory.describe(cfg, World(torch.device("cpu"), size=2), "ddp", images=100)
    assert "--parallel.strategy fsdp (now ddp)" in text
    words = shlex.split(text.partition("what fits: ")[2])
    options = parse_options(plan.PlanOptions, words[2:], description="")
    assert (options.strategy, options.epochs, options.images) == ("ddp", 3, 100)


def test_the_machine_runs_out_of_memory(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(
        tiny(max_steps=2, parallel={"activation_checkpointing": "full"}), CPU, settings_that_help
    )
    monkeypatch.setattr(trainer, "parallel", lambda views: torch.empty(2**60))  # no machine has that
    with pytest.raises(RunError, match=r"^out of memory; what helps: a smaller --batch-size"):
        trainer.run()


def test_other_errors_keep_their_text(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(max_steps=2), CPU, settings_that_help)

    def broken(views: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(trainer, "parallel", broken)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$") as refusal:
        trainer.run()
    assert not isinstance(refusal.value, RunError)
