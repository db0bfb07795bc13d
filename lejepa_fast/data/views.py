"""What to make of an image: multi-crop views in training, one centered view in evaluation.

Very large images are read at 1/2, 1/4 or 1/8 of their size, because a whole batch would wait for one. A JPEG
decoder makes a reduced image in a fraction of the time; pixels of other formats are averaged. The factor
depends on the image's size and the settings alone. Crops are drawn on the reduced image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from lejepa_fast.data import draws
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.data.sources.base import ImageSource, size_fault
from lejepa_fast.data.sources.decoding import UnreadableImageError

# In evaluation only the middle of a longer image is resized: all of 1 x 10,000 px would need gigabytes.
LONGEST_RATIO = 4

LARGE_IMAGE = 1 << 24  # images of more pixels are reduced
# The reduced image keeps at least so many pixels per pixel of a view, as Pillow's `thumbnail` does. They are
# for the antialiasing filter of the resizing that follows.
_SPARE = 2


@dataclass(frozen=True)
class Views:
    """What training and evaluation share."""

    source: ImageSource

    @property
    def smallest_image(self) -> int:
        """Short side in pixels below which an image is bad."""
        return 1

    def spare(self, width: int, height: int) -> float:
        """By how much an image of this size may be reduced at most."""
        raise NotImplementedError

    def reduction(self, width: int, height: int) -> int:
        """The factor by which an image of this size is reduced when it is read: 1, 2, 4 or 8."""
        if width * height <= LARGE_IMAGE:
            return 1
        limit = self.spare(width, height)
        return next((factor for factor in (8, 4, 2) if factor <= limit), 1)

    def substitute(self, epoch: int, index: int) -> int | None:
        """The image to try in the place of bad image `index`; None: the image is left out."""
        return None

    def draw(self, epoch: int, index: int) -> int | None:
        """A random number for `ImageSource.load`; None: no choice is made at random."""
        return None

    def load(self, epoch: int, index: int) -> Image.Image:
        """Image `index`, upright, reduced where it is very large. May raise `UnreadableImageError`."""
        image = self.source.load(index, self.reduction, self.draw(epoch, index))
        self.check_size(index, *image.size)
        return image

    def check_size(self, index: int, width: int, height: int) -> None:
        """Raise `UnreadableImageError` when an image of this size is too small."""
        if fault := size_fault(width, height, self.smallest_image):
            # One slice that is too small marks a file of drawn slices for good, also after a resume.
            raise UnreadableImageError(self.source.describe(index), fault, lasting=self.source.draws)


@dataclass(frozen=True)
class TrainViews(Views):
    """Multi-crop views. The randomness of an image depends on (seed, epoch, image) only."""

    recipe: MultiCropRecipe
    seed: int

    @property
    def sizes(self) -> list[int]:
        """Side of each view in pixels."""
        return self.recipe.view_sizes()

    @property
    def smallest_image(self) -> int:
        return self.recipe.smallest_image

    def spare(self, width: int, height: int) -> float:
        """The smallest crop that may be drawn keeps two pixels for each of its view."""
        recipe, short = self.recipe, min(width, height)
        ratio_low, ratio_high = recipe.aspect_ratio
        narrow = min(ratio_low, 1 / ratio_high)
        views = [(recipe.global_scale[0], recipe.global_size)]
        if recipe.local_crops:
            views.append((recipe.local_scale[0], recipe.local_size))
        # The second bound: the crop of a very long image is its largest central region of a legal ratio.
        spare = min(
            min((area * width * height * narrow) ** 0.5, short * min(1.0, narrow)) / size
            for area, size in views
        )
        return min(spare / _SPARE, short / recipe.smallest_image)

    def table(self, epoch: int, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """Parameters of all views of images of these (width, height): (B, V, COLUMNS), see `draws`."""
        return draws.view_table(self.recipe, seed=self.seed, epoch=epoch, indices=indices, sizes=sizes)

    def draw(self, epoch: int, index: int) -> int | None:
        if not self.source.draws:
            return None
        return int(draws.raw_words(self.seed, draws.SLICE, epoch, index, 1)[0])

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
    words = draws.raw_words(seed, draws.SUBSTITUTE, epoch, 0, 64)
    strides = (int(word) % count for word in words)
    return next((stride for stride in strides if math.gcd(stride, count) == 1), 1)


@dataclass(frozen=True)
class EvalViews(Views):
    """One view without randomness: the short side is resized to `image_size`, then the center is cut out."""

    image_size: int

    @property
    def sizes(self) -> list[int]:
        return [self.image_size]

    def spare(self, width: int, height: int) -> float:
        return min(width, height) / (_SPARE * self.image_size)

    def table(self, epoch: int, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """The window of the source that becomes the center, rounded as torchvision rounds."""
        table = np.zeros((len(indices), 1, draws.COLUMNS))
        for row, (width, height) in zip(table[:, 0], sizes, strict=True):
            row[draws.LEFT], row[draws.WIDTH] = self._window(width, height)
            row[draws.TOP], row[draws.HEIGHT] = self._window(height, width)
        return table

    def _window(self, length: int, other: int) -> tuple[float, float]:
        """(start, extent) along one side of an image, in source pixels."""
        kept = min(length, LONGEST_RATIO * other)
        start = round((length - kept) / 2)
        resized = self.image_size if length <= other else int(self.image_size * kept / other)
        scale = kept / resized
        return start + round((resized - self.image_size) / 2) * scale, self.image_size * scale
