"""Multi-crop draws and pixel operations against torchvision."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lejepa_fast.data.backends import gpu_color
from lejepa_fast.data.backends.base import RawBatch
from lejepa_fast.data.backends.torchvision_backend import apply_view, to_tensor
from lejepa_fast.data.draws import ViewParams, permutation, raw_words, sample_views, uniforms
from lejepa_fast.data.loader import Normalise
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.errors import UsageError

RECIPE = MultiCropRecipe()
PLAIN = ViewParams(4, 7, 40, 50, flip=False, jitter=(), grayscale=False, blur_sigma=None, solarize=False)


@pytest.fixture
def image() -> Image.Image:
    """Smooth colors with some noise, 96 x 72 px: every operation changes it."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:72, 0:96]
    pixels = np.stack([rows * 3, columns * 2, 255 - rows - columns], axis=-1) + rng.integers(
        -20, 20, (72, 96, 3)
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draws(
    count: int, recipe: MultiCropRecipe = RECIPE, width: int = 400, height: int = 300
) -> list[list[ViewParams]]:
    return [sample_views(recipe, seed=1, epoch=0, index=i, width=width, height=height) for i in range(count)]


def reference_crop(image: Image.Image, size: int = 32) -> torch.Tensor:
    return F.resized_crop(F.pil_to_tensor(image), 4, 7, 40, 50, [size, size], antialias=True)


# --- randomness ---------------------------------------------------------------------------------


def test_words_are_fixed_for_ever():
    # Literal values: a change here changes every run that anyone resumes.
    words = raw_words(seed=3, stream=2, epoch=5, index=7, count=3)
    bit_generator = np.random.Philox(key=3 + (2 << 64), counter=(7 << 128) + (5 << 192))
    assert words.tolist() == bit_generator.random_raw(3).tolist()
    assert words.tolist() == WORDS


WORDS = [12351501861228605703, 894593679500157034, 3294442453475837838]


def test_streams_differ_in_each_argument():
    base = {"seed": 0, "stream": 1, "epoch": 0, "index": 0}
    rows = [raw_words(**base, count=8)] + [raw_words(**{**base, key: base[key] + 1}, count=8) for key in base]
    rows.append(raw_words(**{**base, "seed": -1}, count=8))  # a negative seed is as good as any
    for one, other in itertools.combinations(rows, 2):
        assert not np.intersect1d(one, other).size


def test_uniforms_and_permutation():
    values = uniforms(0, 1, 0, 0, 20_000)
    assert values.min() >= 0
    assert values.max() < 1
    # Kolmogorov-Smirnov distance; 1.63 / sqrt(n) is the 1 % point.
    assert np.abs(np.sort(values) - (np.arange(20_000) + 0.5) / 20_000).max() < 1.63 / math.sqrt(20_000)
    order = permutation(0, 1, 0, 0, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.mean(order == np.arange(1000)) < 0.02


def test_draws_repeat_and_depend_on_epoch_and_index():
    first = sample_views(RECIPE, seed=0, epoch=0, index=3, width=96, height=96)
    assert first == sample_views(RECIPE, seed=0, epoch=0, index=3, width=96, height=96)
    for other in ({"seed": 1}, {"epoch": 1}, {"index": 4}):
        arguments = {"seed": 0, "epoch": 0, "index": 3, **other}
        assert first != sample_views(RECIPE, width=96, height=96, **arguments)
    assert len(set(first)) == RECIPE.num_views


# --- distributions ------------------------------------------------------------------------------


def within_4_sigma(count: int, n: int, p: float) -> bool:
    return abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))


def test_operation_frequencies():
    views = [view for sample in draws(1250) for view in sample]
    n = len(views)
    assert n == 10_000
    assert within_4_sigma(sum(v.flip for v in views), n, 0.5)
    assert within_4_sigma(sum(bool(v.jitter) for v in views), n, 0.8)
    assert within_4_sigma(sum(v.grayscale for v in views), n, 0.2)
    assert within_4_sigma(sum(v.blur_sigma is not None for v in views), n, 0.5)
    assert within_4_sigma(sum(v.solarize for v in views), n, 0.2)
    # Independent of each other: the pair occurs with the product of the probabilities.
    assert within_4_sigma(sum(v.flip and v.solarize for v in views), n, 0.1)
    orders = [tuple(name for name, _ in v.jitter) for v in views if v.jitter]
    for order in itertools.permutations(("brightness", "contrast", "saturation", "hue")):
        assert within_4_sigma(orders.count(order), len(orders), 1 / 24)


