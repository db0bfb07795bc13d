"""Multi-block masks of I-JEPA (arXiv 2301.08243): which patches of an image are context, which are targets.

    masks = MultiBlockMasks(grid=(14, 14))
    context, targets = masks(seed, epoch, indices)    # bool, (B, 14, 14) and (B, 4, 14, 14)

The masks of an image depend on (seed, epoch, image) alone, as its crops do: they are the same for any number
of ranks and workers, and after a resume. Blocks are drawn for each image by itself and never cut to those of
the batch, so the number of patches differs between images. Each place where a block fits has the same
probability, so the last row and column are masked as often as the first. Needs PyTorch and NumPy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lejepa_fast.checks import check_integer, check_number
from lejepa_fast.data.draws import MASKS, uniforms
from lejepa_fast.errors import UsageError

Range = tuple[float, float]

_SLACK = 1e-9  # for rounding: a block that meets a bound exactly is within it
_TRIAL = 512  # images that a new object draws to see whether `min_keep` can be had
_RAREST = 0.05  # share of draws with enough context below which `min_keep` is refused


@dataclass(frozen=True)
class MultiBlockMasks:
    """Draws a context and several target blocks for each image.

    A target is a rectangle of whole patches whose area and aspect lie within `target_area` and
    `target_aspect`. Which of these rectangles: area and aspect, uniform and independent, choose the nearest
    one; the probabilities that follow are tilted slightly such that area and aspect of the rectangles are
    uncorrelated too, which rounding alone breaks. (A grid with no more than two such rectangles may leave no
    choice.) Blocks are independent of each other and may overlap. The context is a block of the shape of the
    grid without the patches of any target.

    If fewer than `min_keep` context patches stay, all blocks of that image are drawn anew from its next
    random numbers, until enough do.

    Raises:
        UsageError: no block of the grid has the area and the aspect asked for, or fewer than 5 % of the draws
            leave `min_keep` context patches. A `ValueError`.
        TypeError, ValueError: a number is of another type, or too small.
    """

    grid: tuple[int, int] = (14, 14)
    """Patches of an image (height, width)."""
    targets: int = 4
    """Target blocks of an image."""
    target_area: Range = (0.15, 0.2)
    """Lowest and highest area of a target, as a share of the grid."""
    target_aspect: Range = (0.75, 1.5)
    """Lowest and highest height / width of a target."""
    context_area: Range = (0.85, 1.0)
    """Lowest and highest area of the context block, as a share of the grid, before targets are removed."""
    min_keep: int = 10
    """Context patches that stay, at least."""

    def __post_init__(self) -> None:
        if np.shape(self.grid) != (2,):
            raise UsageError(f"grid: expected (height, width) in patches, got {self.grid!r}")
        for side in self.grid:
            check_integer("grid", side, at_least=1)
        check_integer("targets", self.targets, at_least=1)
        check_integer("min_keep", self.min_keep, at_least=1)
        for name, highest in (("target_area", 1), ("target_aspect", np.inf), ("context_area", 1)):
            values = getattr(self, name)
            two = np.shape(values) == (2,)
            for value in values if two else ():
                check_number(name, value)
            if not two or not 0 < values[0] <= values[1] <= highest or values[1] == np.inf:
                above = " and finite" if highest == np.inf else ", at most 1"
                raise UsageError(f"{name}: expected (lowest, highest) above 0{above}, got {values!r}")
        kept = self._draw(uniforms(0, MASKS, 0, range(_TRIAL), self._words))[0].sum((1, 2))
        if (share := (kept >= self.min_keep).mean()) < _RAREST:
            raise UsageError(
                f"min_keep: {self.min_keep} context patches stay in {share:.1%} of the draws on a "
                f"{self._shape} grid, expected {_RAREST:.0%} or more; the median is {np.median(kept):.0f}"
            )

    def __call__(self, seed: int, epoch: int, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Draw the masks of a batch.

        Args:
            seed, epoch: as of the sampler.
            indices: numbers of the images in the data set, (B,).

        Returns:
            context (B, h, w) and targets (B, `targets`, h, w), bool, on the CPU. No patch is in both.

        Raises:
            TypeError: seed, epoch or indices are not integers.
            ValueError: `indices` has another shape.
        """
        check_integer("seed", seed)
        check_integer("epoch", epoch)
        seed, epoch = int(seed), int(epoch)
        numbers = torch.as_tensor(indices)
        if numbers.dim() != 1:
            raise ValueError(f"indices: expected shape (B,), got {tuple(numbers.shape)}")
        images = numbers.tolist()
        for image in images:
            check_integer("indices", image)
        context = np.empty((len(images), *self.grid), bool)
        targets = np.empty((len(images), self.targets, *self.grid), bool)
        pending, start = np.arange(len(images)), 0
        while len(pending):
            u = uniforms(seed, MASKS, epoch, [images[i] for i in pending], start + self._words)
            context[pending], targets[pending] = self._draw(u[:, start:])
            pending = pending[context[pending].sum((1, 2)) < self.min_keep]
            start += self._words
        return torch.from_numpy(context), torch.from_numpy(targets)

    def _draw(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Context and targets of numbers (B, `_words`): rectangle, top and left of each target and of the
        context block."""
        u = u.reshape(len(u), self.targets + 1, 3)
        sides = np.concatenate(
            [
                rectangles[np.searchsorted(ends, which, side="right")]
                for (rectangles, ends), which in (
                    (self._target_rectangles, u[:, :-1, 0]),
                    (self._context_rectangles, u[:, -1:, 0]),
                )
            ],
            axis=1,
        )
        starts = np.floor(u[..., 1:] * (np.array(self.grid) - sides + 1))
        rows, columns = (
            (starts[..., i, None] <= np.arange(side)) & (np.arange(side) < (starts + sides)[..., i, None])
            for i, side in enumerate(self.grid)
        )
        blocks = rows[..., None] & columns[..., None, :]  # (B, targets + 1, h, w)
        return blocks[:, -1] & ~blocks[:, :-1].any(1), blocks[:, :-1]

    @property
    def _words(self) -> int:
        """Random numbers of a draw."""
        return 3 * (self.targets + 1)

    @property
    def _shape(self) -> str:
        return f"{self.grid[0]} x {self.grid[1]}"

    @cached_property
    def _target_rectangles(self) -> tuple[np.ndarray, np.ndarray]:
        """Sides (R, 2) of what a target may be, and upper ends (R - 1,) of their shares of [0, 1)."""
        sides = np.indices(self.grid).reshape(2, -1).T + 1
        area, aspect = sides.prod(1) / np.prod(self.grid), sides[:, 0] / sides[:, 1]
        low, high = np.array([self.target_area, self.target_aspect]).T
        # How far outside, as a factor; 1 is inside.
        outside = [np.maximum(1, np.maximum(low[i] / x, x / high[i])) for i, x in enumerate((area, aspect))]
        inside = (outside[0] <= 1 + _SLACK) & (outside[1] <= 1 + _SLACK)
        if not inside.any():
            nearest = int((outside[0] * outside[1]).argmin())
            raise UsageError(
                f"target_area, target_aspect: no block of a {self._shape} grid has an area of {low[0]:g} to "
                f"{high[0]:g} and an aspect of {low[1]:g} to {high[1]:g}; the nearest is "
                f"{sides[nearest][0]} x {sides[nearest][1]}, area {area[nearest]:.3g}, "
                f"aspect {aspect[nearest]:.3g}"
            )
        x = np.stack([area, aspect], -1)[inside]
        return sides[inside], np.cumsum(_uncorrelated(_nearest(x, low, high), x))[:-1]

    @cached_property
    def _context_rectangles(self) -> tuple[np.ndarray, np.ndarray]:
        """As `_target_rectangles`, of the context block: the grid made smaller, to the nearest patch."""
        height, width = self.grid
        rows = np.arange(1, height + 1)
        sides = np.stack([rows, np.maximum(1, np.rint(rows * width / height)).astype(np.int64)], -1)
        area = sides.prod(1) / (height * width)
        low, high = self.context_area
        inside = (area >= low - _SLACK) & (area <= high + _SLACK)
        if not inside.any():
            nearest = np.maximum(low / area, area / high).argmin()
            raise UsageError(
                f"context_area: no block of the shape of a {self._shape} grid has an area of {low:g} to "
                f"{high:g}; the nearest is {sides[nearest][0]} x {sides[nearest][1]}, "
                f"area {area[nearest]:.3g}"
            )
        shares = _nearest(area[inside, None], np.array([low]), np.array([high]))
        return sides[inside], np.cumsum(shares)[:-1]


def _nearest(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Share of the box from `low` to `high` (D,) that is nearest to each point of `x` (R, D), the sides of
    the box being of equal length: (R,), its sum is 1."""
    middles = (np.arange(64) + 0.5) / 64
    box = np.stack(np.meshgrid(*[middles] * x.shape[1]), -1).reshape(-1, 1, x.shape[1])
    distance = (((x - low) / np.maximum(high - low, _SLACK) - box) ** 2).sum(-1)
    return np.bincount(distance.argmin(1), minlength=len(x)) / len(box)


def _uncorrelated(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Probabilities near `p` (R,) under which the columns of `x` (R, 2) are uncorrelated.

    They are p_i exp(t z_i), scaled to a sum of 1, z the product of the centered columns: larger t, larger
    covariance. Where no t changes its sign, as with one or two points, `p` itself.
    """
    z = np.prod(x - p @ x, axis=1)
    z /= max(np.abs(z).max(), _SLACK)

    def tilted(t: float) -> np.ndarray:
        q = p * np.exp(t * z)
        return q / q.sum()

    def covariance(t: float) -> float:
        q = tilted(t)
        return float(q @ np.prod(x - q @ x, axis=1))

    t, other = 0.0, -3.0 if covariance(0.0) > 0 else 3.0
    if covariance(0.0) * covariance(other) >= 0:
        return p
    for _ in range(60):
        middle = (t + other) / 2
        t, other = (middle, other) if covariance(middle) * covariance(other) < 0 else (t, middle)
    return tilted(t)
