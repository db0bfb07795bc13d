"""Very large images are read at 1/2, 1/4 or 1/8 of their size.

An image of 48 megapixels takes many times as long as one of a usual size to decode and to cut views from
(docs/loader.md has the figures), and a whole batch waits for it. A JPEG decoder makes a reduced image in a
fraction of the time; pixels of other formats are averaged. The factor depends on the image's size and the
settings alone, so it is the same in every epoch, on every backend and after a resume. Crops are drawn on the
reduced image.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from lejepa_fast.data.recipe import MultiCropRecipe

# (width, height) in pixels, in either order, to the factor by which the image is to be reduced.
Reduction = Callable[[int, int], int]

LARGE_IMAGE = 1 << 24  # images of more pixels are reduced
_FACTORS = (8, 4, 2)  # that JPEG decoders can apply
# The reduced image keeps at least so many pixels per pixel of a view, as Pillow's `thumbnail` does. They are
# for the antialiasing filter of the resizing that follows.
_SPARE = 2


def reduction_for_crops(recipe: MultiCropRecipe, width: int, height: int) -> int:
    """1, 2, 4 or 8: the smallest crop that may be drawn keeps two pixels for each of its view."""
    ratio_low, ratio_high = recipe.aspect_ratio
    narrow = min(ratio_low, 1 / ratio_high)
    short = min(width, height)
    views = [(recipe.global_scale[0], recipe.global_size)]
    if recipe.local_crops:
        views.append((recipe.local_scale[0], recipe.local_size))
    # The second bound: crops of very long images are the largest central region with a legal aspect ratio.
    spare = min(
        min((area * width * height * narrow) ** 0.5, short * min(1.0, narrow)) / size for area, size in views
    )
    return _largest(width, height, min(spare / _SPARE, short / recipe.smallest_image))


def reduction_for_centre(image_size: int, width: int, height: int) -> int:
    """1, 2, 4 or 8 for an image whose short side is to be resized to `image_size` pixels."""
    return _largest(width, height, min(width, height) / (_SPARE * image_size))


def _largest(width: int, height: int, limit: float) -> int:
    if width * height <= LARGE_IMAGE:
        return 1
    return next((factor for factor in _FACTORS if factor <= limit), 1)


def ask_decoder(image: Image.Image, factor: int) -> int:
    """Have the decoder of an image reduce it, if it can; returns the factor that is left."""
    width = image.width
    image.draft(None, (width // factor, image.height // factor))
    return factor // round(width / image.width)
