"""Random numbers and draws: fixed values, and torchvision's distributions. And the recipe's checks."""

import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from view_parity import sample_views

from lejepa_fast.data import MultiCropRecipe, draws
from lejepa_fast.data.draws import COLUMNS, permutation, raw_words
from lejepa_fast.errors import UsageError

RECIPE = MultiCropRecipe()


def views_of(count: int, recipe: MultiCropRecipe = RECIPE, width: int = 400, height: int = 300) -> np.ndarray:
    """What is drawn for all views of so many images: (count, V, COLUMNS)."""
    sizes = [(width, height)] * count
    return draws.view_table(recipe, seed=1, epoch=0, indices=range(count), sizes=sizes)


# --- random numbers -----------------------------------------------------------------------------


def test_words_are_fixed_for_ever():
    # Literal values: a change here changes every run that anyone resumes.
    words = raw_words(seed=3, stream=2, epoch=5, index=7, count=3)
    bit_generator = np.random.Philox(key=3 + (2 << 64), counter=(7 << 128) + (5 << 192))
    assert words.tolist() == bit_generator.random_raw(3).tolist()
    assert words.tolist() == [12351501861228605703, 894593679500157034, 3294442453475837838]


def test_streams_differ_in_each_argument():
    base = {"seed": 0, "stream": 1, "epoch": 0, "index": 0}
    rows = [raw_words(**base, count=8)] + [raw_words(**{**base, key: base[key] + 1}, count=8) for key in base]
    rows.append(raw_words(**{**base, "seed": -1}, count=8))  # a negative seed is as good as any
    for one, other in itertools.combinations(rows, 2):
        assert not np.intersect1d(one, other).size


def test_permutation():
    order = permutation(0, 1, 0, 0, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.mean(order == np.arange(1000)) < 0.02


def test_draws_repeat_and_depend_on_seed_epoch_and_index():
    base = {"seed": 0, "epoch": 0, "index": 3, "size": (96, 96)}
    first = sample_views(RECIPE, **base)
    assert np.array_equal(first, sample_views(RECIPE, **base))
    assert len(np.unique(first, axis=0)) == RECIPE.num_views
    for other in ({"seed": 1}, {"epoch": 1}, {"index": 4}):
        assert not np.array_equal(first, sample_views(RECIPE, **{**base, **other}))


# --- distributions ------------------------------------------------------------------------------


def within_4_sigma(count: int, n: int, p: float) -> bool:
    return abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))


def test_operation_frequencies():
    views = views_of(1250).reshape(-1, COLUMNS)
    n = len(views)
    assert n == 10_000
    happens = views[:, [draws.FLIP, draws.CODES, draws.GRAY, draws.SIGMA, draws.SOLARIZE]] > 0
    for count, probability in zip(happens.sum(axis=0), (0.5, 0.8, 0.2, 0.5, 0.2), strict=True):
        assert within_4_sigma(count, n, probability)
    # Independent of each other: the pair occurs with the product of the probabilities.
    assert within_4_sigma((happens[:, 0] & happens[:, 4]).sum(), n, 0.1)
    orders = views[happens[:, 1], draws.CODES : draws.FACTORS].tolist()
    for order in itertools.permutations([1, 2, 3, 4]):
        assert within_4_sigma(orders.count(list(order)), len(orders), 1 / 24)


def test_factors_are_uniform_in_their_ranges():
    views = views_of(500).reshape(-1, COLUMNS)
    codes, factors = views[:, draws.CODES : draws.FACTORS], views[:, draws.FACTORS : draws.GRAY]
    ranges = {
        draws.BRIGHTNESS: (0.6, 1.4),
        draws.CONTRAST: (0.6, 1.4),
        draws.SATURATION: (0.8, 1.2),
        draws.HUE: (-0.1, 0.1),
    }
    samples = [(factors[codes == code], bounds) for code, bounds in ranges.items()]
    samples.append((views[views[:, draws.SIGMA] > 0, draws.SIGMA], (0.1, 2.0)))
    for values, (low, high) in samples:
        scaled = (np.sort(values) - low) / (high - low)
        assert 0 <= scaled[0] < scaled[-1] <= 1
        distance = np.abs(scaled - (np.arange(len(scaled)) + 0.5) / len(scaled)).max()
        assert distance < 1.95 / math.sqrt(len(scaled)), (low, high)  # 0.1 % point


