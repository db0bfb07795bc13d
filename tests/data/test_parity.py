"""The backends against torchvision v2: each operation, the whole chain, and the distributions.

Engines: "cpu"; "dali", its graph on the CPU with torchvision's colors behind it; "gpu", the graph on a GPU
with the color kernels behind it (see also `kernel_colour.py`). Each runs from encoded bytes to uint8 views
and is compared with torchvision's own tensor kernels. test_ops.py shows that the draws have torchvision's
distribution; here it is seen in the pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from loader_backends import on, skip_without
from loader_contenders import multicrop_transform
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from view_parity import (
    CHAIN,
    CROP_TOLERANCE,
    CROPS,
    ENGINES,
    OP_TOLERANCE,
    OPERATIONS,
    PHOTOGRAPHS,
    PLAIN,
    SIZE,
    FixedViews,
    MemorySource,
    as_row,
    distance,
    fixed_views,
    reference,
    rendered,
)

from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source
from lejepa_fast.data.draws import ViewParams, sample_views
from lejepa_fast.data.sources.base import EncodedSource
from lejepa_fast.data.views import TrainViews


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    skip_without(request.param)
    return request.param


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """128 x 96 px and 96 x 128 px."""
    source = open_source("trashnet96", "train")
    return [source[index][0] for index in PHOTOGRAPHS]


def error(view: Tensor, images: Sequence[Image.Image], params: ViewParams) -> float:
    """Mean absolute difference from torchvision's view, of the worst image."""
    expected = [reference(image, params, SIZE, MultiCropRecipe()) for image in images]
    return max(distance(made, right) for made, right in zip(view, expected, strict=True))


def test_operations_and_crops_equal_torchvision(engine, photographs):
    crops = {name: PLAIN._replace(top=t, left=x, height=h, width=w) for name, (t, x, h, w) in CROPS.items()}
    crops |= {f"{name}, flipped": crop._replace(flip=True) for name, crop in crops.items()}
    moved = {
        name: crop._replace(top=max(0, crop.top - 4), height=crop.height + 4) for name, crop in crops.items()
    }
    right = {name: pair[0] for name, pair in OPERATIONS.items()} | crops
    wrong = {name: pair[1] for name, pair in OPERATIONS.items()} | moved
    limits = {name: CROP_TOLERANCE if name in crops else OP_TOLERANCE for name in right}
    views = dict(zip(right, fixed_views(engine, photographs, list(right.values())), strict=True))
    found = {name: error(view, photographs, right[name]) for name, view in views.items()}
    assert {name: value for name, value in found.items() if value > limits[name]} == {}
    # The comparison tells them from neighbours that are a little wrong.
    missed = {name: error(view, photographs, wrong[name]) for name, view in views.items()}
    assert {name: value for name, value in missed.items() if value <= limits[name]} == {}


def test_a_hue_of_another_meaning_is_caught(photographs, monkeypatch):
    """DALI's own hue operator turns colors about the gray axis, which is not torchvision's shift in HSV."""
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")

    @dali.pipeline_def(batch_size=len(photographs), num_threads=1, device_id=None)
    def turned():
        return dali.fn.hue(dali.fn.external_source(name="views"), hue=36.0)

    shift = PLAIN._replace(jitter=(("hue", 0.1),))
    (plain, right) = fixed_views("dali", photographs, [PLAIN, shift])
    assert error(right, photographs, shift) <= OP_TOLERANCE
    pipe = turned()
    pipe.feed_input("views", plain.permute(0, 2, 3, 1).contiguous().numpy())
    (made,) = pipe.run()
    assert error(torch.from_numpy(made.as_array()).permute(0, 3, 1, 2), photographs, shift) > OP_TOLERANCE


# --- the whole chain ----------------------------------------------------------------------------


