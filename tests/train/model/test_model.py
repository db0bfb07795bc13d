"""Encoder, projector and the forward over crops of two sizes; export for others."""

import json
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from lejepa_fast.data.backends.threaded import center_view
from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.checkpoint.trained_model import export_encoder
from lejepa_fast.train.config import Config, ModelConfig
from lejepa_fast.train.config.names import SHORT_NAMES
from lejepa_fast.train.model.crop_sizes import fitting_sizes
from lejepa_fast.train.model.drop_path import TensorDropPath
from lejepa_fast.train.model.initialize import initialize
from lejepa_fast.train.model.model import build_encoder, build_model, build_projector
from lejepa_fast.train.model.strided_pointwise import StridedPointwise


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_forward_equals_one_view_at_a_time(name, tiny):
    """In one call of the encoder per resolution."""
    model = build_model(tiny(model={"name": name, "projector_norm": "batch"})).eval()
    rows: list[int] = []
    hook = model.encoder.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    views = [torch.randn(3, 3, size, size) for size in (32, 32, 16, 16, 16)]
    with torch.no_grad():
        global_z, all_z = model(views)
        hook.remove()
        single = torch.stack([model.embed(view)[1] for view in views])
    assert rows == [6, 9]
    torch.testing.assert_close(all_z, single, rtol=1e-4, atol=1e-5)
    assert torch.equal(global_z, all_z[:2])
    assert not torch.allclose(all_z[0], all_z[2], atol=1e-3)  # else a wrong order would pass


def test_weights_depend_on_the_seed_alone(tiny):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(tiny(seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = build_model(tiny(seed=3)), build_model(tiny(seed=4))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.projector[0].weight, other.projector[0].weight)


def test_a_model_that_has_modules_twice_keeps_its_weights(tiny, tmp_path):
    """The blocks of coat_lite_tiny share their position encodings."""
    cfg = tiny(model={"name": "coat_lite_tiny"}, crops={"local_crops": 0})
    encoder = build_model(cfg).eval().encoder
    names = dict(encoder.named_parameters(remove_duplicate=False))
    assert not any(parameter.is_meta for parameter in names.values())
    assert names["cpe1.proj.weight"] is names["serial_blocks1.0.cpe.proj.weight"]
    weights = load_file(export_encoder(encoder, cfg, step=5, run_dir=tmp_path))
    arguments = json.loads((tmp_path / "encoder.json").read_text())["model"]
    loaded = timm.create_model(**arguments).eval()
    loaded.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), encoder(images))


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_short_names_have_patch_14(name):
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(name, img_size=224))
    assert encoder.patch_embed.patch_size == (14, 14)
    parameters = sum(p.numel() for p in encoder.parameters())
    billions = {"vit_giant": 1.0, "vit_gigantic": 1.8}
    if name in billions:
        assert parameters / 1e9 == pytest.approx(billions[name], abs=0.05)


@pytest.mark.parametrize(
    ("model", "crops", "message"),
    [
        ({"name": "resnet51"}, {}, "resnet51.*resnet50"),
        ({"name": "vit_gigantik"}, {}, "vit_gigantik.*vit_gigantic"),
        ({"name": "qqqq"}, {}, "qqqq.*timm.list_models"),
        ({"name": "resnet10t", "register_tokens": 4}, {}, "resnet10t: does not take these.*reg_tokens"),
        ({}, {"local_size": 20}, "crops.local_size: model test_vit cannot take 20 x 20.*local-size 16"),
        (
            {},
            {"global_size": 10, "local_crops": 0},
            "global_size.*use --crops.global-size 16, which it takes",
        ),
        ({"name": "mixer_s16_224"}, {"global_size": 64}, "use --crops.local-size 64, which it takes"),
        (
            {"name": "convnext_atto"},
            {"global_size": 64, "local_size": 24},
            "use --crops.local-size 32, which",
        ),
        ({"name": "crossvit_9_240"}, {"global_size": 230}, "use --crops.global-size 240, which it takes"),
        ({"kwargs": "layers=1"}, {}, "model.kwargs: expected a JSON object, got 'layers=1'"),
        ({"kwargs": "[1]"}, {}, "model.kwargs: expected a JSON object, got '\\[1\\]'"),
        ({"kwargs": "[" * 100_000}, {}, "model.kwargs: expected a JSON object, got '\\[\\[.{1,200}$"),
        ({"kwargs": '{"depth": 1000000000}'}, {}, "model.kwargs: .*a number of 10 digits"),
        ({"kwargs": '{"a": 1}'}, {}, "test_vit: does not take these options .*; leave out .*--model.kwargs"),
        (
            {"kwargs": '{"patch_size": 0}'},
            {},
            "test_vit: .* built with .*'patch_size': 0.*: ZeroDivisionError: ",
        ),
        (
            {"name": "resnet18", "kwargs": '{"channels": [1]}'},
            {},
            "^model.kwargs: model resnet18 cannot take 32 x 32 .*; leave out --model.kwargs or use another",
        ),
        ({"kwargs": '{"pretrained": true}'}, {}, "cannot be given here; .*starts from random weights"),
        ({"kwargs": '{"checkpoint_path": "x"}'}, {}, "cannot be given here; .*starts from random weights"),
        ({"kwargs": '{"in_chans": 1}'}, {}, "cannot be given here; the trainer sets it"),
        ({"kwargs": '{"img_size": 64}'}, {}, "cannot be given here; use --model.img-size"),
    ],
)
def test_what_cannot_be_built_is_named(model, crops, message, tiny):
    with pytest.raises(UsageError, match=message):
        build_model(tiny(model=model, crops=crops))


