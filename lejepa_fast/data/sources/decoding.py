"""Image files: reading them within limits, and from any of Pillow's modes to upright 8-bit RGB.

`Image.convert("RGB")` alone is wrong for several kinds of files that real data sets hold: it clips 16-bit
values to white, shows the garbage under transparent pixels and ignores the EXIF orientation.
"""

import contextlib
import io
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

try:
    from PIL import _avif
except ImportError:  # before Pillow 11.3, or built without it
    _avif = None  # type: ignore[assignment]

from lejepa_fast.data.sources.outages import patiently
from lejepa_fast.errors import RunError, UsageError, printable
from lejepa_fast.regular_files import open_regular

T = TypeVar("T")


class UnreadableImageError(RunError):
    """An image file that cannot be used.

    Attributes:
        reason: the short form for a list of bad images.
        lasting: False where other options may mend it.
    """

    def __init__(self, where: str, reason: str, *, lasting: bool = True) -> None:
        super().__init__(
            f"cannot read image {printable(where)}: {reason}; repair it, or remove it from the data set"
        )
        self.reason, self.lasting = reason, lasting


class _OptionError(ValueError):
    """A file that does not fit the options."""


# Formats that Pillow may try on a file, whatever its suffix says. It opens MPO as JPEG. For EPS, which is not
# among them, it would run Ghostscript.
Image.init()
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", *["AVIF"] * (_avif is not None))

# Every suffix of these formats, and two that sites give to what they hand out.
IMAGE_SUFFIXES = frozenset(
    {suffix for suffix, name in Image.registered_extensions().items() if name in (*_FORMATS, "MPO")}
    | {".jpg_large", ".png_large"}
)

MAX_IMAGE_BYTES = 256 << 20  # a file is held in memory as a whole
MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own limit, which programs can raise or switch off
# Decoders of these formats take 16 bytes of memory and more for a pixel, four times as much as all others.
_HUNGRY_FORMATS = ("WEBP", "JPEG2000", "AVIF")

# Limits of what stands before the pixels. Pillow's time grows with the square of the EXIF segments of a JPEG,
# and its memory with the square of the bytes of EXIF data, whose entries may overlap.
_MAX_HEADER_READS = 1 << 14  # a JPEG takes 4 for a segment
_MAX_EXIF_BYTES = 128 << 10
_MAX_CHUNK_BYTES = 512 << 20  # of a TIFF: as much as the largest RGB image
_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")