def test_chain_equals_torchvision_image_by_image(engine, photographs):
    views_of = TrainViews(MemorySource(photographs, 4), CHAIN, seed=3)
    count = len(views_of.source)
    views, through_pillow = rendered(engine, views_of, count), rendered("torchvision", views_of, count)
    to_tensors, to_pillow, to_another = [], [], []
    for index in range(count):
        image = photographs[index % len(photographs)]
        draws = sample_views(CHAIN, seed=3, epoch=0, index=index, width=image.width, height=image.height)
        for v, size in enumerate(CHAIN.view_sizes()):
            made = views[v][index]
            to_tensors.append(distance(made, reference(image, draws[v], size, CHAIN)))
            to_another.append(distance(made, reference(image, draws[v - 1], size, CHAIN)))
            to_pillow.append(distance(made, through_pillow[v][index]))
    assert max(to_tensors) < OP_TOLERANCE
    # Pillow's hue kernel keeps hue in 8 bits, which is the larger part of this.
    assert max(to_pillow) < CROP_TOLERANCE
    assert np.mean(to_pillow) < 1
    assert min(to_another) > CROP_TOLERANCE  # so these limits mean something


def test_loader_normalises_as_torchvision(engine, photographs):
    def first(**options):
        loader = multicrop_loader(MemorySource(photographs), CHAIN, batch_size=4, **on(engine), **options)
        return next(iter(loader))

    (pixels, labels), (values, same_labels) = first(dtype=torch.uint8), first()
    assert torch.equal(labels, same_labels)
    normalised = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(CHAIN.mean, CHAIN.std)])
    for view, value in zip(pixels, values, strict=True):
        torch.testing.assert_close(value, normalised(view), rtol=1e-5, atol=1e-5)


def test_jpeg_files_decode_alike(engine):
    source = open_source("trashnet96", "train").subset(PHOTOGRAPHS)
    recipe = MultiCropRecipe(global_crops=1, global_size=SIZE, local_crops=0)
    fixed = FixedViews(source, recipe, 0, as_row(PLAIN)[None])
    (views,) = rendered(engine, fixed, len(source))
    # The same library on a CPU; nvJPEG rounds in its own way.
    limit = OP_TOLERANCE if engine == "gpu" else 0
    for view, (image, _) in zip(views, (source[i] for i in range(len(source))), strict=True):
        assert distance(view, reference(image, PLAIN, SIZE, recipe)) <= limit


# --- distributions, seen in the pixels ----------------------------------------------------------

DRAWS = 10_000


