"""Every backend against torchvision v2: each operation, the whole chain, and statistics of the pixels.

Each backend ("dali": its graph on the CPU; "gpu": DALI and the color kernels on a GPU) runs from encoded
bytes to uint8 views and is compared with torchvision's own tensor kernels. test_ops.py shows that the draws
have torchvision's distribution.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from loader_bench import multicrop_transform
from PIL import Image
from torch import Tensor
from view_parity import (
    CHAIN,
    CROP_TOLERANCE,
    CROPS,
    OP_TOLERANCE,
    OPERATIONS,
    PHOTOGRAPHS,
    PLAIN,
    SIZE,
    FixedViews,
    MemorySource,
    changed,
    distance,
    fixed_views,
    reference,
    rendered,
    sample_views,
)

from lejepa_fast.data import MultiCropRecipe, draws, open_source
from lejepa_fast.data.backends.threaded import one_thread
from lejepa_fast.data.sources.base import EncodedSource
from lejepa_fast.data.views import TrainViews


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """128 x 96 px and 96 x 128 px."""
    source = open_source("trashnet96", "train")
    return [source[index][0] for index in PHOTOGRAPHS]


def error(view: Tensor, images: Sequence[Image.Image], drawn: np.ndarray) -> float:
    """Mean absolute difference from torchvision's view, of the worst image."""
    expected = [reference(image, drawn, SIZE, MultiCropRecipe()) for image in images]
    return max(distance(made, right) for made, right in zip(view, expected, strict=True))


PILLOW = ("torchvision", "dali")  # change colors by Pillow's kernels, on a CPU


def limit(backend: str, name: str) -> float:
    crop = name.removesuffix(", flipped") in CROPS
    same_operators = crop or name in ("plain", "flip", "solarize") or name.startswith("blur")
    if (backend == "torchvision" and same_operators) or (backend == "cpu" and crop):
        return 0
    # Pillow's hue has 8 bits.
    loose = crop or (backend in PILLOW and ("hue" in name or "jitter" in name))
    return CROP_TOLERANCE if loose else OP_TOLERANCE


def test_operations_and_crops_equal_torchvision(backend, photographs):
    crops = {name: changed(PLAIN, top=t, left=x, height=h, width=w) for name, (t, x, h, w) in CROPS.items()}
    crops |= {f"{name}, flipped": changed(crop, flip=1) for name, crop in crops.items()}
    pairs = OPERATIONS | {
        name: (crop, changed(crop, top=max(0, crop[draws.TOP] - 4), height=crop[draws.HEIGHT] + 4))
        for name, crop in crops.items()
    }
    views = fixed_views(backend, photographs, [right for right, _ in pairs.values()])
    for view, (name, (right, wrong)) in zip(views, pairs.items(), strict=True):
        assert error(view, photographs, right) <= limit(backend, name), name
        assert error(view, photographs, wrong) > limit(backend, name), name  # a little wrong is noticed


def test_chain_equals_torchvision_image_by_image(backend, photographs):
    views_of = TrainViews(MemorySource(photographs, 4), CHAIN, seed=3)
    count = len(views_of.source)
    views = rendered(backend, views_of, count)
    right, another = [], []
    for index in range(count):
        image = photographs[index % len(photographs)]
        drawn = sample_views(CHAIN, index, image.size, seed=3)
        for v, size in enumerate(CHAIN.view_sizes()):
            right.append(distance(views[v][index], reference(image, drawn[v], size, CHAIN)))
            another.append(distance(views[v][index], reference(image, drawn[v - 1], size, CHAIN)))
    assert max(right) < (CROP_TOLERANCE if backend in PILLOW else OP_TOLERANCE)
    assert np.mean(right) < 1
    assert min(another) > CROP_TOLERANCE


def test_jpeg_files_decode_alike(backend):
    source = open_source("trashnet96", "train").subset(PHOTOGRAPHS)
    recipe = MultiCropRecipe(global_crops=1, global_size=SIZE, local_crops=0)
    (views,) = rendered(backend, FixedViews(source, recipe, 0, PLAIN[None]), len(source))
    # The same library on a CPU; nvJPEG rounds in its own way.
    allowed = OP_TOLERANCE if backend == "gpu" else 0
    for view, (image, _) in zip(views, (source[i] for i in range(len(source))), strict=True):
        assert distance(view, reference(image, PLAIN, SIZE, recipe)) <= allowed


def channel_statistics(views: Sequence[Tensor]) -> np.ndarray:
    """Per image (first dimension of each view): mean and mean square of each channel over all its views."""
    scaled = [view.double() / 255 for view in views]
    moments = [torch.cat([view.mean(dim=(2, 3)), view.square().mean(dim=(2, 3))], dim=1) for view in scaled]
    return torch.stack(moments).mean(dim=0).numpy()


def worst_t_value(one: np.ndarray, other: np.ndarray) -> float:
    """Largest paired t value over the columns."""
    gap = one - other
    return float(np.abs(gap.mean(axis=0) / (gap.std(axis=0, ddof=1) / np.sqrt(len(gap)))).max())


STATISTICS = MultiCropRecipe(global_size=32, local_size=24, blur_kernel=3, global_crops=4, local_crops=4)


@pytest.fixture(scope="module")
def spread_source() -> EncodedSource:
    source = open_source("trashnet96", "train")
    return source.subset(range(0, len(source), len(source) // 240)[:240])


@pytest.fixture(scope="module")
def plain_statistics(spread_source) -> list[np.ndarray]:
    """Of torchvision's own random transforms with the same recipe, and with one that is a little wrong."""
    found = []
    for recipe in (STATISTICS, dataclasses.replace(STATISTICS, solarize_prob=0.3)):
        transform = multicrop_transform(recipe, tensors=False, normalized=False)
        with torch.random.fork_rng(), one_thread():
            torch.manual_seed(0)
            views = [transform(spread_source[index][0]) for index in range(len(spread_source))]
        found.append(channel_statistics([torch.stack(view) for view in zip(*views, strict=True)]))
    return found


def test_channel_statistics_equal_plain_torchvisions(backend, spread_source, plain_statistics):
    """The same images: means and variances by channel."""
    ours = channel_statistics(rendered(backend, TrainViews(spread_source, STATISTICS, seed=1), 48))
    same, other = plain_statistics
    assert worst_t_value(ours, same) < 3.9  # 6 columns, together 99.9 %
    assert worst_t_value(ours, other) > 3.9
