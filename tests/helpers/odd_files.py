"""Image files that are damaged or odd, each with what must become of it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

BOMB_SIDE = 20_000


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- EXIF data ------------------------------------------------------------------------------------


def exif_entry(tag: int, kind: int, count: int, value: int) -> bytes:
    """An entry whose `value` stands in it, or is the place where the values are."""
    return struct.pack("<HHII", tag, kind, count, value)


ORIENTATION_6 = exif_entry(0x0112, 3, 1, 6)
DANGLING = exif_entry(0x010F, 2, 100, 60_000)  # a maker's name far behind the end


def exif_inserted(jpeg: bytes, *entries: bytes, magic: int = 42) -> bytes:
    """The JPEG file with one more EXIF segment, before all others."""
    tiff = b"II" + struct.pack("<HIH", magic, 8, len(entries)) + b"".join(entries) + bytes(4)
    return jpeg[:2] + struct.pack(">2sH", b"\xff\xe1", 8 + len(tiff)) + b"Exif\0\0" + tiff + jpeg[2:]


# --- bad ones: bytes made from a picture ----------------------------------------------------------


def bad_huffman(picture: Image.Image) -> bytes:
    """A JPEG with a code table that no code fits, of the right length: its headers look sound."""
    data = bytearray(saved(picture, "JPEG"))
    counts = data.index(b"\xff\xc4") + 5
    total = sum(data[counts : counts + 16])
    data[counts : counts + 16] = bytes([total, *[0] * 15])  # so many codes of one bit
    return bytes(data)


def damaged_exif(picture: Image.Image) -> bytes:
    """EXIF data of 515 entries, of which there are three; a wrong byte in a code table, one among the pixels.

    Over this file DALI's decoder, asked to turn images upright, spoils the memory of the process. (Always the
    same picture: in others the wrong byte may make another picture, and no error.)
    """
    colours = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).resize((40, 32), Image.Resampling.BILINEAR)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0110] = 6, "Make", "Model"
    data = bytearray(saved(picture, "JPEG", exif=exif, quality=90))
    data[data.index(b"MM\0*") + 8] = 2
    data[data.rindex(b"\xff\xc4") + 70] = 214
    data[data.index(b"\xff\xda") + 272] = 255
    return bytes(data)


def png_bomb(picture: Image.Image) -> bytes:
    """400 megapixels in 50 kB, and every one of them is there: decoding it takes 1.2 GB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + BOMB_SIDE // 8) * BOMB_SIDE), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_bomb(picture: Image.Image) -> bytes:
    """A JPEG whose header promises 400 megapixels."""
    data = bytearray(saved(picture, "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, BOMB_SIDE, BOMB_SIDE)
    return bytes(data)


# Name to (how it is made, part of the reason for which it must be refused).
BAD: dict[str, tuple[Callable[[Image.Image], bytes], str]] = {
    "empty.jpg": (lambda picture: b"", "not an image"),
    "huffman.jpg": (bad_huffman, "broken data stream"),
    "damaged-exif.jpg": (damaged_exif, "broken data stream"),
    "bomb.png": (png_bomb, "400000000 pixels"),
    "bomb.jpg": (jpeg_bomb, "400000000 pixels"),
}


# --- odd ones: bytes made from a picture, and the RGB pixels that must be seen --------------------


def from_palette(picture: Image.Image) -> tuple[Image.Image, np.ndarray]:
    """The picture in 32 colours, and its pixels."""
    reduced = picture.quantize(32)
    return reduced, np.array(reduced.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(reduced)]


def palette(picture: Image.Image) -> tuple[bytes, np.ndarray]:
    reduced, pixels = from_palette(picture)
    return saved(reduced, "PNG"), pixels


def clear_palette(picture: Image.Image) -> tuple[bytes, np.ndarray]:
    """One colour of the palette is transparent; white shows through."""
    reduced, pixels = from_palette(picture)
    clear = int(np.asarray(reduced)[0, 0])
    pixels[np.asarray(reduced) == clear] = 255
    return saved(reduced, "PNG", transparency=clear), pixels


def animation(picture: Image.Image) -> tuple[bytes, np.ndarray]:
    """Of which the first frame counts."""
    reduced, pixels = from_palette(picture)
    other = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).quantize(32)
    return saved(reduced, "GIF", save_all=True, append_images=[other], duration=100), pixels


def alpha(picture: Image.Image) -> tuple[bytes, np.ndarray]:
    """From clear on the left, where white shows, to opaque on the right."""
    pixels = np.asarray(picture)
    opacity = np.broadcast_to(np.linspace(0, 255, picture.width).astype(np.uint8), pixels.shape[:2])
    share = opacity[..., None] / 255
    image = Image.fromarray(np.dstack([pixels, opacity]))
    return saved(image, "PNG"), np.rint(pixels * share + 255 * (1 - share)).astype(np.uint8)


def gray(picture: Image.Image) -> tuple[bytes, np.ndarray]:
    luma = picture.convert("L")
    return saved(luma, "JPEG", quality=95), np.repeat(np.asarray(luma)[..., None], 3, axis=2)


ODD: dict[str, Callable[[Image.Image], tuple[bytes, np.ndarray]]] = {
    "palette.png": palette,
    "clear.png": clear_palette,
    "animation.gif": animation,
    "alpha.png": alpha,
    "gray.jpg": gray,
    "png-inside.jpg": lambda picture: (saved(picture, "PNG"), np.asarray(picture)),
    "jpeg-inside.png": lambda picture: (saved(picture, "JPEG", quality=95), np.asarray(picture)),
}


def spoil(path: Path, picture: Image.Image) -> dict[str, Image.Image]:
    """Write all of them into a folder. The odd ones' names, with the pictures that they show."""
    for name, (make, _) in BAD.items():
        (path / name).write_bytes(make(picture))
    shown = {}
    for name, draw in ODD.items():
        data, pixels = draw(picture)
        (path / name).write_bytes(data)
        shown[name] = Image.fromarray(pixels)
    return shown
