"""Embedding and evaluating a model without side effects, and the command on a checkpoint."""

import copy
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from training import CPU, rows_of

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train import evaluate as command
from lejepa_fast.train import export
from lejepa_fast.train.config import DataConfig
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.evaluation import few_shot, protocol
from lejepa_fast.train.evaluation.embeddings import calibrate_batchnorm, embed_source
from lejepa_fast.train.model.model import LeJEPAModel, build_model
from lejepa_fast.train.pretrain import pretrain
from lejepa_fast.train.report import plots

SCRIPT = Path(__file__).parents[3] / "train" / "evaluate.py"


# ---- embeddings ----------------------------------------------------------------------------------


def tiny_model(encoder_name, **kwargs):
    torch.manual_seed(0)
    encoder = timm.create_model(encoder_name, num_classes=0, **kwargs)
    width = encoder.num_features
    projector = nn.Sequential(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
    return LeJEPAModel(encoder, projector, num_global=2)


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n) % 2) for n in sizes]


def test_embedding_leaves_no_trace_and_equals_evaluation_mode():
    model = tiny_model("test_resnet")
    model.train()
    model.projector[1].eval()  # a part that the caller has frozen
    model.projector[0].weight.grad = torch.ones_like(model.projector[0].weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    data, states = batches(5, 5, 3), random_state.capture_rng()

    def loader():
        torch.rand(1)  # as a DataLoader does on every pass
        yield from data

    with torch.autocast("cpu", dtype=torch.bfloat16):  # the training's autocast must not have an effect
        found = embed_source(model, loader(), "cpu")
    assert random_state.capture_rng() == states
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
    ("options", "cls", "count"),
    [
        ({}, True, 2),
        ({"reg_tokens": 2}, True, 2),
        ({"class_token": False, "global_pool": "avg"}, False, 2),
        ({"class_token": False, "global_pool": "avg"}, False, 4),
    ],
)
def test_vit_probe_takes_the_last_blocks(options, cls, count):
    model = tiny_model("test_vit", img_size=32, **options).eval()
    data = batches(4)
    found = embed_source(model, data, "cpu", **({} if count == 2 else {"linear_blocks": count}))
    outputs: list[Tensor] = []
    for block in model.encoder.blocks[-count:]:
        block.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    with torch.no_grad():
        features, z = model.embed(data[0][0])
        tokens = [model.encoder.norm(out) for out in outputs]
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.z, z)
    expected = [t[:, 0] if cls else t.mean(dim=1) for t in tokens]
    torch.testing.assert_close(found.probe, torch.cat(expected, dim=1))


def test_embedding_refuses_nan_and_nothing_and_restores_modes_after_an_error():
    model = tiny_model("test_resnet").train()
    with pytest.raises(RuntimeError):
        embed_source(model, [(torch.zeros(2, 5, 32, 32), torch.zeros(2))], "cpu")
    assert all(module.training for module in model.modules())
    with pytest.raises(UsageError, match="no image to embed"):
        embed_source(model, [], "cpu")
    nn.init.constant_(model.projector[3].bias, float("nan"))
    with pytest.raises(RunError, match="projector gives NaN"):
        embed_source(model, batches(2), "cpu")


def test_calibration_measures_the_training_images():
    model = tiny_model("test_resnet").train()
    before, parameters = random_state.capture_rng(), [p.clone() for p in model.parameters()]
    data = batches(4, 4, 4, 3)  # the last one is smaller and must not count
    calibrate_batchnorm(model, data, "cpu")
    assert random_state.capture_rng() == before  # no dropout acted
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
    calibrate_batchnorm(nn.Linear(3, 3), data, "cpu")  # without BatchNorm nothing happens
    with pytest.raises(UsageError, match="at least 2 training images"):
        calibrate_batchnorm(model, batches(1, 1), "cpu")


# ---- evaluation of a model -----------------------------------------------------------------------


def evaluate_run(cfg, model=None, **options):
    """`evaluate_model` with the settings of a run, without the linear probe unless asked for."""
    options = {"device": "cpu", "linear_steps": 0, **options}
    model = model or build_model(cfg)
    return protocol.evaluate_model(model, *protocol.open_splits(cfg.data), cfg, **options)


@pytest.fixture
def cfg(tiny):
    """Of 32 training and 12 validation images of two classes."""
    return tiny(model={"name": "test_resnet"}, seed=3)


@pytest.fixture
def unlabeled(tmp_path):
    """24 images without classes, smaller than the crops."""
    (tmp_path / "flat").mkdir()
    for i in range(24):
        Image.new("RGB", (24, 24), (10 * i, 99, 0)).save(tmp_path / "flat" / f"{i}.png")
    return str(tmp_path / "flat")


