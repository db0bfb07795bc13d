"""Pages and animations of pictures: views, masks, and the maps of `evaluation/segmentation.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lejepa_fast.train.evaluation.segmentation import SetMaps, attention_rank, enlarge
from lejepa_fast.train.report.plots import MUTED, report_figure

DIMMED = 0.15  # brightness outside of a mask
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


def dimmed(pixels: Tensor, mask: Tensor) -> Tensor:
    """The images (B, 3, S, S), dark outside of a mask of their patches, (B, h, w) bool."""
    seen = F.interpolate(mask[:, None].float(), size=pixels.shape[-2:], mode="nearest")
    return pixels * (DIMMED + (1 - DIMMED) * seen)


def draw_page(path: Path, columns: Mapping[str, Tensor], names: Sequence[str] = ()) -> None:
    """Write a PNG: a row for each image, a column for each entry (n, 3, S, S), which may differ in S.

    Args:
        path: the PNG.
        columns: RGB in 0-1, by title.
        names: to write beside the rows.
    """
    sizes = [pictures.shape[-1] for pictures in columns.values()]
    largest = max(sizes)
    gap = max(2, largest // 24)
    padded = []
    for pictures, size in zip(columns.values(), sizes, strict=True):
        above = (largest - size) // 2
        padded.append(F.pad(pictures, (0, gap, above, largest - size - above + gap), value=1.0))
    canvas = torch.cat(padded, dim=3).permute(0, 2, 3, 1).flatten(0, 1).numpy()
    height, width = canvas.shape[:2]
    # A picture has 1.35 inches at least, and more where the page has room.
    scale = max(1.35 / (largest + gap), min(10 / width, 8.5 / height))
    with report_figure(path, scale * width + 0.3, scale * height + 0.3) as figure:
        ax = figure.subplots()
        ax.imshow(canvas)
        ax.set_axis_off()
        style: dict[str, Any] = {"color": MUTED, "va": "bottom", "fontsize": 9.5}
        for column, (title, size) in enumerate(zip(columns, sizes, strict=True)):
            left = sum(sizes[:column]) + column * gap
            ax.text(left + size / 2, -3, title, ha="center", **style)
        style |= {"va": "center", "fontsize": 6.5, "rotation": 90}
        for row, name in enumerate(names):
            ax.text(-3, row * (largest + gap) + largest / 2, name[-24:], ha="right", **style)


def draw_animation(path: Path, columns: Mapping[str, Tensor], *, frames_per_second: float) -> None:
    """Write an animated WebP: the images are the frames, the columns stand side by side."""
    frames = torch.cat(list(columns.values()), dim=3).permute(0, 2, 3, 1)
    pictures = [Image.fromarray((255 * frame).round().byte().numpy()) for frame in frames]
    duration = round(1000 / frames_per_second)
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=duration, loop=0, lossless=False, quality=85
    )
