"""Random numbers as a pure function of (seed, stream, epoch, index).

The generator is counter-based, so the worker, rank and batch of an image change nothing and there is no state
to save: Philox-4x64 with (seed, purpose) as its key and (index, epoch) as the high words of its counter. Only
its raw 64-bit words are used, which NumPy guarantees to be the same in all versions.
"""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lejepa_fast.data.recipe import MultiCropRecipe

# Purposes (streams). A new purpose takes a new number; changing one changes every run.
ORDER, AUGMENT, HOLDOUT, PACK, SUBSTITUTE, SLICE, MASKS = 1, 2, 3, 4, 5, 6, 7

_MASK = (1 << 64) - 1
_CROP_TRIES = 10  # as torchvision's RandomResizedCrop
_TOP, _LEFT, _FLIP, _JITTER, _SEQUENCE = range(2 * _CROP_TRIES, 2 * _CROP_TRIES + 5)
_FACTORS = _SEQUENCE + 1
_GRAY, _BLUR, _SIGMA, _SOLARIZE = range(_FACTORS + 4, _FACTORS + 8)
_WORDS_PER_VIEW = 36  # a few spare words, so that a new operation need not shift the others

JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
_SEQUENCE_TABLE = np.array(list(permutations(range(len(JITTER_OPS)))))


def raw_words(seed: int, stream: int, epoch: int, index: int, count: int) -> np.ndarray:
    """`count` uniform 64-bit words (uint64) that depend on the four numbers only."""
    (words,) = _rows_of_words(seed, stream, epoch, [index], count)
    return words


def _rows_of_words(
    seed: int, stream: int, epoch: int, indices: Sequence[int], count: int
) -> list[np.ndarray]:
    """`raw_words` of several images, by one generator: making one takes longer than drawing its words."""
    # NumPy integers would overflow.
    key = np.array([int(seed) & _MASK, stream], dtype=np.uint64)
    counter = np.array([0, 0, 0, int(epoch) & _MASK], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=counter)
    state: Any = generator.state
    rows = []
    for index in indices:
        state["state"]["counter"][2] = int(index) & _MASK
        generator.state = state
        rows.append(generator.random_raw(count))
    return rows


def uniforms(seed: int, stream: int, epoch: int, indices: Sequence[int], count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) of each image: (B, count) float64."""
    words = np.array(_rows_of_words(seed, stream, epoch, indices, count), np.uint64)
    return (words.reshape(len(indices), count) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, stream: int, epoch: int, index: int, count: int) -> np.ndarray:
    """A random order of 0 .. count-1 (int64): the ranks of random 64-bit keys."""
    return np.argsort(raw_words(seed, stream, epoch, index, count), kind="stable")


# Columns of `view_table`. The window is in pixels of the upright image and need not be whole. The four codes
# say which color operation comes first, second, ... Sigma 0 means no blur.
TOP, LEFT, HEIGHT, WIDTH, FLIP = range(5)
CODES, FACTORS = 5, 9
GRAY, SIGMA, SOLARIZE = 13, 14, 15
COLUMNS = 16
SKIP, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(5)


def view_table(
    recipe: "MultiCropRecipe",
    *,
    seed: int,
    epoch: int,
    indices: Sequence[int],
    sizes: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Draw all views, globals first, of images of these (width, height): (B, V, COLUMNS) float64."""
    shape = (len(indices), recipe.num_views)
    u = uniforms(seed, AUGMENT, epoch, indices, recipe.num_views * _WORDS_PER_VIEW)
    u = u.reshape(*shape, _WORDS_PER_VIEW)
    table = np.zeros((*shape, COLUMNS))
    _draw_windows(recipe, u, np.asarray(sizes, dtype=np.float64), table)
    table[..., FLIP] = u[..., _FLIP] < recipe.flip_prob
    _draw_jitter(recipe, u, table)
    table[..., GRAY] = u[..., _GRAY] < recipe.grayscale_prob
    low, high = recipe.blur_sigma
    table[..., SIGMA] = (u[..., _BLUR] < recipe.blur_prob) * (low + (high - low) * u[..., _SIGMA])
    table[..., SOLARIZE] = u[..., _SOLARIZE] < recipe.solarize_prob
    return table


def _draw_windows(recipe: "MultiCropRecipe", u: np.ndarray, sizes: np.ndarray, table: np.ndarray) -> None:
    """Take the first of ten windows per view that fits, else a central one, as torchvision does."""
    scales = [recipe.global_scale] * recipe.global_crops + [recipe.local_scale] * recipe.local_crops
    scale_low, scale_high = np.array(scales).T[..., None]  # (V, 1)
    ratio_low, ratio_high = map(math.log, recipe.aspect_ratio)
    width, height = sizes[:, None, 0], sizes[:, None, 1]  # (B, 1), against (B, V) below
    area = scale_low + (scale_high - scale_low) * u[..., :_CROP_TRIES]
    area *= (width * height)[..., None]
    ratio = np.exp(ratio_low + (ratio_high - ratio_low) * u[..., _CROP_TRIES : 2 * _CROP_TRIES])
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= width[..., None]) & (heights > 0) & (heights <= height[..., None])
    first = fits.argmax(axis=-1)[..., None]
    w, h = (np.take_along_axis(sides, first, -1)[..., 0] for sides in (widths, heights))
    top, left = np.floor(u[..., _TOP] * (height - h + 1)), np.floor(u[..., _LEFT] * (width - w + 1))
    # Very long or very small images: the largest central region with a legal aspect ratio.
    low, high = recipe.aspect_ratio
    middle_w = np.maximum(1, np.minimum(width, np.rint(height * high)))
    middle_h = np.maximum(1, np.minimum(height, np.rint(width / low)))
    middle = (height - middle_h) // 2, (width - middle_w) // 2, middle_h, middle_w
    for column, (drawn, central) in enumerate(zip((top, left, h, w), middle, strict=True), TOP):
        table[..., column] = np.where(fits.any(axis=-1), drawn, central)


def _draw_jitter(recipe: "MultiCropRecipe", u: np.ndarray, table: np.ndarray) -> None:
    """Draw the color operations with their factors, in random order; those of range 0 are left out."""
    spreads = np.array([getattr(recipe, name) for name in JITTER_OPS])
    low, high = np.maximum(0.0, 1.0 - spreads), 1.0 + spreads
    low[HUE - 1], high[HUE - 1] = -recipe.hue, recipe.hue
    factors = low + (high - low) * u[..., _FACTORS : _FACTORS + len(JITTER_OPS)]
    order = _SEQUENCE_TABLE[(u[..., _SEQUENCE] * len(_SEQUENCE_TABLE)).astype(np.int64)]  # (B, V, 4)
    jittered = u[..., _JITTER, None] < recipe.jitter_prob
    chosen = jittered & (spreads[order] > 0)
    table[..., CODES : CODES + 4] = chosen * (order + 1)
    table[..., FACTORS : FACTORS + 4] = chosen * np.take_along_axis(factors, order, -1)