def test_the_untrained_encoder_is_evaluated_on_labeled_images(cfg):
    result = protocol.evaluate_untrained(cfg, *protocol.open_splits(cfg.data), device="cpu")
    assert (result.knn or 0) >= 90.0  # colors: even random features tell them apart
    assert (result.linear or 0) >= 75.0
    assert (result.majority, result.chance) == (50.0, 50.0)
    assert (result.n_train, result.n_val, result.num_classes, result.image_size) == (32, 12, 2, 32)
    assert (result.z_val.shape, len(result.features_val)) == ((12, 16), 12)
    # It is the run's starting point: the same weights, with BatchNorm statistics of the training images.
    model = build_model(cfg)
    plain = evaluate_run(cfg, model)
    calibrated = evaluate_run(cfg, model, calibrate=True)
    assert plain.linear is None
    assert not torch.allclose(plain.z_val, result.z_val, atol=1e-2)
    torch.testing.assert_close(calibrated.z_val, result.z_val, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), build_model(cfg).parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_neighbors_are_at_most_the_images_of_a_class(cfg):
    def of(k):
        return evaluate_run(dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, k=k)))

    few = of(20)  # 16 of each class
    assert (few.k, of(5).k) == (16, 5)
    assert few.knn == of(16).knn


def test_labels_are_drawn_alike_for_runs_of_all_seeds(cfg, monkeypatch):
    drawn = []
    draw = few_shot.draw_labels
    monkeypatch.setattr(few_shot, "draw_labels", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    settings = dataclasses.replace(cfg.eval, few_shot="1", draws=2)
    for seed in (3, 4):
        evaluate_run(dataclasses.replace(cfg, eval=settings, seed=seed))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.stack(drawn[:2]), torch.stack(drawn[2:]))


@pytest.mark.parametrize(
    ("objective", "over", "gaussian"),
    [
        ("lejepa", "position", True),
        ("ijepa", "position", False),
        ("masked-lejepa", "position", False),
        ("masked-lejepa", "token", False),
        ("masked-lejepa", "image", True),
    ],
)
def test_the_mean_of_patches_has_no_gaussian_as_its_target(objective, over, gaussian, cfg):
    """SIGReg over P patches draws each to N(0, I); the mean of independent ones deviates by P^-1/2."""
    loss = dataclasses.replace(cfg.loss, sigreg_over=over)
    trained = dataclasses.replace(cfg, objective=objective, loss=loss)
    assert evaluate_run(trained, build_model(cfg)).gaussian is gaussian


def test_image_size_is_the_setting_or_that_of_the_global_crops(cfg):
    larger = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, image_size=48))
    results = evaluate_run(cfg, train_images=9), evaluate_run(larger, train_images=99)
    assert [(result.image_size, result.n_train) for result in results] == [(32, 9), (48, 32)]
    assert not torch.allclose(results[0].features_val, results[1].features_val)


def test_both_splits_are_told_with_a_way_out_where_one_has_no_classes(tmp_path, caplog):
    caplog.set_level("INFO")
    for folder, count in {"train/ant": 2, "train/bee": 3, "val": 2}.items():
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (24, 24)).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "val" / "list.txt").touch()
    protocol.open_splits(DataConfig(path=str(tmp_path)))
    train, val, note = (record.getMessage() for record in caplog.records)
    assert train == f"training images: 5 images, 2 classes (ant, bee) from folder {tmp_path / 'train'}"
    assert val.startswith(
        f"validation images: 2 images, no classes from folder {tmp_path / 'val'}; not read there: 1"
    )
    assert (
        f"give the training images alone (folder {tmp_path / 'train'}), and some of them are held out" in note
    )


def test_one_validation_image_is_refused(cfg, tiny):
    one = protocol.open_splits(cfg.data)[0].subset([0])
    for chosen, option in ((cfg, "data"), (tiny(eval={"data": "/other"}), "eval")):
        with pytest.raises(
            UsageError, match=f"at least 2 validation images.* raise --{option}.val-fraction,"
        ):
            protocol.check_validation_images(one, chosen)


# ---- the command ---------------------------------------------------------------------------------


