"""Pictures of predictions: patches found by their features, in their places; and the pages in the report."""

import json

import numpy as np
import pytest
import torch
from ijepa_runs import run_config
from PIL import Image
from report_page import Page
from torch.nn.functional import avg_pool2d
from training import CPU

from lejepa_fast.data.masks import MultiBlockMasks
from lejepa_fast.train import evaluate
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.pretrain import pretrain
from lejepa_fast.train.report.overlays import DIMMED, dimmed, draw_page
from lejepa_fast.train.report.predictor_pictures import (
    CONTEXTS,
    MaskedExamples,
    answers_of,
    contexts_around,
    predictor_pictures,
    uncertainty_pictures,
)

ONE_VIEW = {"global_crops": 1, "local_crops": 0, "global_size": 96}  # 6 x 6 patches
SMALL = {"predictor_width": 32, "predictor_depth": 1, "predictor_heads": 4}
AS_THEY_ARE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_the_true_features_bring_back_the_block_and_the_predictor_another(tiny):
    """Patches of one color, features linear in it: both pictures of the target are the block itself."""
    model = build_model(tiny(objective="ijepa", crops=ONE_VIEW, masked=SMALL))
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(3, 64, generator=generator)
    model.targets = lambda images: avg_pool2d(images, 16).flatten(2).mT @ mixed
    colors = torch.rand(8, 3, 6, 6, generator=generator)
    known = colors.repeat_interleave(16, 2).repeat_interleave(16, 3)
    context, targets = MultiBlockMasks((6, 6), min_keep=4)(0, 0, range(3))
    examples = MaskedExamples(model, known, known[:3], targets, context[None])
    columns = predictor_pictures(examples, answers_of(examples, **AS_THEY_ARE))
    block = targets[:, 0].repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand(-1, 3, -1, -1)
    for how, tolerance in (("nearest", 1e-6), ("decoded", 0.02)):
        found = columns[f"target, {how}"]
        torch.testing.assert_close(found[block], known[:3][block], rtol=0, atol=tolerance)
        torch.testing.assert_close(found[~block], 0.15 * known[:3][~block])
        predicted = columns[f"predicted, {how}"]
        assert predicted[~block].equal(found[~block])
        assert (predicted[block] - found[block]).abs().mean() > 0.1
    nearest = columns["predicted, nearest"][:, :, ::16, ::16][block[:, :, ::16, ::16]].view(-1)
    assert torch.isin(nearest, colors).all()  # of training patches alone


def test_spread_and_error_are_those_of_planted_predictions(tiny):
    """Answers off the target by a constant of changing sign in the left half of the grid, and by one of one
    sign in the right half: only the left half differs from context to context, both are wrong."""
    model = build_model(tiny(objective="ijepa", crops=ONE_VIEW, masked=SMALL))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 36, 64, generator=generator)
    model.targets = lambda images: features[: len(images)]
    calls = []

    def predict(context, batch, packed):
        calls.append(len(context))
        sign = torch.where(batch.wanted % 6 < 3, (-1.0) ** len(calls), 1.0)[:, None]
        return features.flatten(0, 1)[batch.wanted] + 0.5 * sign

    model.predictor.forward = predict
    known = torch.rand(8, 3, 96, 96, generator=generator)
    masks = MultiBlockMasks((6, 6), min_keep=4)
    context, targets = masks(0, 0, range(3))
    around = contexts_around(masks, 0, context, targets[:, 0])
    examples = MaskedExamples(model, known, known[:3], targets, around)
    columns, figures = uncertainty_pictures(examples, answers_of(examples, **AS_THEY_ARE))
    assert len(calls) == CONTEXTS
    assert len(set(calls)) > 1
    block = targets[:, 0].flatten(1)
    left = (torch.arange(36) % 6 < 3).expand(3, -1)[block]
    unit = features.flatten(0, 1).var(0).mean().sqrt()
    alternating = 0.5 * (CONTEXTS / (CONTEXTS - 1)) ** 0.5  # deviation of + - + - ...
    expected = {"spread": torch.where(left, alternating, 0.0) / unit, "error": 0.5 / unit}
    for name, values in expected.items():
        torch.testing.assert_close(figures[name], values.expand(len(left)), rtol=1e-4, atol=1e-5)
    spread = columns["spread"][:, :, 8::16, 8::16].mean(1)[targets[:, 0]]
    assert (spread[left] > 0.2).all()  # colors
    assert (spread[~left] < 0.01).all()  # black