def test_width_of_the_features_is_measured(tiny):
    # Its head keeps a layer after pooling: 1024 features, where `num_features` says 576.
    model = build_model(tiny(model={"name": "mobilenetv3_small_100"})).eval()
    features, z = model.embed(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 1024)
    assert z.shape == (2, 16)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [("batch", torch.nn.BatchNorm1d), ("layer", torch.nn.LayerNorm), ("none", torch.nn.Identity)],
)
def test_projector_layers(norm, kind):
    options = ModelConfig(projector_hidden=7, projector_layers=3, projector_dim=2, projector_norm=norm)
    projector = build_projector(5, options)
    linear = torch.nn.Linear
    kinds = [linear, kind, torch.nn.ReLU, linear, kind, torch.nn.ReLU, linear]
    assert [type(layer) for layer in projector] == kinds
    widths = [(m.in_features, m.out_features) for m in projector if isinstance(m, linear)]
    assert widths == [(5, 7), (7, 7), (7, 2)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"drop_path": 0.1, "register_tokens": 2}),
        ("vit_tiny", {}),
        ("resnet18", {"kwargs": '{"channels": [8, 16, 24, 32], "layers": [1, 1, 1, 1]}'}),
        ("mixer_s16_224", {}),
    ],
)
def test_exported_encoder_is_what_timm_loads(name, options, tiny, tmp_path):
    """By encoder.json, and as a folder: features of an image that timm transforms differ by rounding only."""
    recipe = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.25, 0.2), "local_crops": int(name != "mixer_s16_224")}
    crops = recipe | ({"global_size": 28, "local_size": 14} if name == "vit_tiny" else {})
    cfg = tiny(model={"name": name, **options}, crops=crops)
    model = build_model(cfg).eval()
    if options.get("register_tokens"):
        assert model.encoder.num_prefix_tokens == 3
        assert model.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    config.write(cfg, tmp_path)
    weights = export_encoder(model.encoder, cfg, step=5, run_dir=tmp_path)
    assert config.load_json(tmp_path / "config.json") == cfg  # still the run's

    settings = json.loads((tmp_path / "encoder.json").read_text())
    encoder = timm.create_model(**settings["model"]).eval()
    encoder.load_state_dict(load_file(weights), strict=True)

    local, size = cfg.crops.local_size, cfg.crops.global_size
    for side in (local, size) if cfg.crops.local_crops else (size,):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), model.embed(images)[0], rtol=1e-5, atol=1e-6)
    assert settings["input"]["size"] == size
    assert settings["step"] == 5

    encoder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(encoder)
    assert tuple(data["input_size"]) == (3, size, size)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((150, 110), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    ours = (center_view(image, size) / 255 - mean) / std
    theirs = timm.data.create_transform(**data)(image)
    torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0)  # three of 255 levels
    with torch.no_grad():
        expected, features = model.embed(ours[None])[0], encoder(theirs[None])
    assert torch.cosine_similarity(features, expected) > 0.999


