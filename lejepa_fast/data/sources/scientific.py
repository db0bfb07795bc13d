"""Scientific images: values of more than 8 bits, stacks of slices, other numbers of channels than three."""

from typing import Any, Literal

import numpy as np
from PIL import Image

from lejepa_fast.data.sources.base import EncodedSource, ImageSource, SubsetSource
from lejepa_fast.data.sources.decoding import UnreadableImageError, ValueRange, check_frame, naming_file
from lejepa_fast.errors import UsageError

BitDepth = Literal["auto", "8", "12", "16", "percentile"]
Slices = Literal["first", "random", "all"]

MOST_CHANNELS = 16
_PROBED_IMAGES = 64
_SHARE = 0.1  # percent of the values that become black, and of those that become white


def choose_value_range(source: ImageSource, bit_depth: BitDepth) -> ValueRange | None:
    """Values of black and white for all images with more than 8 bits of a data set, so that all are alike.

    Args:
        source: up to 64 of its images, spread over it, are looked at.
        bit_depth: "8", "12", "16": whole numbers of so many bits. "percentile": from the 0.1th to the 99.9th
            percentile of the values found. "auto": 8, 12 or 16 bits, whatever holds the largest value found;
            [0, 1] for floating-point images with no values beyond.

    Returns:
        The two values. None if no image has more than 8 bits, and for "auto" with floating-point images that
        have other values and declare their ranges.

    Raises:
        UsageError: with "percentile", the images have no two values; with "auto", none of the above holds.
        RunError: the images cannot be read now.
    """
    found, floats = [], []
    for index in range(0, len(source), -(-len(source) // _PROBED_IMAGES)):
        try:
            values = source.deep_values(index)
        except UnreadableImageError:
            continue  # the loader counts them
        if values is not None and values.size:
            found.append(values)
            floats += [index] * (values.dtype.kind == "f")
    if not found:
        return None
    if bit_depth == "percentile":
        low, high = np.percentile(np.concatenate(found).astype(np.float64), [_SHARE, 100 - _SHARE])
        if low == high:
            raise UsageError(f"bit_depth percentile: expected images of different values, got only {low:g}")
        return float(low), float(high)
    if bit_depth != "auto":
        return 0.0, 2.0 ** int(bit_depth) - 1
    low, high = min(values.min() for values in found), max(values.max() for values in found)
    if floats and low >= 0 and high <= 1:
        return 0.0, 1.0
    if floats and all(_is_readable(source, index) for index in floats):  # their files declare a range
        return None
    if floats or low < 0 or high > 65535:
        raise UsageError(
            f"bit_depth auto: expected values of 8 to 16 bits, or from 0 to 1, or a range that each file "
            f"declares, got {low:g} to {high:g}; set --data.bit-depth percentile"
        )
    return 0.0, float(next((most for most in (255, 4095) if high <= most), 65535))


def _is_readable(source: ImageSource, index: int) -> bool:
    try:
        source.load(index)
    except UnreadableImageError:
        return False
    return True


def as_trained(source: ImageSource, slices: Slices, channels: int = 3) -> ImageSource:
    """The images of a source for a training on slices of stacks, or on another number of channels than 3.

    Args:
        source: one image for each file.
        slices: of files that hold several images, such as TIFF files of several pages. "first": the first.
            "random": one of them, drawn anew in each epoch; the middle one in evaluation. "all": each is an
            image of its own; every file is read at the start.
        channels: 1: gray. 3: RGB. Others: as many as the files have, where the pages of a TIFF count.

    Raises:
        UsageError: a number of channels that the source or `slices` cannot give.
    """
    if slices not in ("first", "random", "all"):
        raise UsageError(f"slices: expected 'first', 'random' or 'all', got {slices!r}")
    if not 1 <= channels <= MOST_CHANNELS:
        raise UsageError(f"channels: expected 1 to {MOST_CHANNELS}, got {channels}")
    if channels not in (1, 3):
        if not isinstance(source, EncodedSource):
            raise UsageError(
                f"channels: {source.name} holds no image files, so it has 1 or 3, not {channels}"
            )
        if slices != "first":
            raise UsageError(f"slices: expected 'first' for {channels} channels, got {slices!r}")
    if slices == "random":
        source = _RandomSlices(source)
    elif slices == "all":
        source = _AllSlices(source)
    source.channels = channels
    return source


class _RandomSlices(SubsetSource):
    """A slice of each file."""

    def __init__(self, base: ImageSource) -> None:
        super().__init__(base, range(len(base)))
        self.draws = True

    def _opened(self, index: int, draw: int | None) -> Image.Image:
        image: Any = self.base.open_image(index)
        count = getattr(image, "n_frames", 1)
        image.seek(count // 2 if draw is None else draw % count)
        check_frame(image)
        return image


class _AllSlices(SubsetSource):
    """Every slice of each file."""

    def __init__(self, base: ImageSource) -> None:
        counts = [_count_slices(base, index) for index in range(len(base))]
        super().__init__(base, np.repeat(np.arange(len(base)), np.array(counts, dtype=np.int64)))
        self._first = np.cumsum([0, *counts])

    def _slice(self, index: int) -> int:
        return int(index - self._first[self._indices[index]])

    def describe(self, index: int) -> str:
        return f"{super().describe(index)}, slice {self._slice(index)}"

    def _opened(self, index: int, draw: int | None) -> Image.Image:
        image = super()._opened(index, draw)
        image.seek(self._slice(index))
        check_frame(image)
        return image


def _count_slices(source: ImageSource, index: int) -> int:
    try:
        return naming_file(source.describe(index), lambda: getattr(source.open_image(index), "n_frames", 1))
    except UnreadableImageError:
        return 1  # the loader counts it as bad
