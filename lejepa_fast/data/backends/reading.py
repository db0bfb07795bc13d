"""Image files for a decoder that takes encoded bytes.

Files that all decoders read alike are passed on as stored. Pillow decodes all others, and they are passed on
as PPM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from lejepa_fast.data.sources.base import EncodedSource
from lejepa_fast.data.sources.decoding import open_encoded, plain_header, to_rgb, unreadable
from lejepa_fast.data.views import EvalViews, TrainViews
from lejepa_fast.errors import RunError, UsageError


class Turn(NamedTuple):
    """How stored pixels become upright: rows and columns exchanged, then mirrored, then upside down."""

    transposed: bool
    mirrored: bool
    inverted: bool


# By EXIF orientation.
TURNS = {n: Turn(n >= 5, n in (2, 3, 6, 7), n in (3, 4, 7, 8)) for n in range(1, 9)}


@dataclass(frozen=True)
class Encoded:
    """An image file that any decoder reads."""

    index: int
    data: bytes
    width: int
    """In pixels, of the upright image; so is the height."""
    height: int
    orientation: int = 1
    """Of the stored pixels, 1-8 as in EXIF. The decoder must not apply it."""


def read_encoded(views: TrainViews | EvalViews, index: int, *, careful: bool = False) -> Encoded:
    """Read image `index`.

    Args:
        views: Where the images come from, and how large they must be.
        index: Number of the image.
        careful: Let Pillow decode it in any case, which proves that it can be decoded.

    Raises:
        UnreadableImageError: The image cannot be decoded or is too small.
    """
    source = views.source
    if careful or not isinstance(source, EncodedSource):
        return _as_ppm(index, views.load(index))
    try:
        data = source.encoded(index)
        header = plain_header(data)
        if header is not None and views.reduction(header.width, header.height) == 1:
            found = Encoded(index, data, header.width, header.height, header.orientation)
        else:
            found = _as_ppm(index, to_rgb(open_encoded(data), views.reduction))
    except (RunError, UsageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise unreadable(source.describe(index), error) from error
    views.check_size(index, found.width, found.height)
    return found


def _as_ppm(index: int, image: Image.Image) -> Encoded:
    header = f"P6\n{image.width} {image.height}\n255\n".encode()
    return Encoded(index, header + image.tobytes(), image.width, image.height)