# Keys of `Image.info`: transparency, and what may hold an orientation, which Pillow reads with the pixels.
_UNUSUAL_IN_PNG = {"interlace", "transparency", "exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}

# (width, height) in pixels, in either order, to the factor by which the image is to be reduced: 1, 2, 4 or 8.
Reduction = Callable[[int, int], int]
ValueRange = tuple[float, float]
_TILE = 1024  # px, a multiple of any factor
_Tag = ExifTags.Base


# --- reading and opening ------------------------------------------------------------------------


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file. Raises `UnreadableImageError` for a large file, else as `open_regular`."""
    with open_regular(path) as file:
        refuse_large(os.fspath(path), os.fstat(file.fileno()).st_size)
        return file.read()


def refuse_large(where: str, size: int) -> None:
    """Raise `UnreadableImageError` for an image file of more than `MAX_IMAGE_BYTES` bytes."""
    if size > MAX_IMAGE_BYTES:
        limit = f"more than the {MAX_IMAGE_BYTES >> 20} that an image file may have"
        raise UnreadableImageError(where, f"{size >> 20:,} MiB, {limit}")


class _Header(io.BytesIO):
    """An image file of which Pillow reads the header, in a bounded number of steps."""

    reads = exif_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.reads += 1
        self.exif_bytes += len(data) if data.startswith(b"Exif\0\0") else 0
        if self.reads > _MAX_HEADER_READS:
            raise ValueError("too many segments before the pixels")
        _check_exif(self.exif_bytes)
        return data


def _check_exif(size: int) -> None:
    if size > _MAX_EXIF_BYTES:
        raise ValueError(f"more than {_MAX_EXIF_BYTES >> 10} KiB of EXIF data")


def open_encoded(data: bytes) -> ImageFile.ImageFile:
    """Open an image file held in memory. Its pixels are decoded on first use.

    Raises whatever Pillow raises, and `ValueError` for a file that could exhaust time or memory.
    """
    if data[8:12] in _AVIF_BRANDS and _avif is not None:  # of these Pillow unpacks the EXIF data on opening
        _check_exif(len(_avif.AvifDecoder(data, "auto", 1).get_info()[4] or b""))
    file = _Header(data)
    image = Image.open(file, formats=_FORMATS)
    file.reads = -(1 << 62)  # decoding may read as often as it likes
    check_frame(image)
    return image


def check_frame(image: Image.Image) -> None:
    """Raise `ValueError` or `DecompressionBombError` if decoding the present frame could exhaust memory."""
    limit = MAX_IMAGE_PIXELS // 4 if image.format in _HUNGRY_FORMATS else MAX_IMAGE_PIXELS
    if image.width * image.height > limit:
        size = f"{image.width} x {image.height} px"
        raise Image.DecompressionBombError(f"{size}, more than the {limit:,} pixels an image may have")
    _check_exif(len(image.info.get("exif", b"")))
    _check_exif(len(image.info.get("Raw profile type exif", "")) // 2)  # in hexadecimal digits
    if _chunk_bytes(image) > _MAX_CHUNK_BYTES:
        raise ValueError(f"a tile or strip of more than {_MAX_CHUNK_BYTES >> 20} MiB")


def _tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    return getattr(image, "tag_v2", {})


def _chunk_bytes(image: Image.Image) -> int:
    """Bytes of a tile or strip of a TIFF, which is decoded as a whole and may be larger than the image."""
    tags = _tiff_tags(image)
    rows = min(tags.get(_Tag.RowsPerStrip, image.height), image.height)
    area = tags.get(_Tag.TileWidth, image.width) * tags.get(_Tag.TileLength, rows)
    bits = tags.get(_Tag.SamplesPerPixel, 1) * max(tags.get(_Tag.BitsPerSample, (1,)))
    return area * bits // 8


def _declared_range(image: Image.Image) -> tuple[float, float]:
    """The values of black and white that a TIFF declares. Raises `ValueError` where it does not."""
    tags = _tiff_tags(image)
    ends = [np.ravel(tags.get(tag, ())).astype(float) for tag in (_Tag.SMinSampleValue, _Tag.SMaxSampleValue)]
    if not all(map(len, ends)) or not -math.inf < ends[0].min() < ends[1].max() < math.inf:
        raise _OptionError(
            "floating-point pixels without a range (the TIFF tags SMinSampleValue and SMaxSampleValue); "
            "declare it, save 8 or 16 bits, or set --data.bit-depth percentile"
        )
    return ends[0].min(), ends[1].max()


def plain_header(data: bytes) -> tuple[int, int, int] | None:
    """Header of an image file that any decoder reads as Pillow does; None for all others.

    It is (width, height) of the upright image in pixels, and EXIF orientation, 1-8, of the stored pixels.
    Plain are complete JPEG and PNG files of 8-bit RGB or grayscale without transparency. A damaged file may
    look plain, because pixels are not decoded here.
    """
    orientation = 1
    try:
        image = open_encoded(data)
        if image.format == "PNG":
            # As stored, values have 8 bits. EXIF data may stand behind the pixels.
            plain = [tile[3] for tile in getattr(image, "tile")] == [image.mode] and b"IEND" in data[-12:]  # noqa: B009 - no stub has it
            plain = plain and not _UNUSUAL_IN_PNG & image.info.keys() and b"eXIf" not in data
        else:
            # Adobe's transform 0: the colors are stored as RGB.
            plain = image.format in ("JPEG", "MPO") and image.info.get("adobe_transform") != 0
            plain = plain and data.rfind(b"\xff\xd9") >= 0
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if plain else 1
    except Exception:  # decoders raise anything; decoding the image tells the reason
        return None
    if not plain or image.mode not in ("RGB", "L"):
        return None
    orientation = int(orientation) if orientation in range(1, 9) else 1
    width, height = image.size if orientation < 5 else image.size[::-1]
    return width, height, orientation


# --- to RGB -------------------------------------------------------------------------------------


def to_rgb(
    image: Image.Image, reduction: Reduction | None = None, value_range: ValueRange | None = None
) -> Image.Image:
    """Upright 8-bit RGB version of `image`, of its present frame.

    Transparent images are composed over white. Grayscale of 12 or 16 bits is scaled to 8 bits, as are
    floating-point images by their declared range. CMYK, palette and grayscale images are converted.
    `reduction` tells how much very large images are reduced. `value_range`: the values of black and white of
    images with more than 8 bits, instead of those that the file declares.
    """
    factor = reduction(*image.size) if reduction else 1
    if factor > 1:  # the decoder reduces it if it can
        width = image.width
        image.draft(None, (width // factor, image.height // factor))
        factor //= round(width / image.width)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.reduce(factor) if factor > 1 else image
    ends = _range(image, value_range)
    width, height = image.size
    # A conversion takes up to 32 bytes a pixel on the way: convert and reduce one tile after the other.
    pixels = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            box = (left, top, min(left + _TILE, width), min(top + _TILE, height))
            tile = _convert(image.crop(box), ends)
            pixels.paste(tile.reduce(factor) if factor > 1 else tile, (left // factor, top // factor))
    return pixels


class ChannelImage:
    """Pixels (H, W, C) uint8, where a PIL image is expected."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]
        self.size = (self.width, self.height)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self.pixels, *args)

    def tobytes(self) -> bytes:
        return self.pixels.tobytes()