@pytest.mark.parametrize("found", ['{"architecture": "resnet50"}', "[" * 100_000, None, "/"])
def test_export_leaves_a_config_of_another_program(found, tiny, tmp_path, caplog):
    """None: a pipe; "/": a folder."""
    beside = tmp_path / "config.json"
    if found is None:
        os.mkfifo(beside)
    elif found == "/":
        beside.mkdir()
    else:
        beside.write_text(found)
    before = beside.stat()
    export_encoder(build_model(cfg := tiny()).encoder, cfg, step=5, run_dir=tmp_path)
    after = beside.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "is of another program" in caplog.text


def test_config_is_for_the_weights_that_timm_takes(tiny, tmp_path, caplog):
    """The first by name, or a name that it prefers; a warning says which, where there are several."""
    small, large = tiny(), tiny(model={"name": "test_resnet"})
    for name, cfg, taken, warnings in (
        ("encoder.safetensors", small, small, []),
        ("other.safetensors", large, small, ["encoder.safetensors"]),
        ("encoder.safetensors", small, small, ["encoder.safetensors"]),
        ("model.safetensors", large, large, ["model.safetensors"]),
    ):
        caplog.clear()
        if cfg is small:
            config.write(small, tmp_path)  # as a run does, also when it starts again
        export_encoder(build_model(cfg).encoder, cfg, step=5, run_dir=tmp_path, name=name)
        texts = [record.getMessage() for record in caplog.records if record.name == "lejepa_fast.train"]
        assert [text.partition(" timm takes ")[2].partition(";")[0] for text in texts] == warnings
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict()
        expected = build_model(taken).encoder.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("name", "kwargs", "limit", "found"),
    [
        ("test_vit", {"patch_size": 14}, 64, {"global": 56, "local": 28}),
        ("resnet10t", {}, 64, {"global": 64, "local": 28}),  # any size
        ("mixer_s16_224", {}, 50, {"global": 50, "local": 50}),  # one size
        ("test_vit", {}, 9, {}),  # less than a patch
    ],
)
def test_sizes_for_small_images_are_tried(name, kwargs, limit, found):
    assert fitting_sizes(Config(model=ModelConfig(name, kwargs=json.dumps(kwargs))), limit) == found


def test_drop_path_with_a_tensor_drops_as_timms():
    x = torch.ones(20_000, 1, 2)
    torch.manual_seed(0)
    module = TensorDropPath(0.3, torch.device("cpu"))
    y = module(x)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert torch.equal(y[:, 0, 0], y[:, 0, 1])  # a sample as a whole
    assert (y[:, 0, 0] == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(module.eval()(x), x)
    assert not module.state_dict()


def test_strided_pointwise_convolutions_have_the_right_gradient():
    """Of few channels in channels-last memory, oneDNN gets them wrong, or the process crashes."""
    name = "repvgg_a0"

    def step(encoder: torch.nn.Module, layout: torch.memory_format) -> dict[str, torch.Tensor]:
        encoder.load_state_dict(plain.state_dict())
        encoder.eval().to(memory_format=layout)
        encoder(images.to(memory_format=layout)).square().mean().backward()
        return {name: p.grad.contiguous() for name, p in encoder.named_parameters() if p.grad is not None}

    images = torch.randn(8, 3, 64, 64)
    plain = timm.create_model(name, num_classes=0)
    found = step(build_encoder(ModelConfig(name)), torch.channels_last)
    torch.testing.assert_close(found, step(plain, torch.contiguous_format), rtol=1e-3, atol=1e-6)
    assert any(isinstance(m, StridedPointwise) for m in build_encoder(ModelConfig(name)).modules())


def test_weights_of_convolutions_are_channels_last_also_beside_a_3d_one(tiny):
    """Of which PyTorch's own `Module.to` makes an error."""
    cfg = tiny(model={"name": "lambda_resnet26t"}, crops={"global_size": 64, "local_crops": 0})
    model = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize(model, cfg, torch.device("cpu"))
    shapes = {parameter.ndim for parameter in model.parameters()}
    assert {4, 5} <= shapes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        if tensor.ndim == 4:
            assert tensor.is_contiguous(memory_format=torch.channels_last), name
