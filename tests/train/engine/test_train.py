"""The trainer on tiny configurations: exact resume, evaluation without a trace, collapse, bad steps."""

import dataclasses
import itertools
import json
import shutil
import signal
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image
from training import CPU, course_of, rows_of, saved, spoil, train_only

from lejepa_fast.errors import RunError
from lejepa_fast.train import config, evaluate, export
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.checkpoint.trained_model import export_encoder
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.engine.out_of_memory import describe
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.evaluation.backbones import evaluate_backbone, load_backbone
from lejepa_fast.train.evaluation.protocol import evaluate_model, open_evaluation, open_splits
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.pretrain import pretrain
from lejepa_fast.train.runtime import files
from lejepa_fast.train.runtime.signals import Interrupted
from lejepa_fast.train.runtime.world import World

pytestmark = pytest.mark.usefixtures("white_figures")
NORMED = {"name": "test_resnet", "projector_norm": "batch"}  # with running statistics

# ---- resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "stop", "signum", "workers", "backend"),
    [
        # Drop path draws from the global generator; exactly between two epochs.
        ({"name": "test_vit", "drop_path": 0.3}, 4, signal.SIGINT, 0, "torchvision"),
        # Running statistics; loader threads that are ahead of the training, in mid-epoch.
        (NORMED | {"drop_path": 0.2}, 5, signal.SIGTERM, 2, "torchvision"),
        ({"name": "test_vit"}, 5, signal.SIGTERM, 2, "dali"),
    ],
)
def test_resume_is_exact(model, stop, signum, workers, backend, tiny, monkeypatch):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    cfg = tiny(model=model, data={"workers": workers, "backend": backend})
    straight = dataclasses.replace(cfg, out=cfg.out.with_name("straight"))
    whole = train_only(straight)
    states = random_state.capture_rng()
    train_step = Trainer.train_step

    def signaled(self, views, epoch):
        if self.step + 1 == stop:
            signal.raise_signal(signum)
        train_step(self, views, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signaled)
        with pytest.raises(Interrupted, match=f"{signum.name} after step {stop} of 12; checkpoint saved in"):
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


# ---- images of more than 8 bits ----------------------------------------------------------------------


@pytest.mark.parametrize(("bit_depth", "expected"), [("auto", (0.0, 4095.0)), ("16", (0.0, 65535.0))])
def test_the_range_of_values_is_chosen_once_and_goes_with_the_run(bit_depth, expected, tiny, tmp_path):
    for name, largest in (("train", 4000), ("other", 60_000)):
        (tmp_path / name).mkdir()
        for number in range(20):
            pixels = np.full((40, 40), largest - number, "uint16")
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    trainer = Trainer(tiny(data={"path": str(tmp_path / "train"), "bit_depth": bit_depth}), CPU)
    assert trainer.cfg.data.value_range == expected
    assert trainer.train_source.value_range == trainer.val_source.value_range == expected
    other = dataclasses.replace(trainer.cfg.data, path=str(tmp_path / "other"))
    assert open_splits(other)[1].value_range == expected
    export_encoder(trainer.model.encoder, trainer.cfg, 0, tmp_path)
    assert json.loads((tmp_path / "encoder.json").read_text())["input"]["value_range"] == list(expected)


def test_a_whole_run_on_images_of_two_channels(tiny, tmp_path):
    for split, count in (("train", 12), ("val", 4)):
        for label in range(2):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(number).integers(0, 256, (2, 40, 40)) // (1 + label)
                tifffile.imwrite(folder / f"{number}.tif", pixels.astype("uint8"))
    cfg = tiny(data={"path": str(tmp_path), "channels": 2, "backend": "auto", "workers": 1})
    assert pretrain(cfg, CPU).exists()
    encoder = timm.create_model(f"local-dir:{cfg.out}")
    assert encoder(torch.zeros(1, 2, 32, 32)).ndim == 2
    described = timm.data.resolve_model_data_config(encoder)
    assert described["input_size"] == (2, 32, 32)
    assert tuple(described["mean"]) == (0.5, 0.5)
    assert evaluate.main(["--checkpoint", str(cfg.out), "--no-linear"]) == 0


