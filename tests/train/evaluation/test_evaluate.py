"""Embedding and evaluating a model without a trace in it, and the command on a checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from lejepa_fast.data import MultiCropRecipe, eval_loader, open_source
from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train import evaluate
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.checkpoint.saving import Saver
from lejepa_fast.train.config import Config, DataConfig, EvalConfig, ModelConfig, to_dict
from lejepa_fast.train.evaluation.embeddings import calibrate_batchnorm, embed_source
from lejepa_fast.train.model.model import LeJEPAModel, build_model
from lejepa_fast.train.runtime.world import World

SCRIPT = Path(__file__).parents[3] / "train" / "evaluate.py"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- embedding -----------------------------------------------------------------------------------


def tiny_model(encoder_name: str, **kwargs: object) -> LeJEPAModel:
    torch.manual_seed(0)
    encoder = timm.create_model(encoder_name, num_classes=0, **kwargs)
    projector = nn.Sequential(
        nn.Linear(encoder.num_features, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8)
    )
    return LeJEPAModel(encoder, projector, num_global=2)


def batches(
    count: int, batch: int, *, size: int = 32, last: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    sizes = [batch] * count + ([last] if last else [])
    return [(randn(n, 3, size, size, seed=i), torch.arange(n) % 2) for i, n in enumerate(sizes)]


def all_random_states() -> tuple[object, ...]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return (
        random.getstate(),
        numpy_state[1].tobytes(),
        numpy_state[2],
        torch.get_rng_state().numpy().tobytes(),
    )


def test_embedding_leaves_no_trace_and_equals_evaluation_mode() -> None:
    model = tiny_model("test_resnet")
    model.train()
    model.projector[1].eval()  # a part that the caller has frozen
    model.projector[0].weight.grad = torch.ones_like(model.projector[0].weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    data, states = batches(2, 5, last=3), all_random_states()

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        torch.rand(1)  # as a DataLoader does on every pass
        yield from data

    with torch.autocast("cpu", dtype=torch.bfloat16):  # the training's autocast must not leak in
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


def test_modes_return_after_an_error() -> None:
    model = tiny_model("test_resnet").train()
    with pytest.raises(RuntimeError):
        embed_source(model, [(torch.zeros(2, 5, 32, 32), torch.zeros(2))], "cpu")
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "pooled_by"),
    [({}, "cls"), ({"reg_tokens": 2}, "cls"), ({"class_token": False, "global_pool": "avg"}, "patches")],
)
def test_vit_probe_takes_the_last_two_blocks(options: dict, pooled_by: str) -> None:
    model = tiny_model("test_vit", img_size=32, **options).eval()
    images = randn(4, 3, 32, 32)
    found = embed_source(model, [(images, torch.zeros(4))], "cpu")
    outputs: list[Tensor] = []
    hooks = [
        b.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for b in model.encoder.blocks[-2:]
    ]
    with torch.no_grad():
        features, z = model.embed(images)
        tokens = [model.encoder.norm(out) for out in outputs]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.z, z)
    expected = [t[:, 0] if pooled_by == "cls" else t.mean(dim=1) for t in tokens]
    torch.testing.assert_close(found.probe, torch.cat(expected, dim=1))


def test_embedding_refuses_nan_and_nothing() -> None:
    model = tiny_model("test_resnet")
    with pytest.raises(UsageError, match="no image to embed"):
        embed_source(model, [], "cpu")
    nn.init.constant_(model.projector[3].bias, float("nan"))
    with pytest.raises(RunError, match="projector gives NaN"):
        embed_source(model, batches(1, 2), "cpu")


def test_calibration_measures_the_training_images() -> None:
    model = tiny_model("test_resnet").train()
    before, parameters = all_random_states(), [p.clone() for p in model.parameters()]
    data = batches(3, 4, last=3)  # the last one is smaller and must not count
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
    assert calibrate_batchnorm(nn.Linear(3, 3), [(torch.zeros(4, 3), None)], "cpu") == 0
    with pytest.raises(UsageError, match="at least 2 training images"):
        calibrate_batchnorm(tiny_model("test_resnet"), batches(2, 1), "cpu")


# ---- a whole model and a checkpoint --------------------------------------------------------------


def write_images(folder: Path, counts: dict[str, int], *, seed: int, size: int = 40) -> None:
    """Noisy images with a colour per class (sub-folder), or all in one folder for the class ''."""
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


def tiny_config(data: Path) -> Config:
    return Config(
        data=DataConfig(path=str(data), batch_size=8, workers=0, backend="torchvision"),
        crops=MultiCropRecipe(global_size=32, local_size=16, local_crops=2, blur_kernel=3),
        model=ModelConfig(name="test_resnet", projector_hidden=16, projector_layers=2, projector_dim=8),
        eval=EvalConfig(batch_size=8, k=5),
        seed=3,
    )


def test_evaluate_model_on_labelled_images(images: Path) -> None:
    cfg = tiny_config(images)
    train, val = open_source(str(images), "train"), open_source(str(images), "val")
    result = evaluate.evaluate_untrained(cfg, train, val, device="cpu")
    assert result.knn is not None
    assert result.linear is not None
    assert result.knn >= 90.0  # colours: even random features tell them apart
    assert result.linear >= 75.0
    assert result.majority == pytest.approx(50.0)
    assert result.chance == pytest.approx(100 / 3)
    assert (result.n_train, result.n_val, result.num_classes, result.image_size) == (32, 12, 3, 32)
    assert result.z_val.shape == (12, 8)
    assert result.features_val.shape[0] == 12
    assert result.no_labels_because is None
    quick = evaluate.evaluate_model(
        build_model(cfg), train, val, cfg.eval, recipe=cfg.crops, device="cpu", linear=False
    )
    assert quick.knn is not None
    assert quick.linear is None


def test_untrained_baseline_has_the_starting_weights_and_calibrated_statistics(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config(images)
    seen: list[LeJEPAModel] = []
    monkeypatch.setattr(evaluate, "evaluate_model", lambda model, *_args, **_kwargs: seen.append(model))
    train = open_source(str(images), "train")
    evaluate.evaluate_untrained(cfg, train, train, device="cpu")
    fresh, baseline = build_model(cfg), seen[0]
    for (name, ours), theirs in zip(baseline.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    statistics = [n for n, b in baseline.named_buffers() if n.endswith("running_var")]
    assert statistics
    for name in statistics:
        assert not torch.equal(baseline.get_buffer(name), fresh.get_buffer(name)), name


def test_image_size_is_the_setting_or_the_global_crops(images: Path) -> None:
    cfg = tiny_config(images)
    train = open_source(str(images), "train")
    sizes = {}
    for wanted in (None, 48):
        options = dataclasses.replace(cfg.eval, image_size=wanted)
        result = evaluate.evaluate_model(
            build_model(cfg), train, train, options, recipe=cfg.crops, device="cpu", linear=False
        )
        sizes[wanted] = result.image_size, result.features_val
    assert (sizes[None][0], sizes[48][0]) == (32, 48)
    assert not torch.allclose(sizes[None][1], sizes[48][1])


def test_training_goes_on_as_if_no_evaluation_had_been(images: Path) -> None:
    """Bit for bit, with dropout in the model and BatchNorm in training mode."""
    train, val = open_source(str(images), "train"), open_source(str(images), "val")
    cfg = tiny_config(images)

    def losses(evaluated: bool) -> list[float]:
        model = tiny_model("test_resnet").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(5)
        found = []
        for step in range(4):
            if evaluated and step == 2:
                evaluate.evaluate_model(model, train, val, cfg.eval, recipe=cfg.crops, device="cpu")
            loss = model.embed(torch.randn(6, 3, 32, 32))[1].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)


def test_unlabelled_images_get_the_statistics_and_a_reason(tmp_path: Path) -> None:
    write_images(tmp_path, {"": 24}, seed=0)
    train, val = open_source(str(tmp_path), "train"), open_source(str(tmp_path), "val")
    cfg = tiny_config(tmp_path)
    result = evaluate.evaluate_untrained(cfg, train, val, device="cpu")
    assert result.knn is None
    assert result.linear is None
    assert result.num_classes is None
    assert result.chance is None
    assert "have no class" in (result.no_labels_because or "")
    assert np.isfinite([result.embedding_std, result.effective_rank, result.sigreg]).all()


def test_one_validation_image_is_refused(images: Path) -> None:
    train = open_source(str(images), "train")
    cfg = tiny_config(images)
    with pytest.raises(UsageError, match="at least 2 validation images"):
        evaluate.evaluate_model(
            build_model(cfg), train, train.subset([0]), cfg.eval, recipe=cfg.crops, device="cpu"
        )


def save_run(run_dir: Path, cfg: Config, *, step: int = 12) -> Path:
    """A run folder as the trainer leaves it, with a model that was moved away from its start."""
    model = build_model(cfg)
    source = open_source(cfg.data.path, "train")
    loader = eval_loader(source, image_size=32, batch_size=8)
    calibrate_batchnorm(model, loader, "cpu")
    with torch.no_grad():
        model.projector[-1].bias += 1.0
    (run_dir / "metrics.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 5, "loss": 1.0, "images_per_second": 10.0}\n'
        '{"kind": "train", "step": 10, "loss": 0.5, "images_per_second": 30.0}\n'
        '{"kind": "train", "step": 99, "loss": 0.1, "images_per_second": 900.0}\n',
        encoding="utf-8",
    )
    return save_model(run_dir / "checkpoints", step, model, cfg)


def save_model(folder: Path, step: int, model: LeJEPAModel, cfg: Config) -> Path:
    saver = Saver(folder, World(torch.device("cpu")), keep=2)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    saver.start(step, tensors, {"config": to_dict(cfg)})
    saver.wait()
    return checkpoint.checkpoint_path(folder, step)


def test_command_evaluates_a_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = tiny_config(images)
    path = save_run(tmp_path / "run", cfg)
    assert evaluate.main(["--checkpoint", str(tmp_path / "run"), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "untrained" in printed
    assert "linear probe accuracy" in printed
    folder = tmp_path / "run" / "evaluation" / path.stem / "report"
    assert str(folder / "report.html") in printed
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 12
    assert summary["seed"] == 3
    assert summary["images_per_second"] == 20.0  # the row beyond the checkpoint's step does not count
    # A shift of all embeddings changes SIGReg and nothing that is measured on features.
    assert summary["knn_trained"] == summary["knn_untrained"]
    assert summary["sigreg_val"] > summary["sigreg_val_untrained"]
    assert not (tmp_path / "run" / "report").exists()


def test_command_takes_a_checkpoint_other_data_and_another_folder(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_run(tmp_path / "run", tiny_config(images))
    write_images(tmp_path / "flat", {"": 20}, seed=4, size=24)  # smaller than the crops, and unlabelled
    arguments = ["--checkpoint", str(path), "--data", str(tmp_path / "flat"), "--out", str(tmp_path / "out")]
    assert evaluate.main([*arguments, "--workers", "0", "--no-linear"]) == 0
    assert "have no class" in capsys.readouterr().out
    assert (tmp_path / "out" / "report" / "report.html").is_file()
    assert not (tmp_path / "out" / "report" / "knn.png").exists()


def foreign_files(folder: Path, cfg: Config) -> dict[str, tuple[Path, str]]:
    text, other = folder / "notes.pt", folder / "other.pt"
    text.write_text("no checkpoint", encoding="utf-8")
    torch.save({"state_dict": {}}, other)
    (folder / "empty").mkdir()
    wide = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, projector_dim=9))
    mixed = save_model(folder / "mixed", 1, build_model(cfg), wide)
    return {
        "missing": (folder / "nowhere", "does not exist"),
        "empty folder": (folder / "empty", "holds no checkpoint"),
        "text": (text, "not a checkpoint of lejepa_fast"),
        "another program's": (other, "not a checkpoint of lejepa_fast"),
        "weights of another model": (mixed, "does not hold the model"),
    }


def test_command_refuses_what_is_no_checkpoint(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (path, message) in foreign_files(tmp_path, tiny_config(images)).items():
        assert evaluate.main(["--checkpoint", str(path)]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("error: "), name
        assert message in error, name
        assert str(path) in error, name
        assert error.count("\n") == 1, name


def test_command_refuses_missing_data(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_run(tmp_path / "run", tiny_config(images))
    assert evaluate.main(["--checkpoint", str(path), "--data", str(tmp_path / "gone")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run" / "evaluation").exists()


def test_script_runs_by_its_path_and_exits_with_2(tmp_path: Path) -> None:
    arguments = [sys.executable, str(SCRIPT), "--checkpoint", str(tmp_path / "nowhere")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: checkpoint {tmp_path / 'nowhere'} does not exist; " + (
        "give a run folder, or a folder checkpoints/step-*\n"
    )


def test_an_unknown_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--checkpoint", "x", "--imagesize", "3"]) == 2
    assert capsys.readouterr().err == "error: unknown option --imagesize; did you mean --image-size?\n"
    assert evaluate.main([]) == 2
    error = capsys.readouterr().err
    assert "--checkpoint" in error
    assert error.count("\n") == 1


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pressed(options: evaluate.Options) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_checkpoint", pressed)
    assert evaluate.main(["--checkpoint", "x"]) == 130
    assert capsys.readouterr().err.startswith("interrupted; ")
