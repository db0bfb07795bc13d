"""A run out of memory ends with one line that says which settings help."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from training import CPU, Make

from lejepa_fast.errors import RunError
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.planning.out_of_memory import settings_that_help


def error_of(tiny: Make, failure: Exception, monkeypatch: pytest.MonkeyPatch) -> RuntimeError:
    trainer = Trainer(tiny(max_steps=2), CPU, settings_that_help)
    monkeypatch.setattr(trainer, "parallel", Mock(side_effect=failure))
    with pytest.raises(RuntimeError) as refusal:
        trainer.run()
    return refusal.value


def test_out_of_gpu_memory_says_which_settings_help(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    error = error_of(tiny, failure, monkeypatch)
    assert isinstance(error, RunError)
    assert "\n" not in str(error)
    assert "--parallel.activation-checkpointing selective or full (now none)" in str(error)
    assert "a smaller --batch-size (now 8, 8 images per process)" in str(error)
    assert str(error).endswith("--images 32")
    other = RuntimeError("shapes do not fit")
    assert error_of(tiny, other, monkeypatch) is other


def test_no_memory_for_the_average_is_told_too(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is the machine's memory that ends: no machine has so much."""
    monkeypatch.setattr(WeightAverage, "__init__", lambda *args: torch.empty(2**60))
    with pytest.raises(RunError, match=r"^out of memory; what helps: .*no --average ema"):
        Trainer(tiny(average={"kind": "ema"}), CPU, settings_that_help)