def test_factors_are_uniform_in_their_ranges():
    views = [view for sample in draws(500) for view in sample]
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    values = {name: [f for v in views for n, f in v.jitter if n == name] for name in ranges}
    values["sigma"] = [v.blur_sigma for v in views if v.blur_sigma is not None]
    ranges["sigma"] = (0.1, 2.0)
    for name, (low, high) in ranges.items():
        scaled = (np.sort(values[name]) - low) / (high - low)
        assert scaled[0] >= 0
        assert scaled[-1] <= 1
        distance = np.abs(scaled - (np.arange(len(scaled)) + 0.5) / len(scaled)).max()
        assert distance < 1.95 / math.sqrt(len(scaled)), name  # 0.1 % point


def test_crops_have_torchvisions_distribution():
    width, height, n = 400, 300, 2000
    recipe = MultiCropRecipe(global_crops=1, local_crops=1)
    ours = np.array(
        [[(v.height, v.width, v.top, v.left) for v in sample] for sample in draws(n, recipe)], float
    )
    for which, scale in enumerate([(0.3, 1.0), (0.05, 0.3)]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            crop = v2.RandomResizedCrop(8, scale=scale)
            blank = [torch.empty(3, height, width)]
            theirs = [crop.make_params(blank) for _ in range(n)]
        theirs_table = np.array([(p["height"], p["width"], p["top"], p["left"]) for p in theirs], float)
        for feature in (
            lambda t: t[:, 0] * t[:, 1],  # area
            lambda t: t[:, 1] / t[:, 0],  # aspect ratio
            lambda t: t[:, 2] / (height - t[:, 0] + 1),  # position
            lambda t: t[:, 3] / (width - t[:, 1] + 1),
        ):
            one, other = np.sort(feature(ours[:, which])), np.sort(feature(theirs_table))
            points = np.concatenate([one, other])
            gap = np.searchsorted(one, points, "right") - np.searchsorted(other, points, "right")
            assert np.abs(gap).max() / n < 1.95 * math.sqrt(2 / n)  # two-sample KS, 0.1 % point


@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (1, 500), (500, 1), (2, 3), (3000, 20)],  # pixels and strips: no try fits
)
def test_crops_of_odd_images_stay_inside(width: int, height: int):
    for sample in draws(40, width=width, height=height):
        for v in sample:
            assert 0 < v.width <= width
            assert 0 < v.height <= height
            assert 0 <= v.top <= height - v.height
            assert 0 <= v.left <= width - v.width


def test_operations_with_range_0_are_left_out():
    recipe = MultiCropRecipe(hue=0.0, jitter_prob=1.0, brightness=3.0)
    views = [view for sample in draws(50, recipe) for view in sample]
    assert all(len(v.jitter) == 3 for v in views)
    assert all(factor >= 0 for v in views for _, factor in v.jitter)


# --- pixels -------------------------------------------------------------------------------------


def test_crop_and_flip_equal_torchvision(image):
    pixels = to_tensor(image)
    assert torch.equal(pixels, F.pil_to_tensor(image))
    assert torch.equal(apply_view(pixels, PLAIN, 32, RECIPE), reference_crop(image))
    flipped = apply_view(pixels, PLAIN._replace(flip=True), 32, RECIPE)
    assert torch.equal(flipped, reference_crop(image).flip(-1))


@pytest.mark.parametrize(
    ("name", "factor", "tolerance"),
    # Tolerance against torchvision's tensor kernels, in levels of 255. One rounding for brightness and
    # contrast, two for saturation (the gray image is rounded as well). The Pillow hue kernel keeps hue,
    # and the shift, in 8 bits, both truncated: at most 2/255 of a turn, of which each sixth moves a
    # channel by at most 255 levels, so 12, and 2 more for the 8-bit saturation and value.
    [
        ("brightness", 1.3, 1),
        ("contrast", 0.7, 1),
        ("saturation", 1.2, 2),
        ("hue", 0.07, 14),
        ("hue", -0.1, 14),
    ],
)
def test_jitter_equals_torchvision(image, name, factor, tolerance):
    ours = apply_view(to_tensor(image), PLAIN._replace(jitter=((name, factor),)), 32, RECIPE)
    crop = reference_crop(image)
    function = getattr(F, f"adjust_{name}")
    assert torch.equal(ours, F.pil_to_tensor(function(F.to_pil_image(crop), factor)))
    tensor_kernel = function(crop, factor)
    assert (ours.int() - tensor_kernel.int()).abs().max() <= tolerance
    assert (ours.int() - crop.int()).abs().float().mean() > 2  # and it did something


def test_jitter_keeps_its_order(image):
    pair = (("contrast", 1.4), ("brightness", 1.4))
    one = apply_view(to_tensor(image), PLAIN._replace(jitter=pair), 32, RECIPE)
    other = apply_view(to_tensor(image), PLAIN._replace(jitter=pair[::-1]), 32, RECIPE)
    crop = F.to_pil_image(reference_crop(image))
    expected = F.adjust_brightness(F.adjust_contrast(crop, 1.4), 1.4)
    assert torch.equal(one, F.pil_to_tensor(expected))
    assert not torch.equal(one, other)


