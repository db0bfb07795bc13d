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


def run_with(trainer: Trainer, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(views: Any) -> Any:
        raise error

    monkeypatch.setattr(trainer, "parallel", fail)
    trainer.run()


def test_out_of_gpu_memory_says_which_settings_help(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    trainer = Trainer(tiny(max_steps=2), CPU, settings_that_help)
    with pytest.raises(RunError) as refusal:
        run_with(trainer, error, monkeypatch)
    text = str(refusal.value)
    assert "\n" not in text
    assert "--parallel.activation-checkpointing selective or full (now none)" in text
    assert "a smaller --batch-size (now 8, 8 images per process)" in text
    assert text.endswith("--images 32")


def test_no_memory_for_the_average_is_told_too(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is the machine's memory that ends: no machine has so much."""
    monkeypatch.setattr(WeightAverage, "__init__", lambda *args: torch.empty(2**60))
    with pytest.raises(RunError, match=r"^out of memory; what helps: .*no --average ema"):
        Trainer(tiny(average={"kind": "ema"}), CPU, settings_that_help)


def test_other_errors_keep_their_text(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(max_steps=2), CPU, settings_that_help)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$") as refusal:
        run_with(trainer, RuntimeError("shapes do not fit"), monkeypatch)
    assert not isinstance(refusal.value, RunError)
