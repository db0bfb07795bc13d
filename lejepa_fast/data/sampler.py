"""Which images make up which batch: a function of (seed, epoch) and the global batch only.

One permutation per epoch is cut into global batches of `batch_size * world_size` images, and rank r takes the
r-th slice of each. So the images of step s are the same for every world size that divides the global batch,
every rank has the same number of batches (a shorter last one is dropped), and the position in an epoch is one
number, the images consumed, on any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lejepa_fast.data.draws import ORDER, permutation
from lejepa_fast.errors import UsageError


@dataclass(frozen=True)
class BatchKey:
    """One batch of one rank: its epoch and the numbers of its images."""

    epoch: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class EpochSchedule:
    """The batches of one rank.

    Raises:
        UsageError: `rank` is not one of `world_size`, or there are fewer images than one global batch.
    """

    num_images: int
    """Images in the data set."""
    batch_size: int
    """Images per step of one rank."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            got = f"{self.rank} and {self.world_size}"
            raise UsageError(f"rank, world_size: expected a rank from 0 to world_size - 1, got {got}")
        if self.num_images < self.global_batch:
            largest = self.num_images // self.world_size
            ranks = "" if self.world_size == 1 else f" on each of {self.world_size} ranks"
            way_out = f"use a batch size of at most {largest}" if largest else "use fewer ranks"
            raise UsageError(
                f"the data set has {self.num_images} images, fewer than one batch of "
                f"{self.batch_size}{ranks}; {way_out}, or more images"
            )

    @property
    def global_batch(self) -> int:
        """Images per step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.num_images // self.global_batch

    def keys(self, epoch: int, start: int) -> Iterator[BatchKey]:
        """This rank's batches of `epoch` from batch number `start` on."""
        order = np.arange(self.num_images)
        if self.shuffle:
            order = permutation(self.seed, ORDER, epoch, 0, self.num_images)
        for batch in range(start, len(self)):
            first = batch * self.global_batch + self.rank * self.batch_size
            yield BatchKey(epoch, tuple(order[first : first + self.batch_size].tolist()))
