"""Which images make up which batch: a function of (seed, epoch) and the GLOBAL batch only.

One permutation per epoch is cut into global batches of `batch_size * world_size` images, and rank r
takes the r-th slice of each. So the images of step s are the same for every world size that divides
the global batch, every rank has the same number of batches (a shorter last one is dropped), and a
position in the epoch is one number that holds on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lejepa_fast.data.draws import ORDER, permutation
from lejepa_fast.errors import UsageError


@dataclass(frozen=True)
class BatchKey:
    """Names one batch of one rank: all that a worker needs to make it.

    bad: those of `indices` that are known to be bad, so that nobody tries them.
    """

    epoch: int
    indices: tuple[int, ...]
    bad: tuple[int, ...] = ()


@dataclass(frozen=True)
class EpochSchedule:
    """Batches of one rank. `batch_size` is per rank; `num_images` is the size of the data set."""

    num_images: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; got {self.batch_size}")
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"rank must be in 0 .. world_size - 1; got rank {self.rank}, world_size {self.world_size}"
            )
        if self.num_images < self.global_batch:
            largest = self.num_images // self.world_size
            ranks = "" if self.world_size == 1 else f" on each of {self.world_size} ranks"
            way_out = (
                f"use a batch size of at most {largest}, or more images"
                if largest
                else "use fewer ranks, or more images"
            )
            raise UsageError(
                f"the data set has {self.num_images} images, fewer than one batch of "
                f"{self.batch_size}{ranks}; {way_out}"
            )

    @property
    def global_batch(self) -> int:
        """Images per step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.num_images // self.global_batch

    def keys(self, epoch: int, start: int = 0) -> Iterator[BatchKey]:
        """This rank's batches of `epoch` from batch number `start` on."""
        order = self.order(epoch)
        for batch in range(start, len(self)):
            first = batch * self.global_batch + self.rank * self.batch_size
            yield BatchKey(epoch, tuple(order[first : first + self.batch_size].tolist()))

    def places(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(this rank's images in their order, the images that no batch of `epoch` holds as it takes them)."""
        return self.part().places(self.order(epoch), self.rank)

    def part(self, first: int = 0, last: int | None = None) -> Part:
        """Batches `first` to `last - 1` (None: all) of an epoch, as these ranks take them."""
        return Part(self.world_size, self.batch_size, first, len(self) if last is None else last)

    def order(self, epoch: int) -> np.ndarray:
        """All images, batch after batch of all ranks, and those that no batch holds at the end."""
        if self.shuffle:
            return permutation(self.seed, ORDER, epoch, 0, self.num_images)
        return np.arange(self.num_images)


class Part(NamedTuple):
    """Batches `first` to `last - 1` of an epoch, on so many ranks with so many images each."""

    world_size: int
    batch_size: int
    first: int
    last: int

    def places(self, order: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(the images of `rank` in the whole epoch, the images that no batch holds as that rank takes them).

        No rank knows how many of the latter another one needs. So each begins with a share of its own, goes
        on at the far ends of the others' shares, first where no third rank does, and at last takes them all.
        One rank or two thus take none twice before all are used up; among more, that could not be promised.
        """
        batches = len(order) // (self.world_size * self.batch_size)
        whole = batches * self.world_size * self.batch_size
        own = order[:whole].reshape(batches, self.world_size, self.batch_size)[:, rank].reshape(-1)
        spare = order[whole:]
        number = np.arange(len(spare))
        owner, from_end = number % self.world_size, (len(spare) - 1 - number) // self.world_size
        heir = (owner + 1 + from_end % max(1, self.world_size - 1)) % self.world_size
        mine, inherited = owner == rank, (heir == rank) & (owner != rank)
        rest = ~(mine | inherited)
        return own, np.concatenate([spare[mine], spare[inherited][::-1], spare[rest][::-1]])
