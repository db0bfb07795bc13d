"""The CPU backend: crops by torch, colors by Numba kernels.

Draws and crops are those of the torchvision backend, bit for bit; colors differ by rounding.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from lejepa_fast.data.backends.cpu_kernels import render_view
from lejepa_fast.data.backends.threaded import ThreadedBackend
from lejepa_fast.data.draws import TOP, WIDTH
from lejepa_fast.data.recipe import MultiCropRecipe


class CpuBackend(ThreadedBackend):
    """Makes crops with torch and colors with compiled kernels."""

    name = "cpu"

    def render(
        self, image: Image.Image, drawn: np.ndarray, recipe: MultiCropRecipe, out: list[np.ndarray]
    ) -> None:
        pixels = np.asarray(image)
        for parameters, view in zip(drawn.astype(np.float32), out, strict=True):
            crop = resized_crop(pixels, parameters, view.shape[-1])
            render_view(crop, parameters, recipe.blur_kernel, recipe.solarize_threshold, view)


def resized_crop(pixels: np.ndarray, parameters: np.ndarray, size: int) -> np.ndarray:
    """The window of `parameters`, a row of `draws.view_table`, of pixels (H, W, C) uint8: (size, size, C)."""
    top, left, height, width = map(int, parameters[TOP : WIDTH + 1])
    window = pixels[top : top + height, left : left + width].copy()
    # torch resizes uint8 fastest in channels-last order, by one thread. It takes a batch for one only if the
    # batch dimension comes before `permute`.
    tensor = torch.from_numpy(window)[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(tensor, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
