"""Reading image files ahead, in threads, for a backend that decodes encoded bytes itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from lejepa_fast.data.backends.base import LISTED
from lejepa_fast.data.sources.base import EncodedSource, ImageSource, size_fault
from lejepa_fast.data.sources.decoding import (
    UnreadableImageError,
    open_encoded,
    plain_header,
    to_rgb,
    unreadable,
)
from lejepa_fast.data.sources.large import Reduction
from lejepa_fast.errors import RunError, UsageError

_FILES_PER_TASK = 8


class Turn(NamedTuple):
    """How stored pixels become upright: rows and columns exchanged, then mirrored, then upside down."""

    transposed: bool
    mirrored: bool
    inverted: bool


# By EXIF orientation.
TURNS = {n: Turn(n >= 5, n in (2, 3, 6, 7), n in (3, 4, 7, 8)) for n in range(1, 9)}


@dataclass(frozen=True)
class Encoded:
    """An image file fit for any decoder.

    width, height: in px, upright; orientation: of the pixels in the file, 1-8 as in EXIF. plain: its bytes
    are as stored, not converted by Pillow.
    """

    index: int
    data: bytes
    width: int
    height: int
    plain: bool
    orientation: int = 1

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(rows, columns, 3) that a decoder makes of it."""
        transposed = TURNS[self.orientation].transposed
        return (self.width, self.height, 3) if transposed else (self.height, self.width, 3)


@dataclass(frozen=True)
class Bad:
    """An image that cannot be used."""

    index: int
    reason: str


def read_image(
    source: ImageSource,
    index: int,
    smallest: int,
    *,
    reduction: Reduction | None = None,
    careful: bool = False,
) -> Encoded | Bad:
    """Image `index`, as stored if it is plain, else decoded by Pillow and packed as PPM.

    reduction: how very large images are reduced, which is Pillow's part, too.
    careful: always through Pillow, which proves that it can be decoded.
    """
    try:
        encoded = _read(source, index, reduction, careful)
    except UnreadableImageError as error:
        return Bad(index, error.reason)
    fault = size_fault(encoded.width, encoded.height, smallest)
    return Bad(index, fault) if fault else encoded


def _read(source: ImageSource, index: int, reduction: Reduction | None, careful: bool) -> Encoded:
    if not isinstance(source, EncodedSource):
        return _as_ppm(index, source.load(index, reduction))
    try:
        data = source.encoded(index)
        found = None if careful else plain_header(data)
        if found is not None and (reduction is None or reduction(found.width, found.height) == 1):
            return Encoded(index, data, found.width, found.height, True, found.orientation)
        return _as_ppm(index, to_rgb(open_encoded(data), reduction))
    except (RunError, UsageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise unreadable(source.describe(index), error) from error


def _as_ppm(index: int, image: Image.Image) -> Encoded:
    header = f"P6\n{image.width} {image.height}\n255\n".encode()
    return Encoded(index, header + image.tobytes(), image.width, image.height, plain=False)


class Reader:
    """Reads images in a few threads. `read` returns at once; `result()` of its answer waits."""

    def __init__(
        self, source: ImageSource, smallest: int, threads: int, reduction: Reduction | None = None
    ) -> None:
        self.source, self._smallest, self._reduction = source, smallest, reduction
        # More threads than cores do no harm: most of the time they wait for the disk.
        self._pool = ThreadPoolExecutor(max(2, min(threads, 16)), thread_name_prefix="lejepa-read")

    def read(self, indices: Sequence[int], known: Collection[int] = ()) -> PendingRead:
        """Start reading these images. known: images that are bad, which are not tried."""
        parts = [indices[i : i + _FILES_PER_TASK] for i in range(0, len(indices), _FILES_PER_TASK)]
        return PendingRead([self._pool.submit(self._read_part, part, known) for part in parts])

    def one(self, index: int, known: Collection[int] = (), *, careful: bool = False) -> Encoded | Bad:
        """Read one image now, unless it is in `known`."""
        if index in known:
            return Bad(index, LISTED)
        return read_image(self.source, index, self._smallest, reduction=self._reduction, careful=careful)

    def _read_part(self, indices: Sequence[int], known: Collection[int]) -> list[Encoded | Bad]:
        return [self.one(index, known) for index in indices]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class PendingRead:
    """Images that are being read."""

    def __init__(self, parts: list[Future[list[Encoded | Bad]]]) -> None:
        self._parts = parts

    def result(self) -> list[Encoded | Bad]:
        return [image for part in self._parts for image in part.result()]

    def cancel(self) -> None:
        for part in self._parts:
            part.cancel()