def test_grayscale_blur_and_solarize_equal_torchvision(image):
    crop = reference_crop(image)
    gray = apply_view(to_tensor(image), PLAIN._replace(grayscale=True), 32, RECIPE)
    assert torch.equal(gray[0], gray[1])
    assert torch.equal(gray[0], gray[2])
    assert (gray.int() - F.rgb_to_grayscale(crop, 3).int()).abs().max() <= 1
    blurred = apply_view(to_tensor(image), PLAIN._replace(blur_sigma=1.3), 32, RECIPE)
    assert torch.equal(blurred, F.gaussian_blur(crop, [7, 7], [1.3, 1.3]))
    recipe = MultiCropRecipe(blur_kernel=3, solarize_threshold=60)
    solarized = apply_view(to_tensor(image), PLAIN._replace(solarize=True), 32, recipe)
    assert torch.equal(solarized, F.solarize(crop, 60))
    both = apply_view(to_tensor(image), PLAIN._replace(blur_sigma=1.3, solarize=True), 32, recipe)
    assert torch.equal(both, F.solarize(F.gaussian_blur(crop, [3, 3], [1.3, 1.3]), 60))


def test_normalise(image):
    pixels = torch.stack([to_tensor(image), to_tensor(image).flip(-1)])
    expected = v2.Normalize(RECIPE.mean, RECIPE.std)(pixels.double() / 255)

    def normalised(**options) -> torch.Tensor:
        raw = RawBatch([pixels], torch.zeros(2, dtype=torch.int64))
        return Normalise(RECIPE.mean, RECIPE.std, **options)(raw)[0][0]

    got = normalised()
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    half = normalised(dtype=torch.bfloat16, channels_last=True)
    assert torch.equal(half, got.bfloat16())
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalised(dtype=torch.uint8), pixels)


# --- recipe -------------------------------------------------------------------------------------


def test_default_recipe_is_the_authors():
    RECIPE.validate()
    assert RECIPE.view_sizes() == [224] * 2 + [98] * 6
    assert RECIPE.smallest_image == 224
    assert MultiCropRecipe(global_size=64, local_size=96).smallest_image == 96
    assert MultiCropRecipe(global_size=64, local_crops=0).smallest_image == 64
    assert MultiCropRecipe(min_image_size=1).smallest_image == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"global_crops": 0},
        {"local_crops": -1},
        {"global_size": 0},
        {"global_scale": (0.0, 1.0)},  # area 0 has no crop
        {"global_scale": (0.5, 0.3)},
        {"global_scale": 0.5},
        {"local_scale": (0.1,)},
        {"local_scale": [0.1, 0.2]},
        {"aspect_ratio": "ab"},
        {"global_size": 2.5},
        {"local_crops": None},
        {"min_image_size": "large"},
        {"solarize_prob": "often"},
        {"std": 0.2},
        {"local_scale": (0.1, 1.1)},
        {"aspect_ratio": (-1.0, 1.0)},
        {"flip_prob": 1.5},
        {"jitter_prob": -0.1},
        {"blur_prob": float("nan")},
        {"brightness": -0.1},
        {"contrast": float("inf")},
        {"hue": 0.6},
        {"blur_kernel": 8},
        {"blur_sigma": (0.0, 1.0)},
        {"solarize_threshold": 256},
        {"mean": (0.5, 0.5)},
        {"std": (0.2, 0.0, 0.2)},
        {"min_image_size": 0},
    ],
    ids=lambda setting: "-".join(setting),
)
def test_bad_recipe_is_named(setting):
    with pytest.raises(UsageError) as caught:
        MultiCropRecipe(**setting).validate()
    (name, value), text = next(iter(setting.items())), str(caught.value)
    assert name in text
    assert str(value) in text
    assert "\n" not in text


def test_blur_kernel_must_fit_the_crops():
    with pytest.raises(UsageError, match="blur_kernel must be at most 15 for crops of 8 px; got 23"):
        MultiCropRecipe(local_size=8, blur_kernel=23).validate()
    MultiCropRecipe(local_size=8, blur_kernel=15).validate()
    MultiCropRecipe(local_size=8, blur_kernel=23, blur_prob=0.0).validate()


def test_colors_without_triton_kernels_are_logged(caplog):
    """As on a GPU that cannot run them: torchvision's operators take over, after a line that says why."""
    caplog.set_level(logging.WARNING, logger="lejepa_fast.data")
    assert not gpu_color._has_kernels.__wrapped__(torch.device("cpu"))
    assert "torchvision's operators change the colors" in caplog.text
