"""Folders of JPEG files for `loader_bench.py` and the tests of the loader: clean ones and a damaged one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lejepa_fast.data import open_source
from lejepa_fast.data.sources.base import ImageSource

WIDTH, HEIGHT = 500, 375  # the size of a typical ImageNet file
QUALITY = 95
EXIF_ORIENTATION = 0x0112


class Folder(NamedTuple):
    """Where the files lie, what they show, and their mean size."""

    path: Path
    description: str
    mean_kib: float


def make_folder(path: Path, count: int, data: str | None = None) -> Folder:
    """Write `count` JPEG files of 500 x 375 px, made from the images at `data` or the embedded ones.

    Images of at least half that size are scaled to fill it. Smaller ones make up mosaics in their own size,
    because an enlarged small picture is far smoother than a photograph, and quick to decode.
    """
    source = open_source(data or "trashnet96", "train")
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    mosaic = min(source[0][0].size) < HEIGHT / 2
    for number in range(count):
        image = _mosaic(source, random) if mosaic else _filled(source[number % len(source)][0])
        image.save(path / f"{number:05d}.jpg", quality=QUALITY)
    size = sum(file.stat().st_size for file in path.iterdir()) / count / 1024
    kind = "mosaics" if mosaic else "scaled"
    name = Path(data).name if data else "trashnet96"
    return Folder(path, f"{WIDTH} x {HEIGHT} JPEG, {kind} of {name}", size)


def _mosaic(source: ImageSource, random: np.random.Generator) -> Image.Image:
    canvas = Image.new("RGB", (WIDTH, HEIGHT))
    step = min(source[0][0].size)
    for y in range(0, HEIGHT, step):
        for x in range(0, WIDTH, step):
            canvas.paste(source[int(random.integers(len(source)))][0], (x, y))
    return canvas


def _filled(image: Image.Image) -> Image.Image:
    scale = max(WIDTH / image.width, HEIGHT / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - WIDTH) // 2, (height - HEIGHT) // 2
    large = image.resize((width, height), Image.Resampling.BICUBIC)
    return large.crop((left, top, left + WIDTH, top + HEIGHT))


BAD_KINDS = {"truncated": 10, "text": 5}
ODD_KINDS = ("cmyk.jpg", "sixteen.png", "exif.jpg", "pixel.png", "huge.jpg")


def damage(path: Path, *, huge: tuple[int, int] = (8000, 6000)) -> None:
    """Add what real data sets hold to a folder of .jpg files: 15 files that are no images, 5 odd ones.

    Bad: 10 truncated JPEGs, 5 text files named .jpg. Odd but good: CMYK, 16-bit grayscale, an EXIF rotation,
    one pixel, 48 megapixels (`huge`).
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
    picture.convert("CMYK").save(path / "cmyk.jpg", quality=QUALITY)
    gray = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(path / "sixteen.png")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture.save(path / "exif.jpg", quality=QUALITY, exif=exif)
    Image.new("RGB", (1, 1), (200, 30, 30)).save(path / "pixel.png")
    picture.resize(huge).save(path / "huge.jpg", quality=85)
