"""Folders of small images whose colors tell them apart."""

from pathlib import Path

from PIL import Image


def write_images(folder: Path, count: int, size: tuple[int, int] = (12, 10), *, shade: int = 0) -> None:
    """`count` PNG files, 000.png and so on: red is the number of one, green is `shade`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (number, shade, 7)).save(folder / f"{number:03d}.png")
