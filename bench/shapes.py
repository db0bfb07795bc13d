"""Two sets of pictures of shapes, the same ones on every machine.

`write_shapes`: FOLDER/images/NAME.png (RGB), FOLDER/masks/NAME.png (255 on a shape, else 0) and
FOLDER/labels.csv: `file` below images/, `count` of the shapes (1 to 5) and `distance`, in pixels, from the
center of the picture to the center of the nearest shape. Discs, squares, triangles and crosses of one to two
tints do not overlap; behind them is smooth noise of two other tints. So neither brightness nor place tells
shapes from background.

`write_set`, or `python bench/shapes.py FOLDER`: for low-level tasks, counting and distance,
FOLDER/train/NAME.png and FOLDER/val/NAME.png with two tables of numbers, `file,value`:

    FOLDER/count.csv       how many shapes there are
    FOLDER/distance.csv    pixels from the center of the picture to the center of the nearest shape

    lejepa-evaluate --checkpoint RUN --data FOLDER --labels FOLDER/count.csv

There a number has to be seen, not guessed from something simpler: each count is as frequent as any other; the
area that all shapes cover together, their colors and the distance do not depend on the count.
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
COVERED = (0.05, 0.08)  # share of the picture that all shapes cover
DISTANCE = (0.05, 0.3)  # of the nearest shape, in widths of the picture
_AREA = {"disc": math.pi, "square": 2.0, "triangle": 0.75 * math.sqrt(3), "cross": 1.92}  # at radius 1
_GAP = 0.03  # between circles around shapes, in widths
_CONTRAST = 80  # between the mean colors of a shape and the background, of 255 per channel


class Picture(NamedTuple):
    """Pixels (S, S, 3) uint8, a mask (S, S) bool for each shape, which do not overlap, and the distance of
    the nearest center of a shape from that of the picture, in pixels."""

    pixels: np.ndarray
    shapes: np.ndarray
    distance: float


def draw_picture(index: int, size: int = 96, seed: int = 0) -> Picture:
    """Draw the picture with this index: a pure function of its arguments, `size` pixels wide."""
    random = np.random.default_rng((seed, index))
    pixels = texture(random, size)
    shapes: list[np.ndarray] = []
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
        shapes.append(shape)
    middle = (size / 2, size / 2)
    distance = min(math.dist(center, middle) for center, _ in placed)
    noisy = pixels + random.normal(0, 6, pixels.shape)
    return Picture(noisy.clip(0, 255).astype(np.uint8), np.stack(shapes), distance)


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
        Image.fromarray(picture.shapes.any(0).astype(np.uint8) * 255).save(folder / "masks" / name)
        rows.append((name, len(picture.shapes), f"{picture.distance:.2f}"))
    write_labels(folder, rows)


def write_labels(folder: Path, rows: Iterable[Sequence[object]], name: str = "labels.csv") -> None:
    """Write a table, whole or not at all: where it is, the pictures are complete."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    content = table.getvalue().encode()
    write_atomically(folder / name, content, way_out="free some space")


def draw_balanced(index: int, size: int = 96, seed: int = 0) -> Picture:
    """Draw the picture with this index: a pure function of its arguments, `size` pixels wide.

    Of each MOST_SHAPES pictures in a row, one has each count.
    """
    group, place = divmod(index, MOST_SHAPES)
    count = 1 + int(np.random.default_rng((seed, group, 0)).permutation(MOST_SHAPES)[place])
    random = np.random.default_rng((seed, index))
    kinds = [KINDS[kind] for kind in random.integers(len(KINDS), size=count)]
    parts = random.uniform(0.7, 1.3, count)
    areas = size**2 * random.uniform(*COVERED) * parts / parts.sum()
    radii = np.sqrt(areas / [_AREA[kind] for kind in kinds])
    distance = size * random.uniform(*DISTANCE)
    pixels = texture(random, size)
    background = pixels.mean((0, 1))
    y, x = np.mgrid[:size, :size] + 0.5
    shapes = np.zeros((count, size, size), bool)
    places = zip(kinds, radii, _centers(radii, distance, size, random), strict=True)
    for shape, (kind, radius, center) in zip(shapes, places, strict=True):
        shape[:] = inside(kind, x - center[0], y - center[1], radius, random)
        fill = texture(random, size)
        while np.linalg.norm(fill.mean((0, 1)) - background) < _CONTRAST:
            fill = texture(random, size)
        pixels[shape] = fill[shape]
    noisy = pixels + random.normal(0, 6, pixels.shape)
    return Picture(noisy.clip(0, 255).astype(np.uint8), shapes, float(distance))


def _centers(radii: np.ndarray, distance: float, size: int, random: np.random.Generator) -> np.ndarray:
    """Centers (count, 2) in pixels: the first at `distance` from the middle, the others not nearer, all
    within the picture and apart from each other."""
    apart = radii[:, None] + radii + _GAP * size
    np.fill_diagonal(apart, 0)
    while True:
        centers = random.uniform(radii, size - radii, (2, len(radii))).T
        angle = random.uniform(0, 2 * math.pi)
        centers[0] = size / 2 + distance * np.array([math.cos(angle), math.sin(angle)])
        if (
            abs(centers[0] - size / 2).max() <= size / 2 - radii[0]
            and (np.linalg.norm(centers[1:] - size / 2, axis=1) >= distance).all()
            and (np.linalg.norm(centers[:, None] - centers, axis=-1) >= apart).all()
        ):
            return centers


def write_set(folder: Path, train: int, val: int, size: int = 96, seed: int = 0) -> None:
    """Write `train` and `val` pictures of `size` pixels and, last, the tables; files that are there are
    replaced."""
    counts: list[tuple[str, object]] = [("file", "value")]
    distances = counts.copy()
    for split, indices in (("train", range(train)), ("val", range(train, train + val))):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index in indices:
            picture, name = draw_balanced(index, size, seed), f"{split}/{index:05d}.png"
            Image.fromarray(picture.pixels).save(folder / name)
            counts.append((name, len(picture.shapes)))
            distances.append((name, f"{picture.distance:.2f}"))
    write_labels(folder, distances, "distance.csv")
    write_labels(folder, counts, "count.csv")


def main(arguments: Sequence[str] | None = None) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("folder", type=Path, help="where train/, val/ and the tables go")
    parser.add_argument("--train", type=int, default=2000, help="pictures to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=500, help="pictures to measure on (%(default)s)")
    parser.add_argument("--size", type=int, default=96, help="their side in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other pictures (%(default)s)")
    options = parser.parse_args(arguments)
    write_set(options.folder, options.train, options.val, options.size, options.seed)


if __name__ == "__main__":
    main()
