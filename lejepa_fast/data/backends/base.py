"""The contract between the loader and a backend, which makes the pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.errors import RunError


class RawBatch(NamedTuple):
    """Pixels and labels before normalisation."""

    views: list[Tensor]
    """V tensors (B, 3, S, S) uint8 of any memory layout, on the CPU (possibly pinned) or the GPU."""
    targets: Tensor
    """(B,) int64 on the CPU, -1 where unlabelled."""

    def rows(self, kept: Sequence[int]) -> RawBatch:
        """The batch with these rows only."""
        if len(kept) == len(self.targets):
            return self
        return RawBatch([view[list(kept)] for view in self.views], self.targets[list(kept)])


class Backend(Protocol):
    """Makes the pixels. The loader decides which images make up which batch, and normalises."""

    name: str

    def batches(self, keys: Iterable[BatchKey], bad: BadImages) -> Iterator[RawBatch]:
        """Yield one batch per key, in order.

        A bad image is added to `bad`, and its first usable substitute takes its place (`Views.substitute`);
        where there is none the batch is shorter. A new call ends the pass of the call before: that one
        raises `another_pass()`.
        """
        ...


def another_pass() -> RunError:
    """The error of a pass that a newer one has ended."""
    return RunError("another pass over the same loader has begun; make a loader for each")