def test_a_page_is_bright_where_the_masks_are_and_dark_elsewhere(tmp_path):
    """Images of one color: the share of bright pixels is that of the masks."""
    context, targets = MultiBlockMasks(grid=(8, 8))(0, 0, range(3))
    masks = torch.stack([torch.ones_like(context), context, *targets.unbind(1)])
    color = torch.tensor([0.9, 0.6, 0.3]).view(3, 1, 1)
    pictures = {f"{i}": dimmed(color.expand(3, 3, 64, 64), mask) for i, mask in enumerate(masks)}
    draw_page(tmp_path / "masks.png", pictures, ["a.png", "b.png", "c.png"])
    page = torch.tensor(np.asarray(Image.open(tmp_path / "masks.png").convert("RGB"))) / 255
    bright, dark = (((page - share * color.view(3)).abs() < 0.03).all(-1).sum() for share in (1.0, DIMMED))
    assert bright / (bright + dark) == pytest.approx(masks.double().mean().item(), abs=0.02)


def test_contexts_around_a_block_leave_it_out_and_are_never_empty():
    masks = MultiBlockMasks((6, 6), min_keep=4)
    context, targets = masks(0, 0, range(50))
    block = targets[:, 0]
    block[7] = ~context[7]  # as much as can be
    around = contexts_around(masks, 0, context, block)
    assert around.shape == (CONTEXTS, 50, 6, 6)
    assert around[0].equal(context)
    assert not (around & block).any()
    assert around.flatten(2).any(2).all()
    assert (around[1:] != context).flatten(2).any(2).float().mean() > 0.9
    only = ~torch.zeros_like(context)
    only[:, 0, 0] = False  # a block of all patches but one: most contexts of other draws would be empty
    one = contexts_around(masks, 0, ~only, only)
    assert one.equal((~only).expand_as(one))


@pytest.mark.parametrize("objective", ["ijepa", "masked-lejepa"])
def test_a_run_and_its_evaluation_show_masks_predictions_and_targets(objective, image_folder, tmp_path):
    cfg = run_config(str(image_folder), tmp_path / "run", objective, max_steps=2)
    pages = [pretrain(cfg, CPU)]
    if objective == "ijepa":
        options = ["--checkpoint", str(cfg.out), "--out", str(tmp_path / "again"), "--workers", "0"]
        assert evaluate.main(options) == 0
        pages.append(tmp_path / "again" / "report" / "report.html")
    without_sigreg = {"targets.png", "knn.png", "views.png", "spectrum.png"}
    without_sigreg |= {"masks.png", "predictor.png", "uncertainty.png"}
    figures = without_sigreg | (set() if objective == "ijepa" else {"loss.png", "projections.png"})
    for path in pages:
        assert {each.name for each in path.parent.glob("*.png")} == figures
        page = Page(path)
        text = " ".join(page.text.split())
        assert len([tag for tag, _ in page.tags if tag == "img"]) == len(figures)
        assert (
            ("A rising loss is normal" in text) == ("SIGReg asks for" not in text) == (objective == "ijepa")
        )
        assert "All views of a row" not in text
        assert (
            text.count({"ijepa": "I-JEPA", "masked-lejepa": "Masked LeJEPA"}[objective] + " pretraining:")
            == 2
        )
        with Image.open(path.parent / "predictor.png") as image:
            assert image.width > image.height  # six rows at most, seven columns
        assert json.loads((path.parent / "summary.json").read_text())["config"]["objective"] == objective
