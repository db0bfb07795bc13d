"""What a resumed run takes from its checkpoint and what from its settings, and which folders it refuses."""

import shutil
from typing import Any

import pytest
from training import CPU, rows_of, train_only

from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.checkpoint import resume
from lejepa_fast.train.engine import optimization
from lejepa_fast.train.engine.trainer import Trainer


def test_a_setting_that_an_older_checkpoint_lacks_had_its_default(caplog):
    saved, current = (config.to_dict(config.Config()) for _ in range(2))
    del saved["eval"]["backbone"]
    saved["parallel"]["an_option_that_is_gone"] = False
    resume.log_changes(saved, current)
    assert not caplog.records
    resume.log_changes(saved, current | {"seed": 5})
    assert caplog.messages == ["seed: the checkpoint has 0, this run 5"]


def test_changed_settings_are_told_and_used(tiny, caplog):
    train_only(tiny(max_steps=4))
    changed = tiny(max_steps=8, optim={"lr": 0.5, "weight_decay": 0.3, "betas": (0.8, 0.95)})
    trainer = train_only(changed)
    assert "optim.lr: the checkpoint has 0.001, this run 0.5" in caplog.text
    assert "optim.weight_decay: the checkpoint has 0.05, this run 0.3" in caplog.text
    # From the first step on: one step of the warm-up, then the cosine over all eight.
    rates = [optimization.lr_factor(step, warmup=1, total=8, final=1e-3) * 0.5 for step in range(4, 8)]
    assert [row["lr"] for row in rows_of(changed)][4:] == pytest.approx(rates, rel=1e-12)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in trainer.optimizer.param_groups} == {(0.8, 0.95)}
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.5}


def test_another_run_needs_another_folder(tiny, tmp_path):
    """The newest are kept by step: checkpoints in there would outlive those of the new course."""
    source = tiny(out=tmp_path / "source", max_steps=2)
    train_only(source)
    cfg = tiny(max_steps=6, checkpoint_every=2)
    folder = train_only(cfg).run_dir / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    other = r"holds checkpoints of another run \(step-00000006\); choose another --out"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"seed": 2}, r"holds a run with seed 0, and this one has 2; choose another --out"),
        ({"model": {"name": "test_resnet"}}, "is of model test_vit, and this run is of test_resnet"),
        ({"resume": "none"}, f"--resume none: .* {other}"),
        ({"resume": str(source.out)}, other),
        ({"resume": str(folder / "step-00000002")}, other),
    ]
    for changes, message in refused:
        with pytest.raises(UsageError, match=message):
            train_only(tiny(max_steps=8, **changes))
    assert sorted(path.name for path in folder.iterdir()) == names
    train_only(tiny(max_steps=8, resume=str(folder / "step-00000006")))
    assert rows_of(cfg)[-1]["step"] == 8


def test_other_images_need_another_folder_and_take_over_no_place(tiny, image_folder, tmp_path, caplog):
    """Numbers of bad files, and how many files were seen, belong to the images of the other run."""
    data = {"path": str(image_folder / "train"), "val_fraction": 0.25, "max_bad_fraction": 0.2}
    first = tiny(max_steps=2, data=data)  # of 3 in the epoch
    trainer = Trainer(first, CPU)
    state = trainer.loader.state_dict() | {"bad": [[3, "broken"], [7, "broken"]]}
    trainer.loader.load_state_dict(state)
    trainer.run()
    assert trainer.loader.state_dict()["bad"] == [[3, "broken"], [7, "broken"]]
    # A larger share held out would be evaluated on images that were trained on.
    with pytest.raises(UsageError, match=r"\(24 for training, 8 held out .*another --out") as refusal:
        train_only(tiny(max_steps=4, data={**data, "val_fraction": 0.5}))
    assert "\n" not in str(refusal.value)
    # The same number of other images.
    other = tmp_path / "other"
    shutil.copytree(image_folder / "train", other)
    (other / "red" / "3.png").rename(other / "red" / "33.png")
    data["path"] = str(other)
    with pytest.raises(UsageError, match="trained on other images"):
        train_only(tiny(max_steps=4, data=data))
    # From another run it is a choice, and its price is told.
    cfg = tiny(max_steps=7, out=tmp_path / "second", resume=str(first.out), data=data)
    assert train_only(cfg).loader.bad_images == []
    assert [(row["step"], row["epoch"]) for row in rows_of(cfg)] == [(3, 0), (4, 0), (5, 0), (6, 1), (7, 1)]
    assert "some that are held out now may have been trained on; the epoch starts over" in caplog.text


def test_a_folder_that_was_moved_is_the_same_data(tiny, image_folder, tmp_path):
    for path in (image_folder, image_folder / "train"):  # with splits of its own, and without
        moved = tmp_path / f"moved-{path.name}"
        shutil.copytree(path, moved)
        identities = [
            Trainer(tiny(data={"path": str(folder)}), CPU).data_identity for folder in (path, moved)
        ]
        assert identities[0] == identities[1]


@pytest.mark.parametrize("before", [3, 4], ids=["in mid-epoch", "between epochs"])
def test_another_batch_size_keeps_the_epochs(before, tiny):
    """Evaluations are still due when an epoch ends, and epochs count on.

    Of 24 of 32 images it goes on at the next whole batch: both batches of 16 have begun.
    """
    train_only(tiny(max_steps=before))
    cfg = tiny(max_steps=before + 6, data={"batch_size": 16}, eval={"every": 1, "linear_steps": 0})
    train_only(cfg)
    assert [row["epoch"] for row in rows_of(cfg)] == [0] * before + [1, 1, 2, 2, 3, 3]
    evaluations = [(row["step"], row["epoch"]) for row in rows_of(cfg, "eval")]
    assert evaluations == [(before, 1), (before + 2, 2), (before + 4, 3)]
