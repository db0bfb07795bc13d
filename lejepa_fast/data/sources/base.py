"""Image sources: what they promise, subsets of them, and checks of image sizes.

A source is a sequence of (image, label) pairs. Several threads read it at once. It holds no open files and
pickles small, so that a user's own `DataLoader` can send it to worker processes.
"""

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from lejepa_fast.data.sources.decoding import (
    Reduction,
    UnreadableImageError,
    ValueRange,
    decode,
    deep_values,
    deep_values_of,
    gray,
    naming_file,
    open_encoded,
    printable,
    to_rgb,
)
from lejepa_fast.errors import UsageError

Split = Literal["train", "val"]

_PROBED_IMAGES = 64
_NAMED_IMAGES = 10_000  # of each source: enough to tell data sets apart


class ImageSource(ABC):
    """A sequence of (RGB image, class index or -1).

    Args:
        name: what logs call the data set.
        classes: class names by index. None: unknown.
        targets: class index of every image. None: the images have no labels.
        origin: where they come from, such as "folder /data/cats", for `summary`. None: `name`.
    """

    left_out = ""
    """What else lies there and is not read, for messages."""

    def __init__(
        self,
        *,
        name: str,
        classes: Sequence[str] | None,
        targets: Sequence[int] | np.ndarray | None,
        origin: str | None = None,
    ) -> None:
        self.name = name
        self.origin = name if origin is None else origin
        self.classes = None if classes is None else list(classes)
        # An array: small, and forked processes do not copy its pages by counting references.
        self._targets = None if targets is None else np.asarray(targets, dtype=np.int64)

    channels = 3
    """Channels of the loaded images. Other numbers than 3 need image files, not torchvision's arrays."""
    draws = False
    """Whether `load` makes a choice by its number `draw`."""
    values: np.ndarray | None = None
    """Numbers to predict, one for each image, where the labels are no classes."""
    value_range: ValueRange | None = None
    """Values of black and white of images with more than 8 bits, see `scientific.choose_value_range`."""

    @property
    def targets(self) -> list[int] | None:
        """Class index of every image; None when unlabeled."""
        return None if self._targets is None else self._targets.tolist()

    @property
    def labeled(self) -> bool:
        """Whether the images have class indices."""
        return self._targets is not None

    def summary(self) -> str:
        """Images, classes and where they come from, for messages."""
        names = self.classes or []
        shown = f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
        count = len(names) or (0 if self._targets is None else len(np.unique(self._targets)))
        kind = f"{count or 'no'} class{'es' * (count != 1)}{shown}"
        if self.values is not None:
            kind = "numbers to predict"
        text = f"{len(self):,} images, {kind} from {self.origin}"
        return f"{text}; not read there: {self.left_out}" if self.left_out else text

    def target(self, index: int) -> int:
        """Class index of one image, -1 when unlabeled; reads no pixels."""
        return -1 if self._targets is None else int(self._targets[index])

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def describe(self, index: int) -> str:
        """The image's file, or shard and member, for messages."""

    @abstractmethod
    def open_image(self, index: int) -> Image.Image:
        """The image as Pillow opens it: any mode, not yet decoded, not yet upright."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """(upright image, see `load`; class index or -1). Raises `RunError` naming an unreadable file."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)}")
        return self.load(index), self.target(index)

    def load(self, index: int, reduction: Reduction | None = None, draw: int | None = None) -> Image.Image:
        """The upright image, very large ones reduced by `reduction`. Raises as `[index]` does.

        It is RGB, or for another number of `channels` a `decoding.ChannelImage`.

        draw: a random number for the choices that a source makes anew in each epoch.
        """
        return naming_file(self.describe(index), lambda: self._decoded(index, reduction, draw))

    def _decoded(self, index: int, reduction: Reduction | None, draw: int | None) -> Any:
        rgb = to_rgb(self._opened(index, draw), reduction, self.value_range)
        return rgb if self.channels == 3 else gray(rgb)

    def deep_values(self, index: int) -> np.ndarray | None:
        """See `decoding.deep_values`. Raises as `[index]` does."""
        return naming_file(self.describe(index), lambda: deep_values(self.open_image(index)))

    def _opened(self, index: int, draw: int | None) -> Image.Image:
        return self.open_image(index)

    def image_size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels before EXIF rotation, from the file's header where that is possible."""
        return naming_file(self.describe(index), lambda: self.open_image(index).size)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSource":
        """The same source with these images only, in this order."""
        return SubsetSource(self, indices)


