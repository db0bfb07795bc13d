"""Embedding and evaluating a model without side effects, and the command on a checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from lejepa_fast.data import MultiCropRecipe, open_source
from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train import evaluate as command
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.checkpoint.saving import Saver
from lejepa_fast.train.config import Config, DataConfig, EvalConfig, ModelConfig, to_dict
from lejepa_fast.train.evaluation import evaluate
from lejepa_fast.train.evaluation.embeddings import calibrate_batchnorm, embed_source
from lejepa_fast.train.model.model import LeJEPAModel, build_model
from lejepa_fast.train.runtime.world import World

SCRIPT = Path(__file__).parents[3] / "train" / "evaluate.py"


# ---- embeddings ----------------------------------------------------------------------------------


def tiny_model(encoder_name: str, **kwargs: Any) -> LeJEPAModel:
    torch.manual_seed(0)
    encoder = timm.create_model(encoder_name, num_classes=0, **kwargs)
    width = encoder.num_features
    projector = nn.Sequential(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
    return LeJEPAModel(encoder, projector, num_global=2)


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n) % 2) for n in sizes]


def all_random_states() -> tuple[object, ...]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], torch_state


def test_embedding_leaves_no_trace_and_equals_evaluation_mode() -> None:
    model = tiny_model("test_resnet")
    model.train()
    model.projector[1].eval()  # a part that the caller has frozen
    model.projector[0].weight.grad = torch.ones_like(model.projector[0].weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    data, states = batches(5, 5, 3), all_random_states()

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        torch.rand(1)  # as a DataLoader does on every pass
        yield from data

    with torch.autocast("cpu", dtype=torch.bfloat16):  # the training's autocast must not have an effect
        found = embed_source(model, loader(), "cpu")
    assert all_random_states() == states
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.projector[0].weight.grad, torch.ones_like(model.projector[0].weight))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not found.features.requires_grad
    with torch.no_grad():
        features, z = model.eval().embed(torch.cat([images for images, _ in data]))
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.z, z, rtol=1e-4, atol=1e-5)
    assert found.targets.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0]
    assert found.probe is found.features  # a CNN's probe takes the pooled features, without a copy


@pytest.mark.parametrize(
    ("options", "cls"),
    [({}, True), ({"reg_tokens": 2}, True), ({"class_token": False, "global_pool": "avg"}, False)],
)
def test_vit_probe_takes_the_last_two_blocks(options: dict[str, Any], cls: bool) -> None:
    model = tiny_model("test_vit", img_size=32, **options).eval()
    data = batches(4)
    found = embed_source(model, data, "cpu")
    outputs: list[Tensor] = []
    for block in model.encoder.blocks[-2:]:
        block.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    with torch.no_grad():
        features, z = model.embed(data[0][0])
        tokens = [model.encoder.norm(out) for out in outputs]
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.z, z)
    expected = [t[:, 0] if cls else t.mean(dim=1) for t in tokens]
    torch.testing.assert_close(found.probe, torch.cat(expected, dim=1))


def test_embedding_refuses_nan_and_nothing_and_restores_modes_after_an_error() -> None:
    model = tiny_model("test_resnet").train()
    with pytest.raises(RuntimeError):
        embed_source(model, [(torch.zeros(2, 5, 32, 32), torch.zeros(2))], "cpu")
    assert all(module.training for module in model.modules())
    with pytest.raises(UsageError, match="no image to embed"):
        embed_source(model, [], "cpu")
    nn.init.constant_(model.projector[3].bias, float("nan"))
    with pytest.raises(RunError, match="projector gives NaN"):
        embed_source(model, batches(2), "cpu")


def test_calibration_measures_the_training_images() -> None:
    model = tiny_model("test_resnet").train()
    before, parameters = all_random_states(), [p.clone() for p in model.parameters()]
    data = batches(4, 4, 4, 3)  # the last one is smaller and must not count
    assert calibrate_batchnorm(model, data, "cpu") == 12
    assert all_random_states() == before  # no dropout acted
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert first.momentum == 0.1
    with torch.no_grad():
        activations = [model.encoder.conv1[0](images) for images, _ in data[:3]]
    mean = torch.stack([a.mean(dim=(0, 2, 3)) for a in activations]).mean(dim=0)
    variance = torch.stack([a.var(dim=(0, 2, 3)) for a in activations]).mean(dim=0)
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.running_var, variance, rtol=1e-4, atol=1e-6)
    # The projector's, too: the report shows the untrained embeddings.
    assert not torch.equal(model.projector[1].running_var, torch.ones(16))


def test_calibration_without_batchnorm_or_without_images() -> None:
    assert calibrate_batchnorm(nn.Linear(3, 3), [(torch.zeros(4, 3), torch.zeros(4))], "cpu") == 0
    with pytest.raises(UsageError, match="at least 2 training images"):
        calibrate_batchnorm(tiny_model("test_resnet"), batches(1, 1), "cpu")


# ---- evaluation of a model -----------------------------------------------------------------------


def write_images(folder: Path, counts: dict[str, int], *, seed: int, size: int = 40) -> None:
    """Noisy images with a color per class (sub-folder), or all in one folder for the class ''."""
    noise = np.random.default_rng(seed)
    for index, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = noise.integers(0, 120, (size, size, 3))
            pixels[..., index % 3] += 110
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03d}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"blue": 14, "green": 10, "red": 8}, seed=0)
    write_images(root / "val", {"blue": 6, "green": 3, "red": 3}, seed=1)
    return root


def tiny_config(data: Path, **evaluation: Any) -> Config:
    return Config(
        data=DataConfig(path=str(data), batch_size=8, workers=0, backend="torchvision"),
        crops=MultiCropRecipe(global_size=32, local_size=16, local_crops=2, blur_kernel=3),
        model=ModelConfig(name="test_resnet", projector_hidden=16, projector_layers=2, projector_dim=8),
        eval=EvalConfig(batch_size=8, k=5, **evaluation),
        seed=3,
    )


def evaluate_run(cfg: Config, model: nn.Module | None = None, **options: Any) -> evaluate.EvalResult:
    """`evaluate_model` with the settings of a run, without the linear probe unless asked for."""
    options = {"recipe": cfg.crops, "device": "cpu", "data": cfg.data, "linear": False, **options}
    return evaluate.evaluate_model(
        model or build_model(cfg), *evaluate.open_splits(cfg.data), cfg.eval, **options
    )


def test_the_untrained_encoder_is_evaluated_on_labelled_images(images: Path) -> None:
    cfg = tiny_config(images)
    result = evaluate.evaluate_untrained(cfg, *evaluate.open_splits(cfg.data), device="cpu")
    assert result.knn is not None
    assert result.linear is not None
    assert result.knn >= 90.0  # colors: even random features tell them apart
    assert result.linear >= 75.0
    assert result.majority == pytest.approx(50.0)
    assert result.chance == pytest.approx(100 / 3)
    assert (result.n_train, result.n_val, result.num_classes, result.image_size) == (32, 12, 3, 32)
    assert (result.z_val.shape, len(result.features_val)) == ((12, 8), 12)
    # It is the run's starting point: the same weights, with BatchNorm statistics of the training images.
    model = build_model(cfg)
    plain = evaluate_run(cfg, model)
    calibrated = evaluate_run(cfg, model, calibrate=True)
    assert plain.linear is None
    assert not torch.allclose(plain.z_val, result.z_val, atol=1e-2)
    torch.testing.assert_close(calibrated.z_val, result.z_val, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), build_model(cfg).parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            assert not torch.equal(buffer, torch.ones_like(buffer)), name


def test_image_size_is_the_setting_or_that_of_the_global_crops(images: Path) -> None:
    default, larger = (evaluate_run(tiny_config(images, image_size=size)) for size in (None, 48))
    assert (default.image_size, larger.image_size) == (32, 48)
    assert not torch.allclose(default.features_val, larger.features_val)


def test_a_subset_of_the_training_images(images: Path) -> None:
    cfg = tiny_config(images)
    assert evaluate_run(cfg, train_images=9).n_train == 9
    assert evaluate_run(cfg, train_images=99).n_train == 32


def test_training_goes_on_as_if_no_evaluation_had_been(images: Path) -> None:
    """Bit for bit, with dropout in the model and BatchNorm in training mode."""

    def losses(evaluated: bool) -> list[float]:
        model = tiny_model("test_resnet").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(5)
        found = []
        for step in range(4):
            if evaluated and step == 2:
                evaluate_run(tiny_config(images), model, linear=True)
            loss = model.embed(torch.randn(6, 3, 32, 32))[1].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)


def test_unlabelled_images_get_the_statistics_and_a_reason(tmp_path: Path) -> None:
    write_images(tmp_path, {"": 24}, seed=0)
    result = evaluate_run(tiny_config(tmp_path), linear=True)
    assert (result.knn, result.linear, result.num_classes, result.chance) == (None, None, None, None)
    assert "have no class" in (result.no_labels_because or "")
    assert np.isfinite([result.embedding_std, result.effective_rank, result.sigreg]).all()


def test_one_validation_image_is_refused(images: Path) -> None:
    cfg = tiny_config(images)
    train = open_source(str(images), "train")
    with pytest.raises(UsageError, match="at least 2 validation images"):
        evaluate.evaluate_untrained(cfg, train, train.subset([0]), device="cpu")


# ---- the command ---------------------------------------------------------------------------------


def save_model(folder: Path, step: int, model: LeJEPAModel, cfg: Config) -> Path:
    saver = Saver(folder, World(torch.device("cpu")), keep=2)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    saver.start(step, tensors, {"config": to_dict(cfg)})
    saver.wait()
    return checkpoint.checkpoint_path(folder, step)


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as the trainer leaves it, with a model that was moved away from its start."""
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny_config(images)
    model = build_model(cfg)
    evaluate_run(cfg, model, calibrate=True)
    with torch.no_grad():
        model.projector[-1].bias += 1.0
    rows = [(5, 10.0), (10, 30.0), (99, 900.0)]
    texts = [json.dumps({"kind": "train", "step": s, "loss": 1.0, "images_per_second": r}) for s, r in rows]
    (folder / "metrics.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    save_model(folder / "checkpoints", 12, model, cfg)
    return folder


def test_command_evaluates_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--checkpoint", str(run), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "untrained" in printed
    assert "linear probe accuracy" in printed
    folder = run / "evaluation" / "step-00000012" / "report"
    assert str(folder / "report.html") in printed
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 12
    assert summary["seed"] == 3
    assert summary["images_per_second"] == 20.0  # the row beyond the checkpoint's step does not count
    # A shift of all embeddings changes SIGReg and nothing that is measured on features.
    assert summary["knn_trained"] == summary["knn_untrained"]
    assert summary["sigreg_val"] > summary["sigreg_val_untrained"]
    assert not (run / "report").exists()


def test_command_takes_a_checkpoint_other_data_and_another_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "flat", {"": 20}, seed=4, size=24)  # smaller than the crops, and unlabelled
    path, out = run / "checkpoints" / "step-00000012", tmp_path / "out"
    arguments = ["--checkpoint", str(path), "--data", str(tmp_path / "flat"), "--out", str(out)]
    assert command.main([*arguments, "--workers", "0", "--no-linear"]) == 0
    assert "have no class" in capsys.readouterr().out
    assert (out / "report" / "report.html").is_file()
    assert not (out / "report" / "knn.png").exists()


def test_command_refuses_what_is_no_checkpoint(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, cfg = tmp_path / "other.pt", tiny_config(images)
    torch.save({"state_dict": {}}, foreign)
    wide = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, projector_dim=9))
    mixed = save_model(tmp_path / "mixed", 1, build_model(cfg), wide)
    for path, message in ((foreign, "is a file; give a run folder"), (mixed, "does not hold the model")):
        assert command.main(["--checkpoint", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: checkpoint {path} ")
        assert message in error
        assert error.count("\n") == 1


def test_command_refuses_missing_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(run), "--data", str(tmp_path / "gone"), "--out", str(out)]
    assert command.main(arguments) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not out.exists()


def test_script_runs_by_its_path_and_exits_with_2(tmp_path: Path) -> None:
    arguments = [sys.executable, str(SCRIPT), "--checkpoint", str(tmp_path / "nowhere")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: checkpoint {tmp_path / 'nowhere'} does not exist; ")
    assert done.stderr.count("\n") == 1
