"""What a backend is: the contract between the loader and whatever makes the pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from lejepa_fast.data.sampler import BatchKey

# Why an image that is known to be bad cannot be used.
LISTED = "listed in the quarantine"


# Why a pass cannot go on: a backend makes one at a time.
ANOTHER_PASS = "another pass over the same loader has begun; make a loader for each"


@dataclass(frozen=True)
class Fault:
    """A row of a batch whose image cannot be used."""

    row: int
    index: int
    reason: str


class RawBatch(NamedTuple):
    """What a backend hands to the loader: uint8 pixels and labels, on the CPU (possibly pinned) or the GPU.

    views: V tensors (B, 3, S, S) uint8, of any memory layout; targets: (B,) int64 on the CPU, -1 where
    unlabelled; epoch: of the images; faults: rows to be replaced, none in what the loader gets.
    """

    views: list[Tensor]
    targets: Tensor
    epoch: int = 0
    faults: tuple[Fault, ...] = ()


class FaultHandler(Protocol):
    """Decides what takes the place of a bad image. Asked in the order of the places in the epoch."""

    position: int
    """How many substitutes are used up; set back by a backend that makes batches again."""
    known: set[int]
    """Images that are known to be bad: to be reported with the reason `LISTED`, not to be read."""

    def replace(self, index: int, reason: str) -> int | None:
        """Note that image `index` is bad; the number of the image that comes in, None for none."""
        ...


class Backend(Protocol):
    """Makes the pixels. The loader decides which images make up which batch, and normalises."""

    name: str

    def batches(self, keys: Iterable[BatchKey], faults: FaultHandler) -> Iterator[RawBatch]:
        """One uint8 batch per key, in order. A pass that was begun before ends: it raises `RunError`."""
        ...