def gray(rgb: Image.Image) -> ChannelImage:
    """One channel of an RGB image."""
    return ChannelImage(np.asarray(rgb.convert("L"))[..., None])


def decode(
    data: bytes,
    channels: int = 3,
    reduction: Reduction | None = None,
    value_range: ValueRange | None = None,
) -> Any:
    """An image file as an RGB image, or for another number of channels than 3 as a `ChannelImage`.

    One channel is gray; other numbers are the channels of the file, or the pages of a TIFF, scaled as by
    `to_rgb`; EXIF orientation is then applied except to TIFF files.

    Raises:
        ValueError: the file has another number of channels.
    """
    if channels not in (1, 3):
        planes = channel_values(data)
        if len(planes) != channels:
            raise _OptionError(f"{len(planes)} channels, not {channels} (--data.channels)")
        return ChannelImage(_to_bytes(planes, reduction, value_range))
    image = open_encoded(data)
    convert = partial(_deep_to_rgb, data) if _has_deep_colors(image) else to_rgb
    rgb = convert(image, reduction, value_range)
    return rgb if channels == 3 else gray(rgb)


def _deep_to_rgb(
    data: bytes, image: Image.Image, reduction: Reduction | None, value_range: ValueRange | None
) -> Image.Image:
    """As `to_rgb`, of colors of more than 8 bits. Pillow alone would read 8 of them."""
    planes = channel_values(data)[: len(image.getbands())]  # of the first page
    colors, alpha = (planes[:-1], planes[-1:]) if len(planes) in (2, 4) else (planes, None)
    colors = np.broadcast_to(colors, (3, *colors.shape[1:]))
    upright = Image.fromarray(_to_bytes(colors, reduction, value_range))
    if alpha is not None:
        upright.putalpha(Image.fromarray(_to_bytes(alpha, reduction, None)[..., 0]))
        upright = _convert(upright, None)
    upright.getexif()[_Tag.Orientation] = image.getexif().get(_Tag.Orientation, 1)
    ImageOps.exif_transpose(upright, in_place=True)
    return upright


def _to_bytes(planes: np.ndarray, reduction: Reduction | None, value_range: ValueRange | None) -> np.ndarray:
    """Channels (C, H, W) as stored -> pixels (H, W, C) uint8."""
    factor = reduction(*planes.shape[:0:-1]) if reduction else 1
    if planes.dtype.kind not in "biuf":
        raise ValueError(f"pixels of type {planes.dtype}")
    if value_range is None and planes.dtype.kind == "f":
        raise _OptionError("floating-point pixels without a range; set --data.bit-depth percentile")
    made = []
    for plane in planes:  # one after the other: values take four times the memory of bytes
        if plane.dtype == bool:
            plane = 255 * plane.astype(np.uint8)
        elif plane.dtype != np.uint8:
            ends = value_range or (0, np.iinfo(plane.dtype).max)
            plane = _scaled(plane.astype(np.float32), ends)
        made.append(np.asarray(Image.fromarray(plane).reduce(factor)) if factor > 1 else plane)
    return np.stack(made, axis=-1)


def _scaled(values: np.ndarray, ends: ValueRange) -> np.ndarray:
    """Floating-point values of black and white -> 0 and 255, uint8. NaN is black."""
    values = np.nan_to_num((values - ends[0]) * (255 / (ends[1] - ends[0])), posinf=255.0, neginf=0.0)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def channel_values(data: bytes) -> np.ndarray:
    """The channels (C, H, W) of an image file as stored. The pages of a TIFF count as channels.

    Raises whatever the decoders raise, `ValueError` for a file that could exhaust memory, and `UsageError`
    for one that needs a package that is not installed.
    """
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        image = open_encoded(data)
        if _has_deep_colors(image):
            if 2 * image.width * image.height * len(image.getbands()) > _MAX_CHUNK_BYTES:
                raise ValueError(f"more than {_MAX_CHUNK_BYTES >> 20} MiB of pixels")
            import torch
            from torchvision.io import ImageReadMode, decode_png

            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_png(encoded, ImageReadMode.UNCHANGED).numpy()
        pixels = np.asarray(ImageOps.exif_transpose(image))
        return np.moveaxis(np.atleast_3d(pixels), -1, 0)
    from tifffile import TiffFile

    with TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        alike = [one for one in file.series if one.shape == series.shape and one.dtype == series.dtype]
        chunk = max(len(alike) * math.prod(series.shape), math.prod(series.keyframe.chunks))
        if chunk * series.dtype.itemsize > _MAX_CHUNK_BYTES:
            raise ValueError(f"more than {_MAX_CHUNK_BYTES >> 20} MiB of pixels")
        for page in (page for one in alike for page in one.pages if page is not None):
            for start, count in zip(page.dataoffsets, page.databytecounts, strict=False):
                _check_inflated(data[start : start + count])
        try:
            planes, axes = np.stack([one.asarray() for one in alike]), "+" + series.axes
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise UsageError(f"{error}: pip install imagecodecs") from error
            raise
    planes = np.moveaxis(planes, (axes.index("Y"), axes.index("X")), (-2, -1))
    return planes.reshape(-1, *planes.shape[-2:])