def binomial_bounds(n: int, p: float, confidence: float = 0.999) -> tuple[int, int]:
    """The smallest and the largest count that a fair source gives, the tails left out."""
    k = np.arange(n + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_choose = log_factorials[n] - log_factorials - log_factorials[::-1]
    below = np.cumsum(np.exp(log_choose + k * np.log(p) + (n - k) * np.log(1 - p)))
    tail = (1 - confidence) / 2
    return int(np.searchsorted(below, tail)), int(np.searchsorted(below, 1 - tail))


def test_binomial_bounds():
    assert binomial_bounds(10, 0.5, 0.95) == (2, 8)  # as in any table
    low, high = binomial_bounds(DRAWS, 0.2)
    assert (low, high) == pytest.approx((2000 - 3.29 * 40, 2000 + 3.29 * 40), abs=2)


def test_operation_frequencies(engine):
    """Which operations were applied is read off each view: the nearest of all combinations of them."""
    whole = {"global_crops": 8, "global_scale": (1.0, 1.0), "aspect_ratio": (1.0, 1.0), "local_crops": 0}
    recipe = MultiCropRecipe(
        **whole, global_size=8, jitter_prob=0.0, blur_sigma=(1.5, 1.5), blur_kernel=3, solarize_prob=0.3
    )
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    source = MemorySource([image], DRAWS // 8)
    (*views,) = rendered(engine, TrainViews(source, recipe, seed=5), 625)
    combinations = list(product([False, True], repeat=4))
    known = torch.stack(
        [
            reference(image, ViewParams(0, 0, 8, 8, flip, (), gray, 1.5 if blur else None, solar), 8, recipe)
            for flip, gray, blur, solar in combinations
        ]
    )
    gaps = (torch.cat(views)[:, None].float() - known.float()).abs().mean(dim=(2, 3, 4))
    assert gaps.min(dim=1).values.max() < OP_TOLERANCE
    applied = np.array(combinations)[gaps.argmin(dim=1).numpy()]
    assert len(applied) == DRAWS
    for name, column in zip(("flip", "grayscale", "blur", "solarize"), applied.T, strict=True):
        low, high = binomial_bounds(DRAWS, getattr(recipe, f"{name}_prob"))
        assert low <= column.sum() <= high, name
    jittered = MultiCropRecipe(
        **whole, global_size=8, flip_prob=0, grayscale_prob=0, blur_prob=0, solarize_prob=0
    )
    (*views,) = rendered(engine, TrainViews(source, jittered, seed=5), 625)
    changed = (torch.cat(views) != known[0]).flatten(1).any(dim=1).sum().item()
    low, high = binomial_bounds(DRAWS, jittered.jitter_prob)
    assert low <= changed <= high


def crop_histograms(views: Tensor, size: int) -> dict[str, np.ndarray]:
    """Counts of area, log aspect ratio and place, read off crops of `coordinates(size)`."""
    pixels = views.double().numpy()
    scale = size / 255.0
    # Without the first and the last row and column: there a filter may see beyond the window, or not.
    inner = (views.shape[-1] - 3) / views.shape[-1]
    width = (pixels[:, 0, :, -2] - pixels[:, 0, :, 1]).mean(axis=1) * scale / inner
    height = (pixels[:, 1, -2] - pixels[:, 1, 1]).mean(axis=1) * scale / inner
    middle = pixels[:, 0].mean(axis=(1, 2)) * scale
    features = {
        "area": (width * height / size**2, 0.05, 0.3),
        "aspect": (np.log(width / height), -0.3, 0.3),
        "place": ((middle - width / 2) / (size - width), 0.0, 1.0),
    }
    return {
        name: np.histogram(np.clip(value, low, high - 1e-9), np.linspace(low, high, 11))[0]
        for name, (value, low, high) in features.items()
    }


def coordinates(size: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[0:size, 0:size]
    pixels = np.stack([columns, rows, columns * 0], axis=-1) * 255.0 / (size - 1)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def chi_square(one: np.ndarray, other: np.ndarray) -> float:
    """Two-sample statistic of equally large histograms, 9 degrees of freedom with 10 bins."""
    return float(((one - other) ** 2 / np.maximum(one + other, 1)).sum())


CHI_SQUARE_9 = 27.88  # its 99.9 % point


def test_crop_histograms_equal_torchvisions(engine):
    size, count = 200, 3000
    image = coordinates(size)
    recipe = MultiCropRecipe(
        global_crops=6, global_size=16, global_scale=(0.05, 0.3), local_crops=0, flip_prob=0, jitter_prob=0,
        grayscale_prob=0, blur_prob=0, solarize_prob=0,
    )  # fmt: skip
    (*views,) = rendered(engine, TrainViews(MemorySource([image], count // 6), recipe, seed=2), 50)
    ours = crop_histograms(torch.cat(views), size)

    def theirs(scale: tuple[float, float]) -> dict[str, np.ndarray]:
        crop = v2.RandomResizedCrop(16, scale, recipe.aspect_ratio, antialias=True)
        pixels = F.pil_to_tensor(image)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return crop_histograms(torch.stack([crop(pixels) for _ in range(count)]), size)

    same, other = theirs((0.05, 0.3)), theirs((0.08, 0.3))
    for name, counts in ours.items():
        assert counts.min() > 0, name
        assert chi_square(counts, same[name]) < CHI_SQUARE_9, name
    assert chi_square(ours["area"], other["area"]) > CHI_SQUARE_9


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
        transform = multicrop_transform(recipe, tensors=False, normalised=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            views = [transform(spread_source[index][0]) for index in range(len(spread_source))]
        found.append(channel_statistics([torch.stack(view) for view in zip(*views, strict=True)]))
    return found


def test_channel_statistics_equal_plain_torchvisions(engine, spread_source, plain_statistics):
    """The same images: means and variances by channel."""
    ours = channel_statistics(rendered(engine, TrainViews(spread_source, STATISTICS, seed=1), 48))
    same, other = plain_statistics
    assert worst_t_value(ours, same) < 3.9  # 6 columns, together 99.9 %
    assert worst_t_value(ours, other) > 3.9
