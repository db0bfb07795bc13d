"""The contract between the loader and a backend, which makes the pixels."""

import ctypes
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.errors import UsageError


class RawBatch(NamedTuple):
    """Pixels and labels before normalization."""

    views: list[Tensor]
    """V tensors (B, 3, S, S) uint8 of any memory layout, on the CPU (possibly pinned) or the GPU."""
    targets: Tensor
    """(B,) int64 on the CPU, -1 where unlabeled."""

    def rows(self, kept: Sequence[int]) -> "RawBatch":
        """The batch with these rows only."""
        if len(kept) == len(self.targets):
            return self
        return RawBatch([view[list(kept)] for view in self.views], self.targets[list(kept)])


@dataclass(frozen=True)
class Loading:
    """How batches are made, whatever is in them. The fields are arguments of `multicrop_loader`."""

    batch_size: int
    num_workers: int = 0
    device: torch.device | None = None
    prefetch: int = 2
    hw_decoder_load: float = 0.65

    def __post_init__(self) -> None:
        for name, smallest in (("batch_size", 1), ("num_workers", 0), ("prefetch", 1)):
            value = getattr(self, name)
            if not isinstance(value, Integral):
                raise UsageError(f"{name}: expected a whole number, got {value!r}")
            if value < smallest:
                raise UsageError(f"{name}: expected at least {smallest}, got {value}")
            object.__setattr__(self, name, int(value))  # NumPy's numbers overflow, and do not fit JSON
        if not 0.0 <= self.hw_decoder_load <= 1.0:
            raise UsageError(f"hw_decoder_load: expected a number in [0, 1], got {self.hw_decoder_load}")

    @property
    def on_gpu(self) -> bool:
        """Whether batches go to a GPU."""
        return self.device is not None and self.device.type == "cuda"


class Backend(Protocol):
    """Makes the pixels. The loader decides which images make up which batch, and normalizes."""

    name: str

    def batches(self, keys: Iterable[BatchKey], bad: BadImages) -> Generator[RawBatch]:
        """Yield one batch per key, in order.

        A bad image is added to `bad`, and its first usable substitute takes its place (`Views.substitute`);
        where there is none the batch is shorter. Before the next call this pass has ended or is closed.
        """


def give_memory_back() -> None:
    """Return freed memory to the system, where the C library can (glibc). Takes a few milliseconds.

    Batches of a few MB, made in one thread and freed in another, leave gaps in the heap. glibc does not reuse
    all of them, so resident memory would grow over the epochs.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
