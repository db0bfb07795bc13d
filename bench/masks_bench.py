"""What a masking scheme loses: patches that it never masks, and context that it throws away.

    python bench/masks_bench.py

Compares `MultiBlockMasks` with what the collator of github.com/facebookresearch/ijepa does, in code of our
own: one random number gives area and aspect of all blocks of a batch, a block never reaches the last row and
column, and the contexts of a batch are cut to the shortest, in row-major order.
Appends a row for each scheme and grid to masks.jsonl. Needs a few seconds and no GPU.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from benchlib import Rows, command_line, print_rows
from torch import device

from lejepa_fast.data.masks import MultiBlockMasks

TARGETS = 4


class Masks(NamedTuple):
    """Masks of a batch: context (B, S, S) and targets (B, 4, S, S), both bool."""

    context: np.ndarray
    targets: np.ndarray
    dropped: int = 0
    """Context patches that were drawn, but cut off."""


@cache
def _multi_block(side: int) -> MultiBlockMasks:
    return MultiBlockMasks((side, side), TARGETS)


def ours(side: int, batch: int, number: int) -> Masks:
    """Batch `number` of this project."""
    images = range(number * batch, (number + 1) * batch)
    context, targets = _multi_block(side)(0, 0, images)
    return Masks(context.numpy(), targets.numpy())


def public_collator(side: int, batch: int, number: int) -> Masks:
    """Batch `number` of the public scheme."""
    random = np.random.default_rng(number)
    target_sides = _sides(side, random.random(), (0.15, 0.2), (0.75, 1.5))
    context_sides = _sides(side, random.random(), (0.85, 1.0), (1.0, 1.0))
    targets = np.zeros((batch, TARGETS, side, side), bool)
    context = np.zeros((batch, side, side), bool)
    for image in range(batch):
        for block in targets[image]:
            _place(block, target_sides, random)
        _place(context[image], context_sides, random)
    context &= ~targets.any(1)
    flat, drawn = context.reshape(batch, -1), int(context.sum())
    flat &= flat.cumsum(1) <= flat.sum(1).min()  # the shortest decides; the last patches go
    return Masks(context, targets, drawn - int(context.sum()))


def _sides(side: int, u: float, area: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
    """Height and width of all blocks of a batch: `u` in [0, 1) is used for area and aspect alike."""
    patches = int(side * side * (area[0] + u * (area[1] - area[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(patches * ratio)), round(math.sqrt(patches / ratio))
    return min(height, side - 1), min(width, side - 1)


def _place(block: np.ndarray, sides: tuple[int, int], random: np.random.Generator) -> None:
    """Fill a rectangle of `block` (S, S). The upper end of its start is left out."""
    top, left = (random.integers(0, len(block) - length) for length in sides)
    block[top : top + sides[0], left : left + sides[1]] = True


SCHEMES: dict[str, Callable[[int, int, int], Masks]] = {
    "MultiBlockMasks": ours,
    "public collator": public_collator,
}


def measured(
    scheme: Callable[[int, int, int], Masks], side: int, batch: int, batches: int
) -> dict[str, float]:
    """Shares in 0-1 over all batches, and the correlation of area and aspect (height / width) of targets."""
    context, targets = np.zeros((2, side, side), np.int64)
    dropped, sizes = 0, []
    for number in range(batches):
        masks = scheme(side, batch, number)
        context += masks.context.sum(0)
        targets += masks.targets.sum((0, 1))
        dropped += masks.dropped
        height, width = (masks.targets.any(axis).sum(-1).ravel() for axis in (-1, -2))
        sizes.append([height * width, height / width])
    return {
        "never_target": float((targets == 0).mean()),
        "never_context": float((context == 0).mean()),
        "context_dropped": float(dropped / (dropped + context.sum())),
        "area_aspect_correlation": float(np.corrcoef(np.concatenate(sizes, axis=1))[0, 1]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[14, 16], help="of the grids (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images (%(default)s)")
    parser.add_argument("--batches", type=int, default=160, help="of each scheme and grid (%(default)s)")
    options = parser.parse_args(arguments)
    writer, rows = Rows(options.out / "masks.jsonl", "masks_bench", device("cpu")), []
    for side in options.sides:
        for name, scheme in SCHEMES.items():
            found = measured(scheme, side, options.batch, options.batches)
            about = {"scheme": name, "grid": [side, side], "batch": options.batch}
            rows += writer.write({**about, "images": options.batch * options.batches, **found})
    columns = {
        "grid, scheme": "{grid[0]} x {grid[1]}, {scheme}",
        "never target": "{never_target:.1%}",
        "never context": "{never_context:.1%}",
        "context dropped": "{context_dropped:.1%}",
        "corr. of area and aspect": "{area_aspect_correlation:.2f}",
    }
    print_rows(rows, columns)


if __name__ == "__main__":
    main()
