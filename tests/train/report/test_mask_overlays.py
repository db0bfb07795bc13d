"""Masks over images: bright where a mask is, dark elsewhere."""

import numpy as np
import pytest
import torch
from PIL import Image

from lejepa_fast.data.masks import MultiBlockMasks
from lejepa_fast.train.report.mask_overlays import draw_masks, mask_pictures


def test_the_page_is_bright_where_the_masks_are_and_dark_elsewhere(tmp_path):
    """Uniform images: the share of bright pixels of each tile is that of its mask."""
    context, targets = MultiBlockMasks(grid=(8, 8))(0, 0, range(3))
    color = torch.tensor([0.9, 0.6, 0.3]).view(3, 1, 1)
    images = color.expand(3, 3, 64, 64)
    pictures = mask_pictures(images, context, targets)
    assert list(pictures) == ["image", "context", "target 1", "target 2", "target 3", "target 4"]
    assert pictures["image"].equal(images)
    for name, mask in (("context", context), ("target 4", targets[:, 3])):
        seen = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)
        assert pictures[name][seen].equal(images[seen])
        assert (pictures[name][~seen] < 0.25 * images[~seen]).all()

    draw_masks(tmp_path / "masks.png", images, context, targets, ["a.png", "b.png", "c.png"])
    page = np.asarray(Image.open(tmp_path / "masks.png").convert("RGB")) / 255.0
    # Pixels of the full color: three whole images and the masks of the others.
    bright = (abs(page - color.numpy().ravel()) < 0.03).all(-1).sum()
    dark = (abs(page - 0.15 * color.numpy().ravel()) < 0.03).all(-1).sum()
    masks = torch.cat([torch.ones(3, 1, 8, 8).bool(), context[:, None], targets], 1)
    assert bright / (bright + dark) == pytest.approx(masks.double().mean().item(), abs=0.02)


def test_masks_of_other_images_are_refused():
    context, targets = MultiBlockMasks(grid=(8, 8))(0, 0, range(3))
    with pytest.raises(ValueError, match=r"targets: expected shape \(3, 4, 8, 8\) for 3 images"):
        mask_pictures(torch.zeros(3, 3, 64, 64), context, targets[:2])
