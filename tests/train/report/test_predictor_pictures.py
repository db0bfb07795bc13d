"""Pictures of predictions: patches found by their features, in their places; and the pages in the report."""

import json

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
from lejepa_fast.train.report.predictor_pictures import MaskedExamples, predictor_pictures

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
    columns = predictor_pictures(MaskedExamples(model, known, known[:3], context, targets), **AS_THEY_ARE)
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


@pytest.mark.parametrize("objective", ["ijepa", "masked-lejepa"])
def test_a_run_and_its_evaluation_show_masks_predictions_and_targets(objective, image_folder, tmp_path):
    cfg = run_config(str(image_folder), tmp_path / "run", objective, max_steps=2)
    pages = [pretrain(cfg, CPU)]
    if objective == "ijepa":
        options = ["--checkpoint", str(cfg.out), "--out", str(tmp_path / "again"), "--workers", "0"]
        assert evaluate.main(options) == 0
        pages.append(tmp_path / "again" / "report" / "report.html")
    without_sigreg = {"targets.png", "masks.png", "predictor.png", "knn.png", "views.png", "spectrum.png"}
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
