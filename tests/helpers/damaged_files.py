"""A folder of images with damaged and odd files among them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

BAD_KINDS = {"truncated": 10, "text": 5}
ODD_KINDS = ("cmyk.jpg", "sixteen.png", "exif.jpg", "pixel.png", "huge.jpg")


def damage(path: Path) -> None:
    """Add to a folder of .jpg files 15 files that are no images and 5 odd ones, as real data sets have them.

    Bad: 10 truncated JPEGs, 5 text files named .jpg. Odd but good: CMYK, 16-bit grayscale, an EXIF rotation,
    one pixel, 48 megapixels.
    """
    whole = next(file for file in sorted(path.iterdir()) if file.suffix == ".jpg")
    data = whole.read_bytes()
    for number in range(BAD_KINDS["truncated"]):
        # From a few bytes to nearly all.
        length = int(len(data) * (number + 0.5) / (BAD_KINDS["truncated"] + 0.5))
        (path / f"truncated-{number}.jpg").write_bytes(data[:length])
    for number in range(BAD_KINDS["text"]):
        (path / f"text-{number}.jpg").write_text(
            f"This is file {number} and not an image.\n" * (1 + number * 9)
        )
    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGB")
    picture.convert("CMYK").save(path / "cmyk.jpg", quality=95)
    gray = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(path / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    picture.save(path / "exif.jpg", quality=95, exif=exif)
    Image.new("RGB", (1, 1), (200, 30, 30)).save(path / "pixel.png")
    picture.resize((8000, 6000)).save(path / "huge.jpg", quality=85)
