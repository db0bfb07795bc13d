"""Fixtures: a checkpoint without a training, and reports whose figures take no time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from training import CPU

from lejepa_fast.train.checkpoint.saving import Saver
from lejepa_fast.train.config import Config, to_dict
from lejepa_fast.train.model.model import build_model


@pytest.fixture(autouse=True)
def _figures_take_no_time(white_figures: None) -> None: ...


@pytest.fixture(scope="session")
def save_run() -> Callable[..., Path]:
    """Writes a checkpoint of step 1 with random weights, of the next seed, so that it seems trained."""

    def save(cfg: Config, folder: Path, *, saved_as: Config | None = None) -> Path:
        model = build_model(dataclasses.replace(cfg, seed=cfg.seed + 1))
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        folder.mkdir(exist_ok=True)
        saver = Saver(folder / "checkpoints", CPU, keep=1)
        counts = {"train_images": 32, "val_images": 12}
        saver.start(1, tensors, {"config": to_dict(saved_as or cfg), "data": counts})
        saver.wait()
        return folder

    return save
