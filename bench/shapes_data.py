"""A set for low-level tasks, counting and distance: python bench/shapes_data.py FOLDER

The same pictures on every machine, FOLDER/train/NAME.png and FOLDER/val/NAME.png, with one to five shapes as
in bench/shapes.py. Two tables of numbers, `file,value`:

    FOLDER/count.csv       how many shapes there are
    FOLDER/distance.csv    pixels from the center of the picture to the center of the nearest shape

    lejepa-evaluate --checkpoint RUN --data FOLDER --labels FOLDER/count.csv

A number has to be seen, not guessed from something simpler. Each count is as frequent as any other; the area
that all shapes cover together, their colors and the distance do not depend on the count.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from shapes import KINDS, MOST_SHAPES, inside, texture, write_labels

COVERED = (0.05, 0.08)  # share of the picture that all shapes cover
DISTANCE = (0.05, 0.3)  # of the nearest shape, in widths of the picture
_AREA = {"disc": math.pi, "square": 2.0, "triangle": 0.75 * math.sqrt(3), "cross": 1.92}  # at radius 1
_GAP = 0.03  # between circles around shapes, in widths
_CONTRAST = 80  # between the mean colors of a shape and the background, of 255 per channel


class Picture(NamedTuple):
    """A picture with its labels."""

    pixels: np.ndarray
    """(S, S, 3) uint8."""
    shapes: np.ndarray
    """A mask for each shape, (count, S, S) bool. They do not overlap."""
    distance: float
    """Of the nearest center of a shape from that of the picture, in pixels."""


def draw_picture(index: int, size: int = 96, seed: int = 0) -> Picture:
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
            picture, name = draw_picture(index, size, seed), f"{split}/{index:05d}.png"
            Image.fromarray(picture.pixels).save(folder / name)
            counts.append((name, len(picture.shapes)))
            distances.append((name, f"{picture.distance:.2f}"))
    write_labels(folder, distances, "distance.csv")
    write_labels(folder, counts, "count.csv")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where train/, val/ and the tables go")
    parser.add_argument("--train", type=int, default=2000, help="pictures to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=500, help="pictures to measure on (%(default)s)")
    parser.add_argument("--size", type=int, default=96, help="their side in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other pictures (%(default)s)")
    options = parser.parse_args(arguments)
    write_set(options.folder, options.train, options.val, options.size, options.seed)


if __name__ == "__main__":
    main()