# ---- evaluation, report, export ----------------------------------------------------------------------


def test_evaluation_leaves_no_trace(tiny, tmp_path):
    """With drop path and BatchNorm in play, probes after each epoch change no bit of the training."""
    options = {"model": {"name": "test_resnet", "projector_norm": "batch", "drop_path": 0.2}, "max_steps": 9}
    evals = ({"every": n, "linear_steps": 5} for n in (0, 1))
    quiet, watched = (tiny(out=tmp_path / str(e["every"]), eval=e, **options) for e in evals)
    trainers = [train_only(cfg) for cfg in (quiet, watched)]
    assert [row["step"] for row in rows_of(watched, "eval")] == [4, 8]
    assert all(row["linear"] is not None for row in rows_of(watched, "eval"))
    assert not rows_of(quiet, "eval")
    assert course_of(quiet) == course_of(watched)
    for name, value in trainers[0].model.state_dict().items():
        assert torch.equal(trainers[1].model.state_dict()[name], value), name


def test_held_out_images_are_the_same_for_every_seed_and_for_the_command(tiny, image_folder):
    """Where the data has no val split of its own: no image is trained on by one and judged by the other."""

    def images(*sources):
        return [[source.describe(i) for i in range(len(source))] for source in sources]

    cfg = tiny(data={"path": str(image_folder / "train"), "val_fraction": 0.25})
    train, val = by_command = images(*open_splits(cfg.data))
    assert (len(val), set(train) & set(val)) == (8, set())
    for seed in (0, 3):
        trainer = Trainer(dataclasses.replace(cfg, seed=seed), CPU)
        assert images(trainer.train_source, trainer.val_source) == by_command


