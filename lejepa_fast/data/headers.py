"""Which image files DALI decodes just as Pillow does, told from their headers.

`plain_size` condemns no file. It sorts: a file with nothing unusual goes to DALI's decoder as it is, any
other one - odd, damaged or of another format - goes through Pillow first, which converts or refuses it.
So a file that would make DALI's decoder fail, which ends a whole pipeline, hardly ever reaches it, and what
counts as unreadable is the same for every backend.
"""

from __future__ import annotations

import struct

from PIL import Image

from lejepa_fast.data.decode import MAX_IMAGE_PIXELS

_SOF_BASELINE, _SOF_EXTENDED, _SOF_PROGRESSIVE = 0xC0, 0xC1, 0xC2
_OTHER_SOF = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_DHT, _SOS, _APP1, _APP14 = 0xC4, 0xDA, 0xE1, 0xEE
_ORIENTATION = 0x0112
# Chunks of a PNG file that change no pixel. (EXIF and texts may carry an orientation.)
_PLAIN_CHUNKS = frozenset({b"IHDR", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"iCCP", b"sBIT", b"bKGD", b"tIME"})
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class _UnusualError(Exception):
    """Not a file for the short way."""


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in px, upright, of a file that any decoder reads alike; None for all others."""
    try:
        if data[:3] == b"\xff\xd8\xff":
            width, height = _jpeg_size(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height = _png_size(data)
        else:
            return None
    except (_UnusualError, IndexError, struct.error):
        return None
    # Pillow's limit may have been lowered by the program, or switched off.
    limit = min(MAX_IMAGE_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_IMAGE_PIXELS)
    if width < 1 or height < 1 or width * height > limit:
        return None
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int]:
    width = height = components = 0
    transposed = False
    place = 2
    while True:
        marker = data[place + 1]
        if data[place] != 0xFF or marker < 0xC0 or marker == 0xFF:
            raise _UnusualError  # no marker where one must be
        length = (data[place + 2] << 8) | data[place + 3]
        body = place + 4
        place += 2 + length
        if marker == _SOS:
            break
        if marker in (_SOF_BASELINE, _SOF_EXTENDED, _SOF_PROGRESSIVE):
            depth, height, width, components = struct.unpack_from(">BHHB", data, body)
            if depth != 8 or components not in (1, 3):
                raise _UnusualError  # 12 bits, CMYK
        elif marker in _OTHER_SOF:
            raise _UnusualError  # lossless, hierarchical, arithmetic coding
        elif marker == _DHT:
            _check_huffman(data, body, place)
        elif marker == _APP1:
            transposed = transposed or _is_transposed(data[body:place])
        elif marker == _APP14 and data[body : body + 5] == b"Adobe" and data[body + 11] == 0:
            raise _UnusualError  # RGB or CMYK without a transform
    if not components or data.rfind(b"\xff\xd9", place) < 0:
        raise _UnusualError  # the end is missing
    return (height, width) if transposed else (width, height)


def _check_huffman(data: bytes, start: int, end: int) -> None:
    """Tables must be as long as they say."""
    while start < end:
        start += 17 + sum(data[start + 1 : start + 17])
    if start != end:
        raise _UnusualError


def _is_transposed(segment: bytes) -> bool:
    """Whether the orientation in an EXIF segment swaps width and height."""
    if segment[:6] != b"Exif\0\0":
        if b"Orientation" in segment:
            raise _UnusualError  # XMP
        return False
    tiff = segment[6:]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        raise _UnusualError
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, first)
    for entry in range(count):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, first + 2 + 12 * entry)
        if tag == _ORIENTATION:
            if kind != 3 or not 1 <= value <= 8:
                raise _UnusualError
            return value >= 5
    return False


def _png_size(data: bytes) -> tuple[int, int]:
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if depth != 8 or colour not in (0, 2) or interlaced:
        raise _UnusualError  # 16 bits, palette, transparency
    place = 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IDAT":
            break
        if kind not in _PLAIN_CHUNKS:
            raise _UnusualError
        place += 12 + length
    if not data.endswith(_PNG_END) or b"eXIf" in data[-4096:]:
        raise _UnusualError
    return width, height
