"""From any Pillow image to upright 8-bit RGB.

`Image.convert("RGB")` alone is wrong for several kinds of files that real data sets hold: it clips
16-bit values to white, shows the garbage under transparent pixels and ignores the EXIF orientation.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat

import numpy as np
from PIL import Image, ImageOps

from lejepa_fast.data.sources.large import Reduction, ask_decoder
from lejepa_fast.errors import RunError


class UnreadableImageError(RunError):
    """An image file that cannot be used. `reason` is the short form for a list of such files."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(
            f"cannot read image {printable(where)}: {reason}; repair it, or remove it from the data set"
        )
        self.reason = reason


IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
)

# An image file is held in memory as a whole, so a larger one is refused before it is read.
MAX_IMAGE_BYTES = 256 << 20
# Nor is one of more pixels decoded. Pillow draws the line at the same place, unless a program has moved it.
MAX_IMAGE_PIXELS = 178_956_970

_TILE = 1024  # px, a multiple of any factor of `Reduction`

_AT_ONCE = getattr(os, "O_NONBLOCK", 0)

# What Pillow may try on a file, whatever its suffix says. Not all it knows: for EPS it runs Ghostscript.
# (MPO, several JPEG pictures in one file, opens as JPEG.)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

# What the process or the machine lacks: no image is bad for that.
_SHORTAGES = {
    errno.EMFILE: "this process has too many files open: raise the limit, 'ulimit -n'",
    errno.ENFILE: "the machine has too many files open: close other programs, or raise fs.file-max",
    errno.ENOMEM: "memory is short: fewer workers, or a higher limit ('ulimit -v', or the container's)",
}

# Keys of `Image.info` under which a file may carry an orientation.
_ORIENTATION_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


def to_rgb(image: Image.Image, reduction: Reduction | None = None) -> Image.Image:
    """Upright 8-bit RGB version of `image` (its first frame).

    Transparent images are composed over white; 16-bit grayscale is scaled to 8 bits; floating-point
    images are taken as 0-1 when no value exceeds 1, else as 0-255; CMYK, palette and grayscale
    images are converted; the EXIF orientation is applied. reduction: how very large images are reduced.
    """
    factor = reduction(*image.size) if reduction else 1
    if factor > 1:
        factor = ask_decoder(image, factor)
    image.load()
    if image.format == "TIFF" or any(key in image.info for key in _ORIENTATION_KEYS):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.reduce(factor) if factor > 1 else image
    scale = _scale(image)
    width, height = image.size
    if width <= _TILE and height <= _TILE:
        pixels = _convert(image, scale)
        return pixels.reduce(factor) if factor > 1 else pixels
    # A conversion takes up to 32 bytes a pixel on the way: in tiles, each reduced before the next one.
    pixels = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            box = (left, top, min(left + _TILE, width), min(top + _TILE, height))
            tile = _convert(image.crop(box), scale)
            pixels.paste(tile.reduce(factor) if factor > 1 else tile, (left // factor, top // factor))
    return pixels


def _convert(image: Image.Image, scale: float | None) -> Image.Image:
    if scale is not None:
        values = np.nan_to_num(np.asarray(image).astype(np.float64)) * scale
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # The premultiplied modes convert to their plain counterparts only.
        plain = {"RGBa": "RGBA", "La": "LA"}.get(image.mode)
        image = (image.convert(plain) if plain else image).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scale(image: Image.Image) -> float | None:
    """What makes one channel of 16- or 32-bit values 8 bits wide; None for an image of other values."""
    if image.mode.startswith("I;16"):
        return 1 / 257
    if image.mode == "I":  # 32 bits wide, but it comes from 8- and 16-bit files
        return 1.0 if image.getextrema()[1] <= 255 else 1 / 257  # type: ignore[operator]
    if image.mode == "F":
        # Row by row: `asarray` makes a copy. What is no number counts as 0.
        rows = (image.crop((0, top, image.width, top + 1)) for top in range(image.height))
        peak = max((float(np.nan_to_num(np.asarray(row)).max(initial=0.0)) for row in rows), default=0.0)
        return 255.0 if peak <= 1.0 else 1.0
    return None


def open_encoded(data: bytes) -> Image.Image:
    """Open an image file held in memory; pixels are decoded on first use. Raises what Pillow raises."""
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} px, more than the {MAX_IMAGE_PIXELS:,} pixels an image may have"
        )
    return image


def read_file(path: str | os.PathLike[str]) -> bytes:
    """An image file as it is. Raises `UnreadableImageError` for one that is too large, or no plain file."""
    # Opened so that a pipe does not wait for a writer. A device, behind a link, might never end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImageError(os.fspath(path), "a pipe or device, not a file")
        refuse_large(os.fspath(path), status.st_size)
        return file.read()


def refuse_large(where: str, size: int) -> None:
    """Raise `UnreadableImageError` for an image file of more than `MAX_IMAGE_BYTES` bytes."""
    if size > MAX_IMAGE_BYTES:
        raise UnreadableImageError(
            where, f"{size >> 20:,} MiB, more than the {MAX_IMAGE_BYTES >> 20} that an image file may have"
        )


def printable(text: str) -> str:
    """`text` for a one-line message: line breaks and bytes that are not UTF-8 in names become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortage(error: OSError) -> str | None:
    """The way out where the process or the machine lacks something; None where the file is to blame."""
    return _SHORTAGES.get(error.errno or 0)


def unreadable(where: str, error: Exception) -> RunError:
    """The error for a file that cannot be decoded: one line, with its name and the way out.

    An `UnreadableImageError`, unless the process, not the file, is to blame.
    """
    if isinstance(error, OSError) and (way_out := shortage(error)):
        return RunError(
            f"cannot read image {printable(where)}: {error.strerror}; {way_out} (the image may be good)"
        )
    # Pillow's own text ends in "<_io.BytesIO object at 0x...>", which tells nobody anything.
    text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    reason = "not an image" if "cannot identify image file" in text else text
    return UnreadableImageError(where, re.sub(r"\s+", " ", reason).strip() or type(error).__name__)