def test_command_evaluates_a_run_and_an_earlier_checkpoint_on_other_data(tiny, unlabeled, tmp_path, capsys):
    """The newest checkpoint as the run itself did."""
    cfg = tiny(max_steps=3, checkpoint_every=2, seed=3)
    page = pretrain(cfg, CPU)
    mine, run = json.loads((page.parent / "summary.json").read_text()), page.parents[1]
    page.write_text("of the training")
    assert command.main(["--checkpoint", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "Linear probe accuracy" in printed
    folder = run / "evaluation" / "step-00000003" / "report"
    assert str(folder / "report.html") in printed
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    times = {"created": "", "evaluation_seconds": 0}
    assert summary | times == mine | times
    assert page.read_text() == "of the training"

    out = tmp_path / "out"
    arguments = ["--checkpoint", str(run / "checkpoints" / "step-00000002"), "--data", unlabeled]
    assert command.main([*arguments, "--out", str(out), "--no-linear"]) == 0
    assert "have no class" in capsys.readouterr().out
    summary = json.loads((out / "report" / "summary.json").read_text(encoding="utf-8"))
    pretrained = {"pretraining_data": cfg.data.path, "pretraining_images": 32, "pretraining_held_out": 12}
    assert summary.items() >= (pretrained | {"evaluation_data": unlabeled, "val_images": 12}).items()
    assert (summary["knn_trained"], summary["num_classes"], summary["chance"]) == (None, None, None)
    assert np.isfinite([summary["embedding_std"], summary["effective_rank"], summary["sigreg_val"]]).all()
    assert summary["config"] == mine["config"]  # that of the training
    rates = [row["images_per_second"] for row in rows_of(cfg)]
    assert (summary["steps"], summary["images_per_second"]) == (2, statistics.median(rates[:2]))
    assert (out / "report" / "report.html").is_file()
    assert not (out / "report" / "knn.png").exists()
    for size, message in (
        ("50", "use --image-size 48, which it takes"),
        ("0", "error: image_size: expected "),
    ):
        assert command.main(["--checkpoint", str(run), "--image-size", size]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "eval." not in error


def test_command_refuses_what_is_no_checkpoint_and_missing_data(cfg, save_run, tmp_path, capsys, monkeypatch):
    foreign, out, run = tmp_path / "other.pt", tmp_path / "out", save_run(cfg, tmp_path / "run")
    torch.save({"state_dict": {}}, foreign)
    wide = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, projector_dim=9))
    mixed = save_run(cfg, tmp_path / "mixed", saved_as=wide) / "checkpoints" / "step-00000001"
    for path, message in (
        (foreign, "is a file; give a run folder"),
        (mixed, "describes (size mismatch for projector."),
    ):
        assert command.main(["--checkpoint", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: checkpoint {path} ")
        assert message in error
        assert error.count("\n") == 1
    for options, message in (
        (["--data", str(tmp_path / "gone"), "--out", str(out)], "does not exist"),
        (["--backbone-size", "32"], "--backbone-size has no effect without --backbone;"),
        (["--labels-are", "classes"], "--labels-are has no effect without --labels;"),
        (["--draws", "3"], "--draws has no effect without --few-shot;"),
        (["--linear-blocks", "1", "--no-linear"], "--linear-blocks has no effect without --linear;"),
        (["--compare", "a", "b", "--no-linear"], "leave out --checkpoint, --linear"),
    ):
        assert command.main(["--checkpoint", str(run), *options]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(protocol, "evaluate_untrained", pytest.fail)  # before anything is evaluated
    assert command.main(["--checkpoint", str(run), "--out", str(foreign)]) == 1
    assert f"cannot write {foreign}: File exists; choose another --out" in capsys.readouterr().err
    for arguments, message in (
        (["--checkpoint", str(run), "--out", "x.pt"], "out: expected a file name that ends in .safetensors"),
        (
            ["--checkpoint", str(run), "--out", str(out / "config.safetensors")],
            "config.safetensors would put its settings where those for timm go; use another name",
        ),
        (["--checkpoint", str(tmp_path / "nothing")], "does not exist"),
    ):
        assert export.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_figures_of_averaged_weights_are_no_history_of_plain_ones(tiny, save_run, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "plot_curves", lambda path, runs, panels: drawn.update({path.name: runs[""]}))
    row = {"kind": "eval", "step": 1, "knn": 12.5}
    for kind, options, kept in (
        ("none", ["--no-averaged"], 1),
        ("ema", ["--no-averaged"], 0),
        ("ema", [], 1),
    ):
        run = save_run(tiny(average={"kind": kind}), tmp_path / f"{kind}-{kept}")
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        assert command.main(["--checkpoint", str(run), "--no-linear", *options]) == 0
        assert drawn["knn.png"].count(row) == kept, (kind, options)


def test_linear_blocks_count_for_every_encoder(tiny, save_run, tmp_path, monkeypatch):
    seen = []

    def embed(*args, linear_blocks, **options):
        seen.append(linear_blocks)
        return embed_source(*args, **options)

    monkeypatch.setattr(protocol, "embed_source", embed)
    run = save_run(tiny(eval={"backbone": ["test_vit:untrained"]}), tmp_path / "run")
    assert command.main(["--checkpoint", str(run), "--linear-blocks", "1"]) == 0
    assert seen == 6 * [1]  # both splits, of the trained encoder, the untrained one and the run's backbone
    assert command.main(["--checkpoint", str(run), "--backbone"]) == 0
    assert len(seen) == 6 + 4  # without it


def test_script_runs_by_its_path_and_exits_with_2(tmp_path):
    arguments = [sys.executable, str(SCRIPT), "--backbone", "resnet18"]  # on which images?
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    message = "give --checkpoint RUN, or --data PATH --backbone NAME, or --compare RUN RUN"
    assert done.stderr == f"error: {message}\n"
