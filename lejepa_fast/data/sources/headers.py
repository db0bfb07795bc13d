"""Which image files DALI decodes just as Pillow does, told from their headers.

`plain_header` condemns no file. It sorts: a file with nothing unusual goes to DALI's decoder as it is, any
other one - odd, damaged or of another format - goes through Pillow first, which converts or refuses it.
So a file that would make DALI's decoder fail, which ends a whole pipeline, hardly ever reaches it. Damage
between a whole header and a whole end shows in decoding alone, and there DALI takes more than Pillow does.

The EXIF orientation is read here, too, and applied by ourselves: DALI's own parser takes other entries for
valid than Pillow's does, and has been seen to spoil the memory of the process over a damaged one.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from PIL import Image

from lejepa_fast.data.sources.decoding import MAX_IMAGE_PIXELS

_SOF_BASELINE, _SOF_EXTENDED, _SOF_PROGRESSIVE = 0xC0, 0xC1, 0xC2
_OTHER_SOF = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_DHT, _SOS, _APP1, _APP14 = 0xC4, 0xDA, 0xE1, 0xEE
_ORIENTATION, _SHORT = 0x0112, 3
# Bytes of one value of each type that an EXIF entry may have.
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
# Chunks of a PNG file that change no pixel. (EXIF and texts may carry an orientation.)
_PLAIN_CHUNKS = frozenset({b"IHDR", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"iCCP", b"sBIT", b"bKGD", b"tIME"})
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class _UnusualError(Exception):
    """Not a file for the short way."""


class Plain(NamedTuple):
    """What the header of a plain file says. width, height: in px, upright; orientation: 1-8, as in EXIF."""

    width: int
    height: int
    orientation: int


class Turn(NamedTuple):
    """How stored pixels become upright ones: rows and columns exchanged, then mirrored, then upside down."""

    transposed: bool
    mirrored: bool
    inverted: bool


TURNS = {n: Turn(n >= 5, n in (2, 3, 6, 7), n in (3, 4, 7, 8)) for n in range(1, 9)}


def plain_header(data: bytes) -> Plain | None:
    """Size and orientation of a file that any decoder reads alike; None for all others."""
    orientation = 1
    try:
        if data[:3] == b"\xff\xd8\xff":
            width, height, orientation = _jpeg_header(data)
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
    if TURNS[orientation].transposed:
        width, height = height, width
    return Plain(width, height, orientation)


def _jpeg_header(data: bytes) -> tuple[int, int, int]:
    """(width, height, orientation), as stored."""
    width = height = components = 0
    orientation = None
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
            if components:
                raise _UnusualError  # two frames
            depth, height, width, components = struct.unpack_from(">BHHB", data, body)
            if depth != 8 or components not in (1, 3):
                raise _UnusualError  # 12 bits, CMYK
        elif marker in _OTHER_SOF:
            raise _UnusualError  # lossless, hierarchical, arithmetic coding
        elif marker == _DHT:
            _check_huffman(data, body, place)
        elif marker == _APP1:
            found = _orientation(data[body:place])
            if None not in (found, orientation):
                raise _UnusualError  # Pillow joins the segments
            orientation = orientation or found
        elif marker == _APP14 and data[body : body + 5] == b"Adobe" and data[body + 11] == 0:
            raise _UnusualError  # RGB or CMYK without a transform
    if not components or data.rfind(b"\xff\xd9", place) < 0:
        raise _UnusualError  # the end is missing
    return width, height, orientation or 1


def _check_huffman(data: bytes, start: int, end: int) -> None:
    """Tables must be as long as they say."""
    while start < end:
        start += 17 + sum(data[start + 1 : start + 17])
    if start != end:
        raise _UnusualError


def _orientation(segment: bytes) -> int | None:
    """Orientation in an APP1 segment, 1 where EXIF has none; None for a segment that is not EXIF.

    Of EXIF data that is not wholly sound, each library makes something else: unusual.
    """
    if segment[:4] != b"Exif":
        if b"Orientation" in segment:
            raise _UnusualError  # XMP
        return None
    tiff = segment[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or segment[4:6] != b"\0\0":
        raise _UnusualError
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, first)
    orientation = None
    for entry in range(entries):
        place = first + 2 + 12 * entry
        tag, kind, count, where = struct.unpack_from(order + "HHII", tiff, place)
        size = _VALUE_BYTES.get(kind, len(tiff)) * count
        if size == 0 or (size > 4 and where + size > len(tiff)):
            raise _UnusualError
        if tag == _ORIENTATION:
            (value,) = struct.unpack_from(order + "H", tiff, place + 8)
            if orientation is not None or (kind, count) != (_SHORT, 1) or not 1 <= value <= 8:
                raise _UnusualError
            orientation = value
    return orientation or 1


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
