"""JPEG files of a usual size for the benchmarks of loader and trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lejepa_fast.data import open_source

WIDTH, HEIGHT = 500, 375  # the size of a typical ImageNet file
QUALITY = 95


def make_folder(path: Path, count: int) -> None:
    """Write `count` JPEG files of 500 x 375 px: mosaics of the embedded images in their own size.

    An enlarged small picture would be far smoother than a photograph, and quick to decode.
    """
    source = open_source("trashnet96", "train")
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    step = min(source[0][0].size)
    for number in range(count):
        canvas = Image.new("RGB", (WIDTH, HEIGHT))
        for y in range(0, HEIGHT, step):
            for x in range(0, WIDTH, step):
                canvas.paste(source[int(random.integers(len(source)))][0], (x, y))
        canvas.save(path / f"{number:05d}.jpg", quality=QUALITY)
