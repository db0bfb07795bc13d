"""Very large images are read at 1/2, 1/4 or 1/8 of their size.

To decode 48 megapixels and to cut views of 224 px from them takes many times as long as for an image of a
usual size (docs/loader.md has the figures), and a whole batch waits for it. A JPEG decoder makes a reduced
image directly, in a fraction of the time; pixels of other formats are averaged. The factor is a function of
the image's size and the settings alone: the same in every epoch, on every backend, and after a resume. The
reduced image then takes the image's place: crops are drawn on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from lejepa_fast.data.recipe import MultiCropRecipe

# (width, height) in px to the factor by which the image is to be reduced. Width and height may be exchanged.
Reduction = Callable[[int, int], int]

# Images of more pixels than this are reduced; all others are read as they are.
LARGE_IMAGE = 1 << 24
# Pixels of the reduced image for one pixel of any view, at least: the antialiasing filter of the resizing
# that follows does its work. Pillow's `thumbnail` leaves as many.
_SPARE = 2
_FACTORS = (8, 4, 2)  # what JPEG decoders can do


def reduction_for_crops(recipe: MultiCropRecipe, width: int, height: int) -> int:
    """1, 2, 4 or 8: the smallest crop that may be drawn keeps two pixels for each of its view."""
    ratio_low, ratio_high = recipe.aspect_ratio
    narrow = min(ratio_low, 1 / ratio_high)
    short = min(width, height)
    views = [(recipe.global_scale[0], recipe.global_size)]
    if recipe.local_crops:
        views.append((recipe.local_scale[0], recipe.local_size))
    # The second: of very long images the largest central region with a legal aspect ratio is taken.
    spare = min(
        min((area * width * height * narrow) ** 0.5, short * min(1.0, narrow)) / size for area, size in views
    )
    return _largest(width, height, min(spare / _SPARE, short / recipe.smallest_image))


def reduction_for_centre(image_size: int, width: int, height: int) -> int:
    """1, 2, 4 or 8 for an image whose short side is to be resized to `image_size` px."""
    return _largest(width, height, min(width, height) / (_SPARE * image_size))


def _largest(width: int, height: int, limit: float) -> int:
    if width * height <= LARGE_IMAGE:
        return 1
    return next((factor for factor in _FACTORS if factor <= limit), 1)


def ask_decoder(image: Image.Image, factor: int) -> int:
    """Have an image that is not decoded yet come out reduced, if its decoder can; the factor that is left."""
    width = image.width
    image.draft(None, (width // factor, image.height // factor))
    return factor // round(width / image.width)
