"""What a resumed run takes from its checkpoint and what from its settings, and which folders it refuses."""

from __future__ import annotations

import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from training import CPU, Make, rows_of, train_only

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.engine import optimization
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.signals import Interrupted


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The library's log."""
    caplog.set_level(logging.WARNING)
    return caplog


def test_changed_settings_are_told_and_used(tiny: Make, told: pytest.LogCaptureFixture) -> None:
    train_only(tiny(max_steps=4))
    changed = tiny(max_steps=8, optim={"lr": 0.5, "weight_decay": 0.3, "betas": (0.8, 0.95)})
    trainer = train_only(changed)
    assert "optim.lr: the checkpoint has 0.001, this run 0.5" in told.text
    assert "optim.weight_decay: the checkpoint has 0.05, this run 0.3" in told.text
    # From the first step on: one step of the warm-up, then the cosine over all eight.
    rates = [optimization.lr_factor(step, warmup=1, total=8, final=1e-3) * 0.5 for step in range(4, 8)]
    assert [row["lr"] for row in rows_of(changed)][4:] == pytest.approx(rates, rel=1e-12)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in trainer.optimizer.param_groups} == {(0.8, 0.95)}
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, r"holds a run with seed 0, and this one has 2; choose another --out"),
        ({"model": {"name": "test_resnet"}}, "is of model test_vit, and this run is of test_resnet"),
        ({"resume": "none"}, r"--resume none: .* holds checkpoints of another run .*another --out"),
    ],
)
def test_another_run_needs_another_folder(changes: dict[str, Any], message: str, tiny: Make) -> None:
    train_only(tiny(max_steps=2))
    with pytest.raises(UsageError, match=message):
        train_only(tiny(max_steps=4, **changes))


def test_other_images_need_another_folder(
    tiny: Make, image_folder: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    """A larger share held out would be evaluated on images that were trained on."""
    data = {"path": str(image_folder / "train"), "val_fraction": 0.25}
    first = tiny(max_steps=3, data=data)
    train_only(first)
    with pytest.raises(UsageError, match=r"\(24 for training, 8 held out .*another --out") as refusal:
        train_only(tiny(max_steps=4, data={**data, "val_fraction": 0.5}))
    assert "\n" not in str(refusal.value)
    # The same number of other images.
    other = tmp_path / "other"
    shutil.copytree(image_folder / "train", other)
    (other / "red" / "3.png").rename(other / "red" / "33.png")
    with pytest.raises(UsageError, match="trained on other images"):
        train_only(tiny(max_steps=4, data={**data, "path": str(other)}))
    # From another run it is a choice, and its price is told.
    train_only(
        tiny(max_steps=4, out=tmp_path / "second", resume=str(first.out), data={**data, "path": str(other)})
    )
    assert "some that are held out now may have been trained on" in told.text


def test_other_images_take_over_no_place_and_no_bad_ones(
    tiny: Make, image_folder: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    """Both belong to the images of the other run: numbers of files, and how many of them were seen."""
    data = {"path": str(image_folder), "max_bad_fraction": 0.2}
    first = tiny(max_steps=2, data=data)  # of 4 in the epoch
    trainer = Trainer(first, CPU)
    state = trainer.loader.state_dict() | {"bad": [[3, "broken"], [7, "broken"]]}
    trainer.loader.load_state_dict(state)

    trainer.run()
    assert trainer.loader.state_dict()["bad"] == [[3, "broken"], [7, "broken"]]
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    victim = sorted((other / "train").rglob("*.png"))[0]
    victim.rename(victim.with_name("zebra.png"))
    cfg = tiny(max_steps=8, out=tmp_path / "second", resume=str(first.out), data={**data, "path": str(other)})
    resumed = train_only(cfg)
    assert resumed.loader.bad_images == []
    assert [row["epoch"] for row in rows_of(cfg)] == [0] * 4 + [1] * 2
    assert "the epoch starts over, without the list of bad images" in told.text


def test_a_folder_that_was_moved_is_the_same_data(tiny: Make, image_folder: Path, tmp_path: Path) -> None:
    for path in (image_folder, image_folder / "train"):  # with splits of its own, and without
        moved = tmp_path / f"moved-{path.name}"
        shutil.copytree(path, moved)
        identities = [Trainer(tiny(data={"path": str(folder)}), CPU).data for folder in (path, moved)]
        assert identities[0] == identities[1]


def test_a_folder_with_other_checkpoints_takes_none_from_elsewhere(tiny: Make, tmp_path: Path) -> None:
    """The newest are kept by step: the ones in there would outlive those of the new course."""
    source = tiny(out=tmp_path / "source", max_steps=2)
    train_only(source)
    cfg = tiny(max_steps=6, checkpoint_every=2)
    train_only(cfg)
    assert cfg.out is not None
    folder = cfg.out / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    for path in (source.out, folder / "step-00000002"):
        with pytest.raises(UsageError, match=r"another run \(step-00000006\); choose another --out"):
            train_only(tiny(max_steps=8, resume=str(path)))
    assert sorted(path.name for path in folder.iterdir()) == names
    train_only(tiny(max_steps=8, resume=str(folder / "step-00000006")))
    assert rows_of(cfg)[-1]["step"] == 8


def test_another_batch_size_in_mid_epoch_goes_on_at_the_next_whole_batch(tiny: Make) -> None:
    train_only(tiny(max_steps=3))  # 24 of 32 images; both batches of 16 have begun
    cfg = tiny(max_steps=6, data={"batch_size": 16})
    train_only(cfg)
    assert [row["epoch"] for row in rows_of(cfg)] == [0, 0, 0, 1, 1, 2]


def test_another_batch_size_keeps_the_epochs(tiny: Make) -> None:
    """Resumed between epochs: evaluations are still due when an epoch ends, and epochs count on."""
    train_only(tiny(max_steps=4))  # one epoch of 32 images
    cfg = tiny(max_steps=10, data={"batch_size": 16}, eval={"every": 1})
    train_only(cfg)
    assert [row["epoch"] for row in rows_of(cfg)] == [0] * 4 + [1, 1, 2, 2, 3, 3]
    assert [(row["step"], row["epoch"]) for row in rows_of(cfg, "eval")] == [(4, 1), (6, 2), (8, 3)]


@pytest.mark.parametrize("signalled", [True, False])
def test_workers_that_a_signal_ended_are_no_failure(
    signalled: bool, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal reached the whole process group, so the trainer waits for a batch that will not come."""
    cfg = tiny()
    trainer = Trainer(cfg, CPU)
    take = type(trainer.loader).__iter__

    def broken(self: Any) -> Any:
        for number, batch in enumerate(take(self)):
            if number == 2:
                if signalled:
                    signal.raise_signal(signal.SIGTERM)
                raise RunError("a data-loading worker died")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.loader), "__iter__", broken)
        if signalled:
            with pytest.raises(Interrupted, match="SIGTERM after step 2 of 12; checkpoint saved"):
                trainer.run()
        else:
            with pytest.raises(RunError, match="worker died"):
                trainer.run()
    assert (trainer.run_dir / "checkpoints" / "step-00000002").exists() == signalled
    train_only(cfg)
    assert [row["step"] for row in rows_of(cfg)] == list(range(1, 13))
