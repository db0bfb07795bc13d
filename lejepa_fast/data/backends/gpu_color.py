"""Colors of views that DALI has cut: jitter in its drawn order, grayscale, blur, solarize.

On a GPU four Triton kernels (`lejepa_fast.kernels.color_jitter`) do it for one view of the whole batch, on a
CPU the backend "torchvision" image by image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lejepa_fast.data.backends.torchvision_backend import change_color, one_thread
from lejepa_fast.data.draws import COLUMN_CODES, COLUMN_SIGMA, COLUMN_SOLARIZE, as_params
from lejepa_fast.data.recipe import MultiCropRecipe


def change_colors(views: Sequence[Tensor], table: np.ndarray, recipe: MultiCropRecipe) -> list[Tensor]:
    """Change the colors of views as drawn. On a GPU all work is queued on the current stream.

    Args:
        views: V contiguous tensors (B, S, S, 3) uint8.
        table: (B, V, COLUMNS) of `draws.view_table`.
        recipe: Kernel size of the blur and threshold of solarize.

    Returns:
        Tensors of the same shapes in new memory.
    """
    if views[0].is_cuda:
        return by_kernels(views, table, recipe)
    made = [torch.empty_like(view) for view in views]
    with one_thread():
        for row, parameters in enumerate(table.tolist()):
            for v, view in enumerate(views):
                changed = change_color(view[row].permute(2, 0, 1), as_params(parameters[v]), recipe)
                made[v][row] = changed.permute(1, 2, 0)
    return made


def by_kernels(views: Sequence[Tensor], table: np.ndarray, recipe: MultiCropRecipe) -> list[Tensor]:
    """`change_colors` on a GPU, or in Triton's interpreter."""
    from lejepa_fast.kernels.color_jitter import change_colors

    blurred = np.any(table[..., COLUMN_SIGMA] > 0, axis=0)
    drawn = table[..., COLUMN_CODES : COLUMN_SOLARIZE + 1]  # the columns that the kernels read
    rows = torch.from_numpy(drawn.astype(np.float32).transpose(1, 0, 2).copy())
    if views[0].is_cuda:  # a copy from pinned memory need not wait
        rows = rows.pin_memory().to(views[0].device, non_blocking=True)
    return [
        change_colors(
            view,
            rows[v],
            kernel_size=recipe.blur_kernel,
            threshold=recipe.solarize_threshold,
            blurred=bool(blurred[v]),
        )
        for v, view in enumerate(views)
    ]
