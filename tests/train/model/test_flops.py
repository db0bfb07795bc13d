"""The FLOP count against closed forms, and the table of GPUs."""

import dataclasses

import pytest
import torch

from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.train.config import AverageConfig, Config, LossConfig, ModelConfig
from lejepa_fast.train.model import flops
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.runtime import gpu_specs

CROPS = MultiCropRecipe(global_crops=2, global_size=56, local_crops=3, local_size=28)


def vit(size, *, width, depth, patch):
    """Forward and backward of a plain vision transformer with a class token, one image.

    6 N T for weights that every token passes (12 width^2 a block), 12 T^2 width a block for attention.
    The patch embedding needs no gradient of its input: 4 instead of 6.
    """
    patches = (size // patch) ** 2
    tokens = patches + 1
    blocks = depth * (6 * 12 * width**2 * tokens + 12 * tokens**2 * width)
    return blocks + 4 * patches * 3 * patch**2 * width


def test_vit_against_the_formula():
    model = ModelConfig(name="vit_tiny", projector_hidden=64, projector_layers=3, projector_dim=16)
    counted = flops.count_flops(Config(model=model, crops=CROPS, loss=LossConfig(num_slices=32)))
    large, small, projector, loss = counted.parts.values()
    assert large == pytest.approx(vit(56, width=192, depth=12, patch=14), rel=1e-9)
    assert small == pytest.approx(vit(28, width=192, depth=12, patch=14), rel=1e-9)
    assert projector == 5 * 6 * (192 * 64 + 64 * 64 + 64 * 16)  # five views, no attention
    assert loss == 5 * 4 * 16 * 32  # SIGReg: its directions take no gradient
    assert counted.per_image == 2 * large + 3 * small + projector + loss


def test_the_center_from_the_average_is_one_more_forward_of_its_views():
    """A third of forward and backward, but for the patch embedding, whose input needs no gradient."""
    model = ModelConfig(
        "vit_tiny", kwargs='{"depth": 2}', projector_hidden=64, projector_layers=2, projector_dim=16
    )
    plain = flops.count_flops(Config(model=model, crops=CROPS))
    stem = 2 * 3 * 14**2 * 192  # of a patch, forward
    for center, images, patches in (("global", 2, 2 * 16), ("all", 5, 2 * 16 + 3 * 4)):
        loss = LossConfig(center=center, center_from="average")
        counted = flops.count_flops(Config(model=model, crops=CROPS, loss=loss, average=AverageConfig("ema")))
        whole = 2 * plain.parts["global view"] + 3 * plain.parts["local view"] * (center == "all")
        forward = (whole + patches * stem) / 3 + images * 2 * (192 * 64 + 64 * 16)
        assert counted.parts["center"] == pytest.approx(forward, rel=1e-9)
        assert counted.per_image == pytest.approx(plain.per_image + forward, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "macs", "stem"),
    [("resnet50", 4.087e9, 0.118e9), ("efficientnet_b0", 0.386e9, 0.0108e9)],  # plain and depthwise
)
def test_convolutional_networks_against_their_published_count(name, macs, stem):
    """Multiply-adds of one forward at 224 px; three times that with backward, less the stem's gradient of
    its input."""
    crops = dataclasses.replace(CROPS, global_size=224, local_crops=0)
    counted = flops.count_flops(Config(model=ModelConfig(name=name), crops=crops))
    assert counted.parts["global view"] == pytest.approx(2 * (3 * macs - stem), rel=5e-3)
    assert "local view" not in counted.parts


def test_recomputation_is_not_counted():
    """Activation checkpointing runs the blocks once more: the counter sees it, the model has not grown."""
    cfg = Config(model=ModelConfig(name="vit_tiny", kwargs='{"depth": 2}'), crops=CROPS)
    model = build_model(cfg, meta=True)
    plain = flops.count_flops(cfg, model).parts["global view"]
    model.encoder.set_grad_checkpointing()
    assert flops.count_flops(cfg, model).parts["global view"] > 1.2 * plain
    assert flops.count_flops(cfg).parts["global view"] == plain


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a slice has a part of the peak
        ("NVIDIA H1000", None),
        ("NVIDIA T4", None),
    ],
)
def test_gpus_by_name(name, expected, monkeypatch):
    """One that is unknown has no peak. By option: test_plan.py."""
    found = gpu_specs.by_device_name(name)
    assert (found.name if found else None) == expected
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = gpu_specs.by_option(expected).tflops * 1e12 if expected else None
    assert flops.peak_flops(torch.device("cuda", 0)) == peak
    assert gpu_specs.by_option("H200").tflops == 989.4
    assert flops.peak_flops(torch.device("cpu")) is None
