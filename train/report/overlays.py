"""Pictures of the maps of `evaluation/segmentation.py`: pages of images with their maps, and animations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lejepa_fast.train.evaluation.segmentation import SetMaps, attention_rank, enlarge
from lejepa_fast.train.report.plots import MUTED, report_figure

WARM, COLD = (0.95, 0.45, 0.10), (0.10, 0.35, 0.80)


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalization of images (n, C, S, S): RGB (n, 3, S, S) in 0-1; the first channel in gray
    unless there are three."""
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    pixels = (images.cpu() * scale + shift).clamp(0, 1)
    return pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)


def map_pictures(
    pixels: Tensor, maps: SetMaps, *, threshold: float, per_image: bool = False, heads: bool = True
) -> dict[str, Tensor]:
    """Columns of a page, by name.

    Args:
        pixels: RGB of the images, (n, 3, S, S) in 0-1.
        maps: of the same images.
        threshold: share of the attention that is shown as foreground.
        per_image: scale the colors of the components by each image, not by all.
        heads: a column for the attention of each head as well.

    Returns:
        name -> RGB (n, 3, S, S) in 0-1: "image"; "PCA", components 1-3 as red, green and blue; with attention
        "attention", the mean of the heads from black to yellow; "NN % of it", where the mean attention is
        strongest in warm and the rest in cold colors; "head 1" ...
    """
    size = pixels.shape[-1]
    columns = {"image": pixels, "PCA": _stretched(enlarge(maps.components, size), per_image)}
    if maps.attention is None:
        return columns
    attention = enlarge(maps.attention, size)
    mean = attention.mean(1)
    foreground = (attention_rank(mean) > 1 - threshold)[:, None]
    warm, cold = (torch.tensor(color).view(1, 3, 1, 1) for color in (WARM, COLD))
    gray = pixels.mean(1, keepdim=True)
    columns["attention"] = _heat(mean)
    columns[f"{threshold:.0%} of it"] = 0.5 * gray + 0.5 * torch.where(foreground, warm, cold)
    if heads:
        columns |= {f"head {i + 1}": _heat(attention[:, i]) for i in range(attention.shape[1])}
    return columns


def _stretched(values: Tensor, per_image: bool) -> Tensor:
    """Each channel from its 1st to its 99th percentile, as 0-1."""
    flat = values.transpose(0, 1).flatten(1)[:, None] if not per_image else values.flatten(2).transpose(0, 1)
    low, high = (np.quantile(flat.numpy(), q, axis=2) for q in (0.01, 0.99))  # (3, n or 1)
    low, high = (torch.from_numpy(end.T.astype(np.float32))[..., None, None] for end in (low, high))
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def _heat(values: Tensor) -> Tensor:
    """Maps (n, S, S) from black to yellow, each by its own range."""
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    return heat_colors((values - low) / (high - low).clamp_min(1e-12)).permute(0, 3, 1, 2)


def heat_colors(values: Tensor) -> Tensor:
    """Numbers (...) as RGB (..., 3) in 0-1: black is 0 or less, yellow 1 or more."""
    return torch.from_numpy(matplotlib.colormaps["inferno"](values.numpy())[..., :3].astype(np.float32))


def draw_page(path: Path, columns: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write a PNG: a row for each image, a column for each entry (n, 3, S, S)."""
    size = next(iter(columns.values())).shape[-1]
    step = size + max(2, size // 24)
    canvas = np.ones((step * len(names), step * len(columns), 3), np.float32)
    for column, pictures in enumerate(columns.values()):
        for row, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
            canvas[row * step : row * step + size, column * step : column * step + size] = picture
    inches = 1.35
    with report_figure(path, inches * len(columns) + 0.3, inches * len(names) + 0.3) as figure:
        ax = figure.subplots()
        ax.imshow(canvas, interpolation="nearest")
        ax.set_axis_off()
        for column, title in enumerate(columns):
            ax.text(column * step + size / 2, -3, title, ha="center", va="bottom", color=MUTED, fontsize=9.5)
        for row, name in enumerate(names):
            style: dict[str, Any] = {
                "rotation": 90,
                "ha": "right",
                "va": "center",
                "color": MUTED,
                "fontsize": 6.5,
            }
            ax.text(-3, row * step + size / 2, name[-24:], **style)


def draw_animation(path: Path, columns: Mapping[str, Tensor], *, frames_per_second: float) -> None:
    """Write an animated WebP: the images are the frames, the columns stand side by side."""
    frames = torch.cat(list(columns.values()), dim=3).permute(0, 2, 3, 1)
    pictures = [Image.fromarray((255 * frame).round().byte().numpy()) for frame in frames]
    duration = round(1000 / frames_per_second)
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=duration, loop=0, lossless=False, quality=85
    )
