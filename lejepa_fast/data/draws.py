"""Random numbers as a pure function of (seed, stream, epoch, index).

Augmentation must not depend on which worker, rank or batch an image lands in, and must leave the
caller's global generators alone. A counter-based generator gives exactly that: Philox-4x64 with
the seed and the purpose as its key and (index, epoch) as the high words of its counter. There is
no state to carry, to fork or to save. Only the raw 64-bit words are used, because NumPy
guarantees their stability across versions, which it does not for its distributions.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np

from lejepa_fast.data.recipe import MultiCropRecipe

# Purposes (streams). A new purpose takes a new number; changing one changes every run.
ORDER, AUGMENT, HOLDOUT, PACK = 1, 2, 3, 4

_MASK = (1 << 64) - 1
_CROP_TRIES = 10  # as torchvision's RandomResizedCrop
_TOP, _LEFT, _FLIP, _JITTER, _SEQUENCE = range(2 * _CROP_TRIES, 2 * _CROP_TRIES + 5)
_FACTORS = _SEQUENCE + 1
_GRAY, _BLUR, _SIGMA, _SOLARIZE = range(_FACTORS + 4, _FACTORS + 8)
_WORDS_PER_VIEW = 36  # a few spare words, so that a new operation need not shift the others

JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
_SEQUENCES = tuple(permutations(range(len(JITTER_OPS))))


class ViewParams(NamedTuple):
    """Everything that is random about one view, in the order in which it is applied.

    `jitter` holds (operation, factor) pairs in their random order and is empty when the jitter is
    skipped; `blur_sigma` (pixels) is None when the blur is skipped. The crop is in pixels of the
    decoded image.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grayscale: bool
    blur_sigma: float | None
    solarize: bool


def raw_words(seed: int, stream: int, epoch: int, index: int, count: int) -> np.ndarray:
    """`count` uniform 64-bit words (uint64) that depend on the four numbers only."""
    key = np.array([seed & _MASK, stream], dtype=np.uint64)
    counter = np.array([0, 0, index & _MASK, epoch & _MASK], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniforms(seed: int, stream: int, epoch: int, index: int, count: int) -> np.ndarray:
    """`count` float64 values in [0, 1) with 53 random bits."""
    return (raw_words(seed, stream, epoch, index, count) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, stream: int, epoch: int, index: int, count: int) -> np.ndarray:
    """A random order of 0 .. count-1 (int64): the ranks of random 64-bit keys."""
    return np.argsort(raw_words(seed, stream, epoch, index, count), kind="stable")


def sample_views(
    recipe: MultiCropRecipe, *, seed: int, epoch: int, index: int, width: int, height: int
) -> list[ViewParams]:
    """Draw the parameters of all views of image `index` (size `width` x `height` px) in `epoch`.

    Globals come first. The distributions are those of torchvision's v2 transforms of the same names.
    """
    table = uniforms(seed, AUGMENT, epoch, index, recipe.num_views * _WORDS_PER_VIEW)
    scale_low, scale_high, ratio_low, ratio_high = _crop_bounds(recipe)
    table = table.reshape(recipe.num_views, _WORDS_PER_VIEW)
    area = scale_low + (scale_high - scale_low) * table[:, :_CROP_TRIES]
    area *= width * height
    ratio = np.exp(ratio_low + (ratio_high - ratio_low) * table[:, _CROP_TRIES : 2 * _CROP_TRIES])
    widths = np.rint(np.sqrt(area * ratio)).tolist()
    heights = np.rint(np.sqrt(area / ratio)).tolist()
    views = []
    for u, tried_widths, tried_heights in zip(table.tolist(), widths, heights, strict=True):
        box = _crop_box(recipe, u, tried_widths, tried_heights, width, height)
        sigma_low, sigma_high = recipe.blur_sigma
        sigma = sigma_low + (sigma_high - sigma_low) * u[_SIGMA] if u[_BLUR] < recipe.blur_prob else None
        views.append(
            ViewParams(
                *box,
                flip=u[_FLIP] < recipe.flip_prob,
                jitter=_jitter(recipe, u) if u[_JITTER] < recipe.jitter_prob else (),
                grayscale=u[_GRAY] < recipe.grayscale_prob,
                blur_sigma=sigma,
                solarize=u[_SOLARIZE] < recipe.solarize_prob,
            )
        )
    return views


@lru_cache(maxsize=16)
def _crop_bounds(recipe: MultiCropRecipe) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Area bounds per view, each (V, 1), and the bounds of the log aspect ratio."""
    scales = [recipe.global_scale] * recipe.global_crops + [recipe.local_scale] * recipe.local_crops
    table = np.array(scales, dtype=np.float64)
    low, high = recipe.aspect_ratio
    return table[:, :1], table[:, 1:], math.log(low), math.log(high)


def _crop_box(
    recipe: MultiCropRecipe,
    u: list[float],
    widths: list[float],
    heights: list[float],
    width: int,
    height: int,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the first of ten tries that fits, else a central crop."""
    for w, h in zip(widths, heights, strict=True):
        if 0 < w <= width and 0 < h <= height:
            top = int(u[_TOP] * (height - h + 1))
            left = int(u[_LEFT] * (width - w + 1))
            return top, left, int(h), int(w)
    # Very long or very small images: the largest central region with a legal aspect ratio.
    low, high = recipe.aspect_ratio
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    return (height - h) // 2, (width - w) // 2, h, w


def _jitter(recipe: MultiCropRecipe, u: list[float]) -> tuple[tuple[str, float], ...]:
    """The colour operations with their factors, in random order; those of range 0 are left out."""
    chosen = []
    for which in _SEQUENCES[int(u[_SEQUENCE] * len(_SEQUENCES))]:
        name = JITTER_OPS[which]
        spread: float = getattr(recipe, name)
        if spread == 0:
            continue
        if name == "hue":
            low, high = -spread, spread
        else:
            low, high = max(0.0, 1.0 - spread), 1.0 + spread
        chosen.append((name, low + (high - low) * u[_FACTORS + which]))
    return tuple(chosen)
