"""What is to be made of an image, for whichever backend makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lejepa_fast.data.draws import (
    COLUMN_HEIGHT,
    COLUMN_LEFT,
    COLUMN_TOP,
    COLUMN_WHOLE,
    COLUMN_WIDTH,
    COLUMNS,
    view_table,
)
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.data.sources.base import ImageSource
from lejepa_fast.data.sources.large import reduction_for_centre, reduction_for_crops

# Of a longer image only the middle is resized in evaluation: 1 x 10,000 px as a whole would need gigabytes.
LONGEST_RATIO = 4


@dataclass(frozen=True)
class TrainPlan:
    """Multi-crop views; the randomness of an image depends on (seed, epoch, image) only."""

    source: ImageSource
    recipe: MultiCropRecipe
    seed: int

    @property
    def sizes(self) -> list[int]:
        """Side of each view in px."""
        return self.recipe.view_sizes()

    @property
    def smallest_image(self) -> int:
        return self.recipe.smallest_image

    def reduction(self, width: int, height: int) -> int:
        """By how much an image of this size is reduced when it is read."""
        return reduction_for_crops(self.recipe, width, height)

    def table(self, epoch: int, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """Parameters of all views (B, V, COLUMNS) of images of these (width, height)."""
        return view_table(self.recipe, seed=self.seed, epoch=epoch, indices=indices, sizes=sizes)


@dataclass(frozen=True)
class EvalPlan:
    """One view without randomness: short side resized to `image_size`, then the centre."""

    source: ImageSource
    image_size: int
    recipe: None = None

    @property
    def sizes(self) -> list[int]:
        return [self.image_size]

    @property
    def smallest_image(self) -> int:
        return 1

    def reduction(self, width: int, height: int) -> int:
        return reduction_for_centre(self.image_size, width, height)

    def table(self, epoch: int, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """The window of the source that becomes the centre; rounded as torchvision rounds."""
        table = np.zeros((len(indices), 1, COLUMNS))
        for row, (width, height) in zip(table[:, 0], sizes, strict=True):
            row[COLUMN_LEFT], row[COLUMN_WIDTH] = self._window(width, height)
            row[COLUMN_TOP], row[COLUMN_HEIGHT] = self._window(height, width)
            row[COLUMN_WHOLE] = 1
        return table

    def _window(self, length: int, other: int) -> tuple[float, float]:
        """(start, extent) along one side of an image, in source pixels."""
        kept = min(length, LONGEST_RATIO * other)
        start = round((length - kept) / 2)
        resized = self.image_size if length <= other else int(self.image_size * kept / other)
        scale = kept / resized
        return start + round((resized - self.image_size) / 2) * scale, self.image_size * scale