def test_crops_have_torchvisions_distribution():
    width, height, n = 400, 300, 2000
    ours = views_of(n, MultiCropRecipe(global_crops=1, local_crops=1))
    for which, scale in enumerate([(0.3, 1.0), (0.05, 0.3)]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            crop = v2.RandomResizedCrop(8, scale=scale)
            theirs = [crop.make_params([torch.empty(3, height, width)]) for _ in range(n)]
        table = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs], float)
        for feature in (
            lambda t: t[:, draws.HEIGHT] * t[:, draws.WIDTH],
            lambda t: t[:, draws.WIDTH] / t[:, draws.HEIGHT],
            lambda t: t[:, draws.TOP] / (height - t[:, draws.HEIGHT] + 1),
            lambda t: t[:, draws.LEFT] / (width - t[:, draws.WIDTH] + 1),
        ):
            one, other = np.sort(feature(ours[:, which])), np.sort(feature(table))
            points = np.concatenate([one, other])
            gap = np.searchsorted(one, points, "right") - np.searchsorted(other, points, "right")
            assert np.abs(gap).max() / n < 1.95 * math.sqrt(2 / n)  # two-sample KS, 0.1 % point


@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (1, 500), (500, 1), (2, 3), (3000, 20)],  # pixels and strips: no try fits
)
def test_crops_of_odd_images_stay_inside(width: int, height: int):
    top, left, h, w = np.moveaxis(views_of(40, RECIPE, width, height)[..., : draws.FLIP], -1, 0)
    assert ((w > 0) & (h > 0) & (top >= 0) & (left >= 0)).all()
    assert ((top + h <= height) & (left + w <= width)).all()


@pytest.mark.parametrize(("width", "height"), [(20, 3001), (3001, 20)])  # no try fits
def test_crops_of_strips_are_torchvisions_central_ones(width: int, height: int):
    crop = v2.RandomResizedCrop(8, scale=(1.0, 1.0))
    theirs = crop.make_params([torch.empty(3, height, width)])
    ours = views_of(1, MultiCropRecipe(global_crops=1, global_scale=(1.0, 1.0)), width, height)[0, 0]
    expected = [theirs[side] for side in ("top", "left", "height", "width")]
    assert [ours[column] for column in (draws.TOP, draws.LEFT, draws.HEIGHT, draws.WIDTH)] == expected


def test_operations_with_range_0_are_left_out():
    recipe = MultiCropRecipe(hue=0.0, jitter_prob=1.0, brightness=3.0)
    views = views_of(50, recipe)
    assert ((views[..., draws.CODES : draws.FACTORS] > 0).sum(axis=-1) == 3).all()
    assert (views[..., draws.FACTORS : draws.GRAY] >= 0).all()


# --- recipe -------------------------------------------------------------------------------------


def test_default_recipe_is_the_authors():
    RECIPE.validate()
    assert RECIPE.view_sizes() == [224] * 2 + [98] * 6
    assert RECIPE.smallest_image == 224
    assert MultiCropRecipe(global_size=64, local_size=96).smallest_image == 96
    assert MultiCropRecipe(global_size=64, local_crops=0).smallest_image == 64
    assert MultiCropRecipe(min_image_size=1).smallest_image == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"global_crops": 0}, "global_crops: expected at least 1, got 0"),
        ({"global_scale": (0.0, 1.0)}, "global_scale[0]: expected above 0, got 0.0"),
        ({"global_scale": (0.5, 0.3)}, "global_scale: expected a pair (a, b) with a <= b, got (0.5, 0.3)"),
        ({"local_scale": [0.1, 0.2]}, "local_scale: expected a tuple, got [0.1, 0.2]"),
        ({"flip_prob": 1.5}, "flip_prob: expected at most 1, got 1.5"),
        ({"blur_prob": float("nan")}, "blur_prob: expected "),
        ({"contrast": float("inf")}, "contrast: expected below inf, got inf"),
        ({"blur_kernel": 8}, "blur_kernel: expected odd, got 8"),
        ({"std": (0.2, 0.0, math.inf)}, "std[1]: expected above 0, got 0.0"),
        # Reflection padding needs more pixels than it mirrors.
        ({"local_size": 8, "blur_kernel": 17}, "blur_kernel: expected at most 15 for crops of 8 px, got 17"),
        ({"local_size": 8, "blur_kernel": 15}, None),  # just fits
        ({"local_size": 8, "blur_kernel": 23, "blur_prob": 0.0}, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_recipe_is_named(setting, message):
    if message is None:
        assert MultiCropRecipe(**setting).validate() is None
        return
    with pytest.raises(UsageError) as caught:
        MultiCropRecipe(**setting).validate()
    assert str(caught.value).startswith(f"multi-crop recipe: {message}")
    assert "\n" not in str(caught.value)