class EncodedSource(ImageSource):
    """A source of image files, which hands out their bytes to backends that decode themselves."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of the image file, as stored. It raises any `OSError` as it is: see `outages`."""

    def open_image(self, index: int) -> Image.Image:
        return open_encoded(self.encoded(index))

    def _decoded(self, index: int, reduction: Reduction | None, draw: int | None) -> Any:
        return decode(self.encoded(index), self.channels, reduction, self.value_range)

    def image_size(self, index: int) -> tuple[int, int]:
        if self.channels in (1, 3):
            return super().image_size(index)

        def size() -> tuple[int, int]:  # decoded: a file of another number of channels is an error here
            return decode(self.encoded(index), self.channels, value_range=(0, 1)).size

        return naming_file(self.describe(index), size)

    def deep_values(self, index: int) -> np.ndarray | None:
        return naming_file(self.describe(index), lambda: deep_values_of(self.encoded(index), self.channels))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "EncodedSource":
        return EncodedSubset(self, indices)


class SubsetSource(ImageSource):
    """Some images of another source, in a given order."""

    def __init__(self, base: ImageSource, indices: Sequence[int] | np.ndarray) -> None:
        self.base = base
        self._indices = np.asarray(indices, dtype=np.int64)
        targets = None if base._targets is None else base._targets[self._indices]
        super().__init__(name=base.name, classes=base.classes, targets=targets, origin=base.origin)
        self.values = None if base.values is None else base.values[self._indices]
        self.left_out, self.draws = base.left_out, base.draws
        self.channels, self.value_range = base.channels, base.value_range

    def __len__(self) -> int:
        return len(self._indices)

    def describe(self, index: int) -> str:
        return self.base.describe(int(self._indices[index]))

    def open_image(self, index: int) -> Image.Image:
        return self._opened(index, None)

    def _opened(self, index: int, draw: int | None) -> Image.Image:
        return self.base._opened(int(self._indices[index]), draw)


class EncodedSubset(SubsetSource, EncodedSource):
    """Some images of a source of image files."""

    base: EncodedSource

    def encoded(self, index: int) -> bytes:
        return self.base.encoded(int(self._indices[index]))


class Names:
    """Many file names in two arrays: less than half the memory of a list of strings."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]  # they need not be UTF-8
        self._joined = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._joined[start : int(self._ends[index])])


def names_digest(sources: Mapping[str, ImageSource]) -> str:
    """SHA-256 of the names of the images of some sources: tells data sets apart without reading them.

    The prefix that all names share is left out, so a folder that was moved stays the same.
    """
    strides = {key: -(-len(source) // _NAMED_IMAGES) or 1 for key, source in sources.items()}
    names = {
        key: [source.describe(index) for index in range(0, len(source), strides[key])]
        for key, source in sources.items()
    }
    every = [name for group in names.values() for name in group]
    shared = len(os.path.commonprefix(every))  # noqa: RUF071 - in characters, not in folders
    digest = hashlib.sha256()
    for key, group in names.items():
        digest.update(f"{key}\0".encode())
        for name in group:
            digest.update(name[shared:].encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def size_fault(width: int, height: int, smallest: int) -> str | None:
    """Why an image of this size cannot be used; None if it can. smallest: short side in pixels."""
    if min(width, height) >= smallest:
        return None
    return f"{width} x {height} px, the crops need a short side of {smallest} px"


class SmallImagesError(UsageError):
    """The images are smaller than the crops. `found` names one; crops of `short_side` px or less fit."""

    def __init__(self, found: str, short_side: int) -> None:
        super().__init__(
            f"{found}; use crops of at most {short_side} px, or allow enlarging with min_image_size=1"
        )
        self.found, self.short_side = found, short_side


def check_sizes(
    source: ImageSource, smallest: int, max_bad_fraction: float, known: Collection[int] = ()
) -> None:
    """Look at 64 images spread over the source, to find data that is too small or broken as a whole.

    A few bad images pass: they are replaced when they are met. Those in `known` are not looked at. Raises a
    `SmallImagesError`, or the first `UnreadableImageError` if more images are unreadable than small.
    """
    probed = range(0, len(source), max(1, math.ceil(len(source) / _PROBED_IMAGES)))
    unreadable: list[UnreadableImageError] = []
    small: list[str] = []
    sides: list[int] = []
    for index in (index for index in probed if index not in known):
        try:
            width, height = source.image_size(index)
            sides.append(min(width, height))
            if fault := size_fault(width, height, smallest):
                small.append(f"image smaller than the crop: {printable(source.describe(index))} is {fault}")
        except UnreadableImageError as error:
            unreadable.append(error)
    allowed = max_bad_fraction * len(probed)
    if len(probed) < len(source):  # a sample: three standard deviations more
        allowed += 3 * math.sqrt(allowed * (1 - max_bad_fraction))
    faults = len(unreadable) + len(small)
    if faults > max(allowed, max_bad_fraction > 0):  # one never stops a run that allows any
        if len(unreadable) > len(small):
            raise unreadable[0]
        outliers = int(max_bad_fraction * len(sides) / 2)  # such as a thumbnail; fewer than the small ones
        raise SmallImagesError(small[0], sorted(sides)[outliers])
