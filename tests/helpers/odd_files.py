"""Image files that are damaged or odd, each with what must become of it."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

BOMB_SIDE = 20_000


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- EXIF data ------------------------------------------------------------------------------------


def exif_entry(tag: int, kind: int, count: int, value: int) -> bytes:
    """An entry that holds `value`, or whose values begin there."""
    return struct.pack("<HHII", tag, kind, count, value)


ORIENTATION_6 = exif_entry(0x0112, 3, 1, 6)
DANGLING = exif_entry(0x010F, 2, 100, 60_000)  # a maker's name far behind the end


def exif_block(*entries: bytes, rest: bytes = b"") -> bytes:
    head = b"Exif\0\0II" + struct.pack("<HIH", 42, 8, len(entries))
    return head + b"".join(entries) + bytes(4) + rest


def with_segment(jpeg: bytes, content: bytes, times: int = 1) -> bytes:
    """The JPEG file with one more APP1 segment, or several, before all others."""
    return jpeg[:2] + (struct.pack(">2sH", b"\xff\xe1", 2 + len(content)) + content) * times + jpeg[2:]


# --- bombs: small files that take much memory or time ---------------------------------------------


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(picture: Image.Image) -> bytes:
    """400 megapixels in 50 kB, and every one of them is there: decoding it takes 1.2 GB."""
    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + BOMB_SIDE // 8) * BOMB_SIDE), 1)
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_bomb(picture: Image.Image) -> bytes:
    """A JPEG whose header promises 400 megapixels."""
    data = bytearray(saved(picture, "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, BOMB_SIDE, BOMB_SIDE)
    return bytes(data)


def avif_of_exif(picture: Image.Image) -> bytes:
    """The EXIF data of `png_of_exif` in AVIF, where Pillow unpacks it on opening, and on saving."""
    data = png_of_exif(picture)
    block = data[data.index(b"II*\0") : data.index(b"IDAT") - 8]
    empty = b"II*\0" + bytes(len(block) - 4)
    return saved(picture, "AVIF", exif=b"Exif\0\0" + empty).replace(empty, block)


def png_of_exif(picture: Image.Image) -> bytes:
    """EXIF data of 0.4 MB, whose 16,000 entries are all of its other half: Pillow would make 3 GB of it."""
    size = 200_000
    entries = [exif_entry(tag, 7, size, 8 + 2 + 12 * 16_000 + 4) for tag in range(0x8000, 0x8000 + 16_000)]
    data = saved(picture, "PNG")
    return data[:33] + png_chunk(b"eXIf", exif_block(*entries, rest=bytes(size))[6:]) + data[33:]


def tiff(data: bytes, **tags: int) -> bytes:
    """A TIFF file of one strip or tile. tags: as in `ExifTags.Base`; without more, one channel of 8 bits."""
    place = "TileOffsets" if "TileWidth" in tags else "StripOffsets"
    defaults = {"BitsPerSample": 8, "Compression": 1, "PhotometricInterpretation": 1, place: 0}
    counts = {place.replace("Offsets", "ByteCounts"): len(data)}
    all_tags = sorted((ExifTags.Base[name], value) for name, value in (defaults | counts | tags).items())
    start = 8 + 2 + 12 * len(all_tags) + 4
    entries = [exif_entry(tag, 4, 1, start if tag == ExifTags.Base[place] else n) for tag, n in all_tags]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return head + b"".join(entries) + bytes(4) + data


def tiff_bomb(picture: Image.Image) -> bytes:
    """An image of 16 x 16 px in a tile of 400 megapixels, which libtiff decodes as a whole."""
    sizes = {"ImageWidth": 16, "ImageLength": 16, "TileWidth": BOMB_SIDE, "TileLength": BOMB_SIDE}
    return tiff(zlib.compress(bytes(1 << 20)), **sizes, BitsPerSample=16, Compression=8)


def webp_of_34_bytes(picture: Image.Image) -> bytes:
    """The start of 163 megapixels: Pillow and libwebp would take 2.6 GB for all of them."""
    frame = b"\x30\1\0\x9d\1\x2a" + struct.pack("<HH", 16_383, 10_000) + bytes(4)
    return b"RIFF" + struct.pack("<I4s4sI", 12 + len(frame), b"WEBP", b"VP8 ", len(frame)) + frame


# Name to (how it is made, part of the reason for which it must be refused).
BOMBS: dict[str, tuple[Callable[[Image.Image], bytes], str]] = {
    "webp": (webp_of_34_bytes, "16383 x 10000 px, more than the 44,739,242 pixels"),
    "tiff": (tiff_bomb, "a tile or strip of more than 512 MiB"),
    # EXIF data in 4,000 segments, which Pillow would join one after the other.
    "segments": (
        lambda p: with_segment(saved(p, "JPEG"), b"Exif\0\0" + bytes(9_000), 4_000),
        "more than 128 KiB of EXIF data",
    ),
    "empty segments": (lambda p: with_segment(saved(p, "JPEG"), b"", 100_000), "too many segments before"),
    # Ten million bytes between two segments, which Pillow would skip one by one.
    "junk": (
        lambda p: saved(p, "JPEG")[:20] + bytes(10_000_000) + saved(p, "JPEG")[20:],
        "too many segments before the pixels",
    ),
    "exif": (png_of_exif, "more than 128 KiB of EXIF data"),
    "exif in avif": (avif_of_exif, "more than 128 KiB of EXIF data"),
}


# --- bad ones: bytes made from a picture ----------------------------------------------------------


def bad_huffman(jpeg: bytes) -> bytes:
    """The JPEG with a code table that no code fits, of the right length: its headers look sound."""
    data = bytearray(jpeg)
    counts = data.index(b"\xff\xc4") + 5
    total = sum(data[counts : counts + 16])
    data[counts : counts + 16] = bytes([total, *[0] * 15])  # so many codes of one bit
    return bytes(data)


def truncated(share: float, picture: Image.Image) -> bytes:
    data = saved(picture, "JPEG", quality=90)
    return data[: int(share * len(data))]


def damaged_exif(picture: Image.Image) -> bytes:
    """EXIF data of 515 entries, of which there are three, before a bad code table.

    Asked to turn images upright, DALI's decoder spoils the memory of the process over such data.
    """
    block = exif(6)
    block[0x0110] = "Model"
    data = bytearray(saved(picture, "JPEG", exif=block))
    data[data.index(b"MM\0*") + 8] = 2
    return bad_huffman(bytes(data))


# Name to (how it is made, part of the reason for which it must be refused).
BAD: dict[str, tuple[Callable[[Image.Image], bytes], str]] = {
    "empty.jpg": (lambda picture: b"", "not an image"),
    "text.jpg": (lambda picture: b"This is not an image.\n" * 9, "not an image"),
    # From a few bytes to nearly all.
    **{
        f"truncated-{n}.jpg": (partial(truncated, (n + 0.5) / 10.5), "[Tt]runcated|not an image")
        for n in range(10)
    },
    "huffman.jpg": (lambda picture: bad_huffman(saved(picture, "JPEG")), "broken data stream"),
    "damaged-exif.jpg": (damaged_exif, "broken data stream"),
    "bomb.png": (png_bomb, "400000000 pixels"),
    "bomb.jpg": (jpeg_bomb, "400000000 pixels"),
}


# --- odd ones: bytes made from a picture, and the RGB pixels that must be seen --------------------


def from_palette(picture: Image.Image) -> tuple[Image.Image, np.ndarray]:
    """The picture in 32 colors, and its pixels."""
    reduced = picture.quantize(32)
    return reduced, np.array(reduced.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(reduced)]


def clear_palette(picture: Image.Image) -> tuple[bytes, np.ndarray]:
    """One color of the palette is transparent; white shows through."""
    reduced, pixels = from_palette(picture)
    clear = int(np.asarray(reduced)[0, 0])
    pixels[np.asarray(reduced) == clear] = 255
    return saved(reduced, "PNG", transparency=clear), pixels


def animation(picture: Image.Image) -> tuple[bytes, np.ndarray]:
    """Of which the first frame counts."""
    reduced, pixels = from_palette(picture)
    other = picture.rotate(180).quantize(32)
    return saved(reduced, "GIF", save_all=True, append_images=[other], duration=100), pixels


def alpha(picture: Image.Image) -> tuple[bytes, np.ndarray]:
    """From clear on the left, where white shows, to opaque on the right."""
    pixels = np.asarray(picture)
    opacity = np.broadcast_to(np.linspace(0, 255, picture.width).astype(np.uint8), pixels.shape[:2])
    share = opacity[..., None] / 255
    image = Image.fromarray(np.dstack([pixels, opacity]))
    return saved(image, "PNG"), np.rint(pixels * share + 255 * (1 - share)).astype(np.uint8)


def gray(picture: Image.Image) -> np.ndarray:
    return np.repeat(np.asarray(picture.convert("L"))[..., None], 3, axis=2)


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x010F], made[0x0112] = "maker", orientation
    return made


ODD: dict[str, Callable[[Image.Image], tuple[bytes, np.ndarray]]] = {
    "palette.png": lambda p: (saved(from_palette(p)[0], "PNG"), from_palette(p)[1]),
    "clear.png": clear_palette,
    "animation.gif": animation,
    "alpha.png": alpha,
    "gray.jpg": lambda p: (saved(p.convert("L"), "JPEG", quality=95), gray(p)),
    "sixteen.png": lambda p: (
        saved(Image.fromarray(gray(p)[..., 0].astype(np.uint16) * 257), "PNG"),
        gray(p),
    ),
    "cmyk.jpg": lambda p: (saved(p.convert("CMYK"), "JPEG", quality=95), np.asarray(p)),
    "exif.jpg": lambda p: (saved(p, "JPEG", quality=95, exif=exif(6)), np.rot90(np.asarray(p), -1)),
    "exif.webp": lambda p: (saved(p, "WEBP", lossless=True, exif=exif(6)), np.rot90(np.asarray(p), -1)),
    "exif.png": lambda p: (saved(p, "PNG", exif=exif(6)), np.rot90(np.asarray(p), -1)),
    "exif.tif": lambda p: (saved(p, "TIFF", exif=exif(6)), np.rot90(np.asarray(p), -1)),
    "rgb.jpg": lambda p: (saved(p, "JPEG", quality=95, keep_rgb=True), np.asarray(p)),
    "pixel.png": lambda p: (saved(p.crop((0, 0, 1, 1)), "PNG"), np.asarray(p)[:1, :1]),
    "png-inside.jpg": lambda p: (saved(p, "PNG"), np.asarray(p)),
    "jpeg-inside.png": lambda p: (saved(p, "JPEG", quality=95), np.asarray(p)),
}


def spoil(path: Path, picture: Image.Image) -> dict[str, Image.Image]:
    """Write all of them into a folder. The odd ones' names, with the pictures that they show."""
    for name, (make, _) in BAD.items():
        (path / name).write_bytes(make(picture))
    made = {name: draw(picture) for name, draw in ODD.items()}
    for name, (data, _) in made.items():
        (path / name).write_bytes(data)
    return {name: Image.fromarray(pixels.copy()) for name, (_, pixels) in made.items()}
