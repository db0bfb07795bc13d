"""A run out of memory ends with one line that says which settings help."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training import CPU, Make

from lejepa_fast.errors import RunError
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.planning.out_of_memory import settings_that_help


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
