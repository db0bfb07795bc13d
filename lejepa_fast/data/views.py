"""What to make of an image: multi-crop views in training, one centred view in evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from lejepa_fast.data.draws import (
    COLUMN_HEIGHT,
    COLUMN_LEFT,
    COLUMN_TOP,
    COLUMN_WIDTH,
    COLUMNS,
    SUBSTITUTE,
    raw_words,
    view_table,
)
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.data.sources.base import ImageSource, size_fault
from lejepa_fast.data.sources.decoding import UnreadableImageError
from lejepa_fast.data.sources.large import reduction_for_centre, reduction_for_crops

# In evaluation only the middle of a longer image is resized: all of 1 x 10,000 px would need gigabytes.
LONGEST_RATIO = 4


@dataclass(frozen=True)
class Views:
    """What training and evaluation share."""

    source: ImageSource

    @property
    def sizes(self) -> list[int]:
        """Side of each view in pixels."""
        raise NotImplementedError

    @property
    def smallest_image(self) -> int:
        """Short side in pixels below which an image is bad."""
        return 1

    def reduction(self, width: int, height: int) -> int:
        """The factor by which an image of this size is reduced when it is read: 1, 2, 4 or 8."""
        raise NotImplementedError

    def table(self, epoch: int, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """Parameters of all views of images of these (width, height): (B, V, COLUMNS), see `draws`."""
        raise NotImplementedError

    def substitute(self, epoch: int, index: int) -> int | None:
        """The image to try in the place of bad image `index`; None: the image is left out."""
        return None

    def load(self, index: int) -> Image.Image:
        """Image `index`, upright RGB, reduced where it is very large.

        Raises:
            UnreadableImageError: The image cannot be decoded or is too small.
        """
        image = self.source.load(index, self.reduction)
        self.check_size(index, *image.size)
        return image

    def check_size(self, index: int, width: int, height: int) -> None:
        """Raise `UnreadableImageError` when an image of this size is too small."""
        if fault := size_fault(width, height, self.smallest_image):
            raise UnreadableImageError(self.source.describe(index), fault)


@dataclass(frozen=True)
class TrainViews(Views):
    """Multi-crop views. The randomness of an image depends on (seed, epoch, image) only."""

    recipe: MultiCropRecipe
    seed: int

    @property
    def sizes(self) -> list[int]:
        return self.recipe.view_sizes()

    @property
    def smallest_image(self) -> int:
        return self.recipe.smallest_image

    def reduction(self, width: int, height: int) -> int:
        return reduction_for_crops(self.recipe, width, height)

    def table(self, epoch: int, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        return view_table(self.recipe, seed=self.seed, epoch=epoch, indices=indices, sizes=sizes)

    def substitute(self, epoch: int, index: int) -> int:
        """The image `stride(seed, epoch)` places after `index`, cyclically.

        The stride and the number of images have no common divisor. So different bad images get different
        substitutes, and repeated steps reach every image before they return to `index`.
        """
        count = len(self.source)
        return (index + _stride(self.seed, epoch, count)) % count


@lru_cache(maxsize=16)
def _stride(seed: int, epoch: int, count: int) -> int:
    """A random stride below `count` that has no common divisor with it."""
    draws = (int(word) % count for word in raw_words(seed, SUBSTITUTE, epoch, 0, 64))
    return next((draw for draw in draws if math.gcd(draw, count) == 1), 1)


@dataclass(frozen=True)
class EvalViews(Views):
    """One view without randomness: the short side is resized to `image_size`, then the centre is cut out."""

    image_size: int

    @property
    def sizes(self) -> list[int]:
        return [self.image_size]

    def reduction(self, width: int, height: int) -> int:
        return reduction_for_centre(self.image_size, width, height)

    def table(self, epoch: int, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """The window of the source that becomes the centre, rounded as torchvision rounds."""
        table = np.zeros((len(indices), 1, COLUMNS))
        for row, (width, height) in zip(table[:, 0], sizes, strict=True):
            row[COLUMN_LEFT], row[COLUMN_WIDTH] = self._window(width, height)
            row[COLUMN_TOP], row[COLUMN_HEIGHT] = self._window(height, width)
        return table

    def _window(self, length: int, other: int) -> tuple[float, float]:
        """(start, extent) along one side of an image, in source pixels."""
        kept = min(length, LONGEST_RATIO * other)
        start = round((length - kept) / 2)
        resized = self.image_size if length <= other else int(self.image_size * kept / other)
        scale = kept / resized
        return start + round((resized - self.image_size) / 2) * scale, self.image_size * scale