def test_a_whole_run_and_a_second_start(tiny, monkeypatch):
    """All files of a run; a finished run only evaluates.

    During the training on some of the images, one at a time, although BatchNorm's statistics for the
    untrained encoder need several; at the end on all.
    """
    seen = []

    def noted(*args, **kwargs):
        seen.append(evaluate_model(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr("lejepa_fast.train.evaluation.protocol.evaluate_model", noted)
    evaluation = {"every": 2, "train_images": 9, "batch_size": 1, "backbone": ("test_resnet:untrained",)}
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
    beside = summary["backbones"]["test_resnet:untrained"]
    assert beside["weights"] == "untrained"
    backbone = load_backbone("test_resnet:untrained", image_size=32, seed=cfg.seed)
    alone = evaluate_backbone(backbone, *open_evaluation(cfg), cfg, device=CPU.device)
    assert (beside["knn"], beside["linear"]) == (alone.knn, alone.linear)
    assert [row["step"] for row in rows_of(cfg, "eval")] == [8, 12]
    assert all(0 <= row[probe] <= 100 for row in rows_of(cfg, "eval") for probe in ("knn", "linear"))
    assert json.loads((out / "config.json").read_text())["optim"]["weight_decay"] == 0.05
    assert list((out / "tensorboard").glob("events.*"))
    assert {"encoder.safetensors", "encoder.json"} <= {path.name for path in out.iterdir()}
    assert not list(out.rglob(f"*{files.UNFINISHED}"))

    course, weights = course_of(cfg), (out / "encoder.safetensors").read_bytes()
    converted = out / "converted" / "mine.safetensors"
    assert export.main(["--checkpoint", str(out), "--out", str(converted)]) == 0
    assert converted.read_bytes() == weights
    assert converted.with_suffix(".json").read_text() == (out / "encoder.json").read_text()
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


def test_a_backbone_that_fails_does_not_cost_the_report(tiny, monkeypatch, caplog):
    both = ("test_resnet:untrained", "test_vit:untrained")
    cfg = tiny(max_steps=1, eval={"linear_steps": 0, "backbone": both})
    for failure in (RunError("the encoder gives NaN"), torch.OutOfMemoryError("CUDA out of memory.")):

        def failing(backbone, *arguments, failure=failure, **options):
            if backbone.name == "test_vit":
                raise failure
            return evaluate_backbone(backbone, *arguments, **options)

        monkeypatch.setattr("lejepa_fast.train.evaluation.backbones.evaluate_backbone", failing)
        page = pretrain(cfg, CPU)
        assert list(json.loads((page.parent / "summary.json").read_text())["backbones"]) == [both[0]]
        assert f"the report lacks {both[1]}: {failure}" in caplog.text


def test_an_evaluation_that_ends_the_run_is_not_tried_for_ever(tiny, monkeypatch, caplog):
    cfg = tiny(eval={"every": 1, "linear_steps": 0}, max_steps=9)

    with monkeypatch.context() as patch:
        failing = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
        patch.setattr("lejepa_fast.train.evaluation.protocol.evaluate_model", failing)
        for _ in range(2):
            with pytest.raises(RunError, match="out of memory; what helps: "):
                train_only(cfg)
    train_only(cfg)
    assert "skipping the evaluation after epoch 1: it ended the run 2 times" in caplog.text
    assert [row["step"] for row in rows_of(cfg, "eval")] == [8]
    assert [row["step"] for row in rows_of(cfg)] == list(range(1, 10))


def test_a_signal_during_an_evaluation_leaves_at_once(tiny, monkeypatch):
    cfg = tiny(eval={"every": 1, "linear_steps": 0})

    def signaled(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the evaluation went on")

    with monkeypatch.context() as patch:
        patch.setattr("lejepa_fast.train.evaluation.protocol.evaluate_model", signaled)
        with pytest.raises(Interrupted, match="during the evaluation after step 4 of 12; checkpoint saved"):
            train_only(cfg)
    train_only(cfg)  # continues with the evaluation that was broken off
    assert [row["step"] for row in rows_of(cfg, "eval")] == [4, 8]
    assert [row["step"] for row in rows_of(cfg)] == list(range(1, 13))


# ---- collapse ----------------------------------------------------------------------------------------


def test_without_sigreg_the_embeddings_collapse(tiny, tmp_path):
    """The embedding std falls by 100x with lambda = 0, and not with SIGReg."""
    fall = {}
    for lambd in (0.0, 0.05):
        cfg = tiny(
            out=tmp_path / str(lambd),
            loss={"lambd": lambd},
            model={"projector_norm": "none", "projector_layers": 1},
            optim={"lr": 1e-2, "warmup_fraction": 0.0},
            max_steps=40,
        )
        train_only(cfg)
        spread = [row["embedding_std"] for row in rows_of(cfg)]
        fall[lambd] = spread[0] / spread[-1]
    assert fall[0.0] > 100
    assert fall[0.05] < 5


# ---- bad steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_every", [1, 1000], ids=["noticed by a row", "noticed by a save"])
def test_a_run_folder_that_is_removed_ends_the_run(rows_every, tiny, monkeypatch):
    """And is not made again, by a checkpoint that has neither settings nor rows beside it."""
    cfg = tiny(log_every=rows_every, checkpoint_every=4)
    train_step = Trainer.train_step

    def removed(self, views, epoch):
        train_step(self, views, epoch)
        if self.step == 3:
            shutil.rmtree(cfg.out)

    monkeypatch.setattr(Trainer, "train_step", removed)
    with pytest.raises(RunError, match=r"removed or moved during the run; .*choose another --out"):
        train_only(cfg)
    assert not cfg.out.exists()


def test_an_epoch_that_ends_early_is_an_error(tiny):
    """The other ranks would wait for this one in a collective."""
    trainer = Trainer(tiny(), CPU)
    batches = trainer.loader._backend.batches
    trainer.loader._backend.batches = lambda keys, bad: batches(itertools.islice(keys, 3), bad)
    with pytest.raises(RunError, match=r"epoch 0 ended 1 of 4 batches early on rank 0: .*--data\.backend"):
        trainer.run()


@pytest.mark.parametrize(
    ("images", "lags"),
    [(True, False), (False, False), (True, True)],
    ids=["bad images", "bad loss", "bad images, as on a GPU"],
)
def test_a_bad_step_is_skipped_and_three_in_a_row_end_the_run(images, lags, tiny, caplog):
    """Two in a row are borne, and a third later. With a lag, the host learns of it after the next step."""
    cfg = tiny(model=NORMED, average={"kind": "ema", "decay": 0.7}, checkpoint_every=4)
    trainer = Trainer(cfg, CPU)
    trainer.guard.lag = lags
    bad = {2, 3, 5, 7, 8, 9}
    spoil(trainer, bad, None if images else torch.nan)
    states: list[dict[str, torch.Tensor]] = []
    step = trainer.train_step

    def snapshot():
        states.append({name: tensor.clone() for name, tensor in trainer._tensors().items()})

    def followed(views, epoch):
        snapshot()
        step(views, epoch)
        snapshot()

    trainer.train_step = followed
    goes_on = ["num_batches", "loss.", "average.", *(["running"] if lags else [])]  # also in a skipped step
    with pytest.raises(RunError, match=r"3 steps in a row .*rank 0, step 9, loss nan.*lower --lr"):
        trainer.run()
    assert trainer.guard.skipped == len(bad)
    assert "rank 0, step 2, loss nan" in caplog.text
    for number, (before, after) in enumerate(zip(states[::2], states[1::2], strict=False), start=1):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        kept = {name for name in before if not any(word in name for word in goes_on)}
        assert len(changed & kept) == 0 if number in bad else len(changed & kept) > 20
    assert len(states) == (19 if lags else 17)  # the last step did not return
    for tensors in (trainer.model.state_dict(), saved(cfg, 8, "average")):
        assert all(torch.isfinite(value).all() for value in tensors.values())
    losses = [row["loss"] is None for row in rows_of(cfg)]
    assert losses[:8] == [step in bad for step in range(1, 9)]
    assert checkpoint.find_checkpoint(trainer.run_dir)[1]["step"] == 8


# ---- out of memory -----------------------------------------------------------------------------------


def test_out_of_memory_says_which_settings_help_and_how_to_plan_the_run(tiny, monkeypatch):
    cfg = tiny(parallel={"activation_checkpointing": "selective"}, average={"kind": "swa"})

    def error_of(failure):
        trainer = Trainer(cfg, CPU)
        monkeypatch.setattr(trainer, "wrapped", Mock(side_effect=failure))
        with pytest.raises(RuntimeError) as refusal:
            trainer.run()
        return refusal.value

    other = RuntimeError("shapes do not fit")
    assert error_of(other) is other
    with monkeypatch.context() as patch:  # no memory for the average, and none of the machine's
        patch.setattr(WeightAverage, "__init__", lambda *args, **options: torch.empty(2**60))
        with pytest.raises(RunError, match=r"^out of memory; what helps: .*no --average ema"):
            Trainer(dataclasses.replace(cfg, average=config.AverageConfig("ema")), CPU)
    error = error_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."))
    assert isinstance(error, RunError)
    assert str(error) == (
        "out of memory; what helps: --parallel.activation-checkpointing full (now selective), no "
        "--average swa, a smaller --batch-size (now 8, 8 images per process), more processes with "
        f"--parallel.strategy fsdp; what fits: lejepa-plan --config {cfg.out}/config.json --gpus 1 "
        "--images 32 --precision fp32"
    )
    assert "lejepa-plan with this run's options, --gpus" in describe(tiny(epochs=7), CPU, "single", 32)


def test_what_helps_several_ranks_against_out_of_memory(tiny):
    cfg, world = tiny(parallel={"strategy": "fsdp", "replicate": 2}), World(CPU.device, size=4)
    told = describe(cfg, world, "fsdp", 500)
    assert "(now none), fewer groups than --parallel.replicate 2, a smaller" in told
    assert told.count("strategy fsdp") == 0  # it is on
    assert told.endswith("--gpus 4 --images 500 --precision fp32")
    told = describe(dataclasses.replace(cfg, parallel=config.ParallelConfig()), world, "ddp", 500)
    assert "--parallel.strategy fsdp (now ddp)" in told
