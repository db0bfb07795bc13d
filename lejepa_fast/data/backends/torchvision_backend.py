"""The torchvision backend: the reference for all others, and the fallback.

Each image is decoded once and all its views are cut from the decoded pixels. Every pixel operation is a
function of `torchvision.transforms.v2.functional`. Of its two implementations the faster one is used for each
operation: on crops of 32-224 px the Pillow kernels are faster for color jitter, and the uint8 tensor kernels
for resizing, blur and solarize. v2 transforms accept both.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lejepa_fast.data import draws
from lejepa_fast.data.backends.threaded import ThreadedBackend, to_tensor
from lejepa_fast.data.recipe import MultiCropRecipe


class TorchvisionBackend(ThreadedBackend):
    """Makes crops and colors with torchvision."""

    name = "torchvision"
    fewest_threads = 0

    def render(
        self, image: Image.Image, drawn: np.ndarray, recipe: MultiCropRecipe, out: list[np.ndarray]
    ) -> None:
        with torch.inference_mode():
            pixels = to_tensor(image)
            for row, view in zip(drawn.tolist(), out, strict=True):
                view[:] = apply_view(pixels, row, view.shape[-1], recipe).numpy()


def apply_view(image: Tensor, drawn: Sequence[float], size: int, recipe: MultiCropRecipe) -> Tensor:
    """One view (3, size, size) uint8 of a decoded image (3, H, W) uint8. drawn: a row of `view_table`."""
    box = [int(side) for side in drawn[draws.TOP : draws.WIDTH + 1]]
    view = F.resized_crop(image, *box, [size, size], antialias=True)
    if drawn[draws.FLIP]:
        view = F.horizontal_flip(view)
    return change_color(view, drawn, recipe)


def change_color(view: Tensor, drawn: Sequence[float], recipe: MultiCropRecipe) -> Tensor:
    """Color jitter and grayscale by the Pillow kernels, blur and solarize, of a view (3, S, S) uint8."""
    codes, factors = drawn[draws.CODES : draws.FACTORS], drawn[draws.FACTORS : draws.GRAY]
    if any(codes) or drawn[draws.GRAY]:
        image = Image.fromarray(view.permute(1, 2, 0).numpy())
        for code, factor in zip(codes, factors, strict=True):
            if code != draws.SKIP:
                image = getattr(F, f"adjust_{draws.JITTER_OPS[int(code) - 1]}")(image, factor)
        view = to_tensor(F.rgb_to_grayscale(image, num_output_channels=3) if drawn[draws.GRAY] else image)
    if drawn[draws.SIGMA]:
        view = F.gaussian_blur(view, [recipe.blur_kernel] * 2, [drawn[draws.SIGMA]] * 2)
    return F.solarize(view, recipe.solarize_threshold) if drawn[draws.SOLARIZE] else view
