"""Image sources: what they promise, subsets of them, and checks of image sizes.

A source is a sequence of (image, label) pairs. It holds no open files and pickles small, so forked and
spawned workers can share it.
"""

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from lejepa_fast.data.sources.decoding import (
    Reduction,
    UnreadableImageError,
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
    """

    def __init__(
        self,
        *,
        name: str,
        classes: Sequence[str] | None,
        targets: Sequence[int] | np.ndarray | None,
    ) -> None:
        self.name = name
        self.classes = None if classes is None else list(classes)
        # An array: forked workers would copy the pages of a list by counting references.
        self._targets = None if targets is None else np.asarray(targets, dtype=np.int64)

    @property
    def targets(self) -> list[int] | None:
        """Class index of every image; None when unlabeled."""
        return None if self._targets is None else self._targets.tolist()

    @property
    def labeled(self) -> bool:
        """Whether the images have class indices."""
        return self._targets is not None

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
        """(upright RGB image, class index or -1). Raises `RunError` naming an unreadable file."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)}")
        return self.load(index), self.target(index)

    def load(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """The upright RGB image, very large ones reduced by `reduction`. Raises as `[index]` does."""
        with naming_file(self.describe(index)):
            return to_rgb(self.open_image(index), reduction)

    def image_size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels before EXIF rotation, from the file's header where that is possible."""
        with naming_file(self.describe(index)):
            return self.open_image(index).size

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSource":
        """The same source with these images only, in this order."""
        return SubsetSource(self, indices)


class EncodedSource(ImageSource):
    """A source of image files, which hands out their bytes to backends that decode themselves."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of the image file, as stored."""

    def open_image(self, index: int) -> Image.Image:
        return open_encoded(self.encoded(index))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "EncodedSource":
        return EncodedSubset(self, indices)


class SubsetSource(ImageSource):
    """Some images of another source, in a given order."""

    def __init__(self, base: ImageSource, indices: Sequence[int] | np.ndarray) -> None:
        self.base = base
        self._indices = np.asarray(indices, dtype=np.int64)
        targets = None if base._targets is None else base._targets[self._indices]
        super().__init__(name=base.name, classes=base.classes, targets=targets)

    def __len__(self) -> int:
        return len(self._indices)

    def describe(self, index: int) -> str:
        return self.base.describe(int(self._indices[index]))

    def open_image(self, index: int) -> Image.Image:
        return self.base.open_image(int(self._indices[index]))


class EncodedSubset(SubsetSource, EncodedSource):
    """Some images of a source of image files."""

    base: EncodedSource

    def encoded(self, index: int) -> bytes:
        return self.base.encoded(int(self._indices[index]))


class Names:
    """Many file names in two arrays: forked workers would copy the pages of a list of strings."""

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
    `SmallImagesError`, or the first `UnreadableImageError`.
    """
    probed = range(0, len(source), max(1, math.ceil(len(source) / _PROBED_IMAGES)))
    faults: list[UnreadableImageError | str] = []
    sides: list[int] = []
    for index in (index for index in probed if index not in known):
        try:
            width, height = source.image_size(index)
            sides.append(min(width, height))
            if fault := size_fault(width, height, smallest):
                faults.append(f"image smaller than the crop: {printable(source.describe(index))} is {fault}")
        except UnreadableImageError as error:
            faults.append(error)
    allowed = max_bad_fraction * len(probed)
    if len(probed) < len(source):  # a sample: three standard deviations more
        allowed += 3 * math.sqrt(allowed * (1 - max_bad_fraction))
    if len(faults) > max(allowed, max_bad_fraction > 0):  # one never stops a run that allows any
        first = faults[0]
        if isinstance(first, UnreadableImageError):
            raise first
        outliers = int(max_bad_fraction * len(sides) / 2)  # such as a thumbnail
        raise SmallImagesError(first, sorted(sides)[outliers])