def _check_inflated(chunk: bytes) -> None:
    """Raise `ValueError` if a strip or tile that deflate has compressed is larger than memory should hold."""
    if len(chunk) * 1032 > _MAX_CHUNK_BYTES:  # deflate's largest factor
        with contextlib.suppress(zlib.error):  # it is compressed by other means, or not at all
            if len(zlib.decompressobj().decompress(chunk, _MAX_CHUNK_BYTES + 1)) > _MAX_CHUNK_BYTES:
                raise ValueError(f"more than {_MAX_CHUNK_BYTES >> 20} MiB of pixels")


def _convert(image: Image.Image, ends: tuple[float, float] | None) -> Image.Image:
    if ends is not None:
        return Image.fromarray(_scaled(np.asarray(image).astype(np.float64), ends)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # The premultiplied modes convert to their plain counterparts only.
        plain = {"RGBa": "RGBA", "La": "LA"}.get(image.mode, image.mode)
        image = image.convert(plain).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _range(image: Image.Image, given: ValueRange | None) -> ValueRange | None:
    """The values of black and white in one channel of more than 8 bits; None for all other images."""
    if given is not None or not _is_deep(image):
        return given if _is_deep(image) else None
    if image.mode == "F":
        return _declared_range(image)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # 32 bits, of which most files use 8 or 16
        return 0, 255 if image.getextrema()[1] <= 255 else 65535  # type: ignore[operator]
    bits = max(_tiff_tags(image).get(_Tag.BitsPerSample, (16,)))  # some TIFF files have 12
    return 0, 2**bits - 1


def _is_deep(image: Image.Image) -> bool:
    """Whether the image has one channel of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _has_deep_colors(image: Image.Image) -> bool:
    """Whether the image has colors, or gray and transparency, of more than 8 bits."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    if image.format == "PNG":
        return any("16B" in str(tile[3]) for tile in getattr(image, "tile"))  # noqa: B009 - no stub has it
    return max(_tiff_tags(image).get(_Tag.BitsPerSample, (8,))) > 8


def deep_values(image: Image.Image) -> np.ndarray | None:
    """Up to 2^16 finite values of an image with more than 8 bits, spread over it; None for other images."""
    return _some_of(np.asarray(image)) if _is_deep(image) else None


def deep_values_of(data: bytes, channels: int) -> np.ndarray | None:
    """As `deep_values`, of an image file of which so many channels are read."""
    if channels in (1, 3) and not _has_deep_colors(image := open_encoded(data)):
        return deep_values(image)
    values = channel_values(data)
    return _some_of(values) if values.dtype.itemsize > 1 else None


def _some_of(values: np.ndarray) -> np.ndarray:
    """Up to 2^16 finite values, spread over an array."""
    spread = values.ravel()[:: -(-values.size // (1 << 16))]
    return spread[np.isfinite(spread)]


# --- errors -------------------------------------------------------------------------------------


def naming_file(where: str, work: Callable[[], T]) -> T:
    """`work()`, which reads or decodes the image `where`; tried again while the data are away.

    Raises:
        UnreadableImageError: the file is to blame.
        RunError: what it lies on is away, or the process or the machine lacks something; see `patiently`.
    """
    try:
        return patiently(work, f"image {printable(where)}")
    except (RunError, UsageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        text = (isinstance(error, OSError) and error.strerror) or str(error)
        # Pillow's own text ends in "<_io.BytesIO object at 0x...>".
        reason = "not an image" if "cannot identify image file" in text else text
        reason = re.sub(r"\s+", " ", reason).strip() or type(error).__name__
        raise UnreadableImageError(where, reason, lasting=not isinstance(error, _OptionError)) from error
