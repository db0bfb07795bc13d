"""Pictures of shapes with masks, counts and distances: python bench/shapes.py FOLDER

The same ones on every machine. Writes FOLDER/images/NAME.png (RGB), FOLDER/masks/NAME.png (255 on a shape,
else 0) and FOLDER/labels.csv:
`file` below images/, `count` of the shapes (1 to 5) and `distance`, in pixels, from the center of the
picture to the center of the nearest shape. Discs, squares, triangles and crosses of one to two tints do not
overlap; behind them is smooth noise of two other tints. So neither brightness nor place tells shapes from
background.
"""

import argparse
import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lejepa_fast.train.runtime.files import write_atomically

KINDS = ("disc", "square", "triangle", "cross")
MOST_SHAPES = 5


class Picture(NamedTuple):
    """Pixels (S, S, 3) uint8, mask (S, S) bool, number of shapes, and distance of the nearest one in
    pixels."""

    pixels: np.ndarray
    mask: np.ndarray
    shapes: int
    distance: float


def draw_picture(index: int, size: int = 96, seed: int = 0) -> Picture:
    """Draw the picture with this index: a pure function of its arguments, `size` pixels wide."""
    random = np.random.default_rng((seed, index))
    pixels = texture(random, size)
    mask = np.zeros((size, size), bool)
    y, x = np.mgrid[:size, :size] + 0.5
    wanted = int(random.integers(1, MOST_SHAPES + 1))
    placed: list[tuple[np.ndarray, float]] = []
    while len(placed) < wanted:
        radius = size * random.uniform(0.08, 0.17)
        center = random.uniform(radius, size - radius, 2)
        if any(math.dist(center, other) < radius + far + 0.03 * size for other, far in placed):
            continue
        placed.append((center, radius))
        shape = inside(KINDS[random.integers(len(KINDS))], x - center[0], y - center[1], radius, random)
        pixels[shape] = texture(random, size)[shape]
        mask |= shape
    middle = (size / 2, size / 2)
    distance = min(math.dist(center, middle) for center, _ in placed)
    noisy = pixels + random.normal(0, 6, pixels.shape)
    return Picture(noisy.clip(0, 255).astype(np.uint8), mask, wanted, distance)


def texture(random: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise between two random colors, (S, S, 3)."""
    coarse = Image.fromarray(random.random((8, 8)).astype(np.float32))
    blend = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    first, second = random.uniform(0, 255, (2, 3))
    second = first + (second - first) * 0.5  # two tints of a kind: a shape is one thing
    return first + (second - first) * blend


def inside(kind: str, x: np.ndarray, y: np.ndarray, radius: float, random: np.random.Generator) -> np.ndarray:
    """Which pixels at offsets (x, y) from its center belong to the shape, which is turned at random."""
    angle = random.uniform(0, 2 * math.pi)
    u, v = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
    u, v = u / radius, v / radius
    if kind == "disc":
        return u**2 + v**2 <= 1
    if kind == "square":
        return np.maximum(abs(u), abs(v)) <= math.sqrt(0.5)
    if kind == "triangle":
        return np.maximum(math.sqrt(3) * abs(u) + v, -2 * v) <= 1
    return (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 0.95)


def write_shapes(folder: Path, count: int, size: int = 96, seed: int = 0) -> None:
    """Write `count` pictures of `size` pixels with masks and, last, labels.csv; files that are there are
    replaced."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rows: list[tuple[object, ...]] = [("file", "count", "distance")]
    for index in range(count):
        picture, name = draw_picture(index, size, seed), f"{index:05d}.png"
        Image.fromarray(picture.pixels).save(folder / "images" / name)
        Image.fromarray(picture.mask.astype(np.uint8) * 255).save(folder / "masks" / name)
        rows.append((name, picture.shapes, f"{picture.distance:.2f}"))
    write_labels(folder, rows)


def write_labels(folder: Path, rows: Iterable[Sequence[object]], name: str = "labels.csv") -> None:
    """Write a table, whole or not at all: where it is, the pictures are complete."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    content = table.getvalue().encode()
    write_atomically(folder / name, lambda file: file.write(content), way_out="free some space")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where images/, masks/ and labels.csv go")
    parser.add_argument("--count", type=int, default=2000, help="pictures (%(default)s)")
    parser.add_argument("--size", type=int, default=96, help="their side in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other pictures (%(default)s)")
    options = parser.parse_args(arguments)
    write_shapes(options.folder, options.count, options.size, options.seed)


if __name__ == "__main__":
    main()
