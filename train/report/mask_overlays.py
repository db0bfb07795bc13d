"""Masks of I-JEPA over images: what the encoder sees, and the blocks that are predicted."""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from lejepa_fast.train.report.overlays import draw_page

DIMMED = 0.15  # brightness of what a mask leaves out


def mask_pictures(images: Tensor, context: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Columns of a page, by name.

    Args:
        images: RGB in 0-1, (B, 3, H, W).
        context: patches that the encoder sees, (B, h, w) bool.
        targets: blocks that are predicted, (B, T, h, w) bool.

    Returns:
        name -> RGB (B, 3, H, W) in 0-1: "image", "context", "target 1" ... Patches out of a mask are dark.

    Raises:
        ValueError: the shapes do not fit together.
    """
    expected = (len(images), targets.shape[1], *context.shape[1:])
    if len(context) != len(images) or targets.shape != expected:
        raise ValueError(
            f"targets: expected shape {expected} for {len(images)} images and context "
            f"{tuple(context.shape)}, got {tuple(targets.shape)}"
        )
    masks = {"context": context}
    masks |= {f"target {number + 1}": targets[:, number] for number in range(targets.shape[1])}
    pictures = {"image": images.detach().float().cpu()}
    for name, mask in masks.items():
        seen = F.interpolate(mask[:, None].float().cpu(), size=images.shape[-2:], mode="nearest")
        pictures[name] = pictures["image"] * (DIMMED + (1 - DIMMED) * seen)
    return pictures


def draw_masks(
    path: Path, images: Tensor, context: Tensor, targets: Tensor, names: Sequence[str] | None = None
) -> None:
    """Write a PNG with a row for each image: itself, its context and its targets.

    Args:
        images, context, targets: as of `mask_pictures`; square images.
        names: what to write beside the rows; None: nothing.
    """
    pictures = mask_pictures(images, context, targets)
    draw_page(path, pictures, names if names is not None else [""] * len(images))
