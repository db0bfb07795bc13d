"""The recipe as users of torchvision write it, in its own random transforms: what ours is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lejepa_fast.data import MultiCropRecipe


def view_transform(
    recipe: MultiCropRecipe, size: int, scale: tuple[float, float], *, tensors: bool, normalised: bool = True
) -> v2.Compose:
    """One view of a Pillow image: float32 (3, size, size), normalised, or else uint8.

    tensors: work on uint8 tensors from the start and not on Pillow images, which v2 takes alike.
    """
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    blur = v2.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma)
    steps: list[torch.nn.Module] = [v2.ToImage()] if tensors else []
    steps += [
        v2.RandomResizedCrop(size, scale, recipe.aspect_ratio, antialias=True),
        v2.RandomHorizontalFlip(recipe.flip_prob),
        v2.RandomApply([jitter], recipe.jitter_prob),
        v2.RandomGrayscale(recipe.grayscale_prob),
        v2.RandomApply([blur], recipe.blur_prob),
        v2.RandomSolarize(recipe.solarize_threshold, recipe.solarize_prob),
    ]
    steps += [] if tensors else [v2.ToImage()]
    if normalised:
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(recipe.mean), list(recipe.std))]
    return v2.Compose(steps)


def multicrop_transform(
    recipe: MultiCropRecipe, *, tensors: bool, normalised: bool = True
) -> Callable[[Image.Image], list[Tensor]]:
    """All views of one image, globals first."""
    options: dict[str, Any] = {"tensors": tensors, "normalised": normalised}
    large = view_transform(recipe, recipe.global_size, recipe.global_scale, **options)
    small = view_transform(recipe, recipe.local_size, recipe.local_scale, **options)

    def views(image: Image.Image) -> list[Tensor]:
        return [large(image) for _ in range(recipe.global_crops)] + [
            small(image) for _ in range(recipe.local_crops)
        ]

    return views
