"""The trainer on tiny configurations: exact resume, evaluation without a trace, collapse, bad steps."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from training import CPU, Make, course_of, rows_of, train_only

from lejepa_fast.errors import RunError
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.evaluation.evaluate import EvalResult, evaluate_model, open_splits
from lejepa_fast.train.pretrain import pretrain
from lejepa_fast.train.runtime import files
from lejepa_fast.train.runtime.signals import Interrupted

# ---- resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "stop", "workers", "backend"),
    [
        # Drop path draws from the global generator.
        ({"name": "test_vit", "drop_path": 0.3}, 5, 0, "torchvision"),
        # Running statistics; workers that are ahead of the training.
        ({"name": "test_resnet", "projector_norm": "batch"}, 5, 2, "torchvision"),
        ({"name": "test_vit"}, 4, 0, "torchvision"),  # exactly between two epochs
        ({"name": "test_vit"}, 5, 2, "dali"),
    ],
)
def test_resume_is_exact(
    model: dict, stop: int, workers: int, backend: str, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    cfg = tiny(model=model, data={"workers": workers, "backend": backend})
    straight = dataclasses.replace(cfg, out=cfg.out.with_name("straight"))
    whole = train_only(straight)
    states = random_state.capture_rng()
    train_step = Trainer.train_step

    def signalled(self: Trainer, views: list[torch.Tensor], epoch: int) -> None:
        if self.step + 1 == stop:
            signal.raise_signal(signal.SIGTERM)
        train_step(self, views, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        with pytest.raises(Interrupted, match=f"SIGTERM after step {stop} of 12; checkpoint saved in"):
            train_only(cfg)
    assert [row[0] for row in course_of(cfg)] == list(range(1, stop + 1))
    torch.manual_seed(99)  # another process starts with other random states
    resumed = train_only(cfg)

    assert random_state.capture_rng() == states
    assert course_of(cfg) == course_of(straight)
    assert len({row[2] for row in course_of(cfg)}) == 12  # losses differ: the comparison means something
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        slots, expected = resumed.optimizer.state[mine], whole.optimizer.state[other]
        assert slots.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(slots[name], value) for name, value in expected.items())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert torch.equal(resumed.loss_fn.sigreg.step, torch.tensor(12))


# ---- evaluation, report, export ----------------------------------------------------------------------


def test_evaluation_leaves_no_trace(tiny: Make, tmp_path: Path) -> None:
    """With drop path and BatchNorm in play, probes after each epoch change no bit of the training."""
    options = {"model": {"name": "test_resnet", "projector_norm": "batch", "drop_path": 0.2}, "max_steps": 9}
    quiet, watched = (tiny(out=tmp_path / str(n), eval={"every": n}, **options) for n in (0, 1))
    trainers = [train_only(cfg) for cfg in (quiet, watched)]
    assert [row["step"] for row in rows_of(watched, "eval")] == [4, 8]
    assert all(row["linear"] is not None for row in rows_of(watched, "eval"))
    assert not rows_of(quiet, "eval")
    assert course_of(quiet) == course_of(watched)
    for name, value in trainers[0].model.state_dict().items():
        assert torch.equal(trainers[1].model.state_dict()[name], value), name


def test_held_out_images_are_the_same_for_every_seed_and_for_the_command(
    tiny: Make, image_folder: Path
) -> None:
    """Where the data has no val split of its own: no image is trained on by one and judged by the other."""

    def images(*sources: Any) -> list[list[str]]:
        return [[source.describe(i) for i in range(len(source))] for source in sources]

    cfg = tiny(data={"path": str(image_folder / "train"), "val_fraction": 0.25})
    train, val = by_command = images(*open_splits(cfg.data))
    assert (len(val), set(train) & set(val)) == (8, set())
    for seed in (0, 3):
        trainer = Trainer(dataclasses.replace(cfg, seed=seed), CPU)
        assert images(trainer.train_source, trainer.val_source) == by_command


def test_a_whole_run_and_a_second_start(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of a run; a finished run only evaluates.

    During the training on some of the images, one at a time, although BatchNorm's statistics for the
    untrained encoder need several; at the end on all.
    """
    seen = []

    def noted(*args: Any, **kwargs: Any) -> EvalResult:
        seen.append(evaluate_model(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr("lejepa_fast.train.evaluation.evaluate.evaluate_model", noted)
    evaluation = {"every": 2, "train_images": 9, "batch_size": 1}
    model = {"projector_norm": "batch"}
    cfg = tiny(tensorboard=True, eval=evaluation, model=model, average={"kind": "ema"})
    page = pretrain(cfg, CPU)
    assert [(result.n_train, result.n_val) for result in seen] == [(9, 12), (32, 12), (32, 12)]
    out = cfg.out
    assert out is not None
    assert page == out / "report" / "report.html"
    assert page.stat().st_size > 10_000
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["images_per_second"] > 0
    assert summary["config"]["model"]["name"] == "test_vit"
    probes = ("knn_untrained", "knn_trained", "linear_untrained", "linear_trained")
    assert all(0 <= summary[key] <= 100 for key in probes)
    assert [row["step"] for row in rows_of(cfg, "eval")] == [8, 12]
    assert all(0 <= row[probe] <= 100 for row in rows_of(cfg, "eval") for probe in ("knn", "linear"))
    assert json.loads((out / "config.json").read_text())["optim"]["weight_decay"] == 0.05
    assert list((out / "tensorboard").glob("events.*"))
    assert {"encoder.safetensors", "encoder.json"} <= {path.name for path in out.iterdir()}
    assert not list(out.rglob(f"*{files.UNFINISHED}"))

    course, weights = course_of(cfg), (out / "encoder.safetensors").read_bytes()
    page.unlink()
    left = out / "checkpoints" / f".step-00000016{files.UNFINISHED}"  # by a killed trainer
    left.mkdir()
    assert pretrain(cfg, CPU) == page
    assert page.exists()
    assert not left.exists()
    assert course_of(cfg) == course
    assert (out / "encoder.safetensors").read_bytes() == weights
    assert len(rows_of(cfg, "eval")) == 2
    again = json.loads((out / "report" / "summary.json").read_text())
    assert again["knn_trained"] == summary["knn_trained"]


def test_an_evaluation_that_ends_the_run_is_not_tried_for_ever(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny(eval={"every": 1, "linear_steps": 0}, max_steps=9)

    with monkeypatch.context() as patch:
        failing = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
        patch.setattr("lejepa_fast.train.evaluation.evaluate.evaluate_model", failing)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                train_only(cfg)
    train_only(cfg)
    assert "skipping the evaluation after epoch 1: it ended the run 2 times" in caplog.text
    assert [row["step"] for row in rows_of(cfg, "eval")] == [8]
    assert [row["step"] for row in rows_of(cfg)] == list(range(1, 10))


def test_a_signal_during_an_evaluation_leaves_at_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny(eval={"every": 1})

    def signalled(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the evaluation went on")

    with monkeypatch.context() as patch:
        patch.setattr("lejepa_fast.train.evaluation.evaluate.evaluate_model", signalled)
        with pytest.raises(Interrupted, match="during the evaluation after step 4 of 12; checkpoint saved"):
            train_only(cfg)
    train_only(cfg)  # continues with the evaluation that was broken off
    assert [row["step"] for row in rows_of(cfg, "eval")] == [4, 8]
    assert [row["step"] for row in rows_of(cfg)] == list(range(1, 13))


# ---- collapse ----------------------------------------------------------------------------------------


def test_without_sigreg_the_embeddings_collapse(tiny: Make, tmp_path: Path) -> None:
    """The embedding std falls by 100x with lambda = 0, and not with SIGReg."""
    fall = {}
    for lambd in (0.0, 0.05):
        cfg = tiny(
            out=tmp_path / str(lambd),
            loss={"lambd": lambd},
            model={"projector_norm": "none", "projector_layers": 1},
            optim={"lr": 5e-3, "warmup_fraction": 0.0},
            max_steps=100,
        )
        train_only(cfg)
        spread = [row["embedding_std"] for row in rows_of(cfg)]
        fall[lambd] = spread[0] / spread[-1]
    assert fall[0.0] > 100
    assert fall[0.05] < 5


# ---- bad steps ---------------------------------------------------------------------------------------


def poison(trainer: Trainer, steps: set[int], *, images: bool) -> list[dict[str, torch.Tensor]]:
    """Images or the loss NaN in these steps; returns the state before and after each."""
    states: list[dict[str, torch.Tensor]] = []
    step, forward = trainer.train_step, trainer.loss_fn.forward

    def snapshot() -> None:
        state = {f"model.{k}": v.clone() for k, v in trainer.model.state_dict().items()}
        for index, slots in trainer.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{k}": v.clone() for k, v in slots.items()}
        states.append(state)

    def poisoned_step(views: list[torch.Tensor], epoch: int) -> None:
        bad = trainer.step + 1 in steps
        if bad and images:
            views[0][0] = torch.nan
        trainer.loss_fn.forward = (
            (lambda g, a: forward(g, a)._replace(total=forward(g, a).total * torch.nan))
            if bad and not images
            else forward
        )
        snapshot()
        step(views, epoch)
        snapshot()

    trainer.train_step = poisoned_step  # type: ignore[method-assign]
    return states


@pytest.mark.parametrize("lags", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("images", [True, False], ids=["bad images", "bad loss"])
def test_a_bad_step_is_skipped_and_three_in_a_row_end_the_run(
    images: bool, lags: bool, tiny: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Two in a row are borne, and a third later. With a lag, the host learns of it after the next step."""
    cfg = tiny(model={"name": "test_resnet", "projector_norm": "batch"}, checkpoint_every=4)
    trainer = Trainer(cfg, CPU)
    trainer.guard.lag = lags
    bad = {2, 3, 5, 7, 8, 9}
    states = poison(trainer, bad, images=images)
    with pytest.raises(RunError, match=r"3 steps in a row .*rank 0, step 9, loss nan.*lower --lr"):
        trainer.run()
    assert trainer.guard.skipped == len(bad)
    assert "rank 0, step 2, loss nan" in caplog.text
    for number, (before, after) in enumerate(zip(states[::2], states[1::2], strict=False), start=1):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        kept = {name for name in before if "num_batches" not in name and not (lags and "running" in name)}
        assert len(changed & kept) == 0 if number in bad else len(changed & kept) > 20
    assert len(states) == (19 if lags else 17)  # the last step did not return
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    losses = [row["loss"] is None for row in rows_of(cfg)]
    assert losses[:8] == [step in bad for step in range(1, 9)]
    found = checkpoint.newest_checkpoint(trainer.run_dir / "checkpoints")
    assert found is not None
    assert found[1]["step"] == 8
