"""Tiles chosen by timing on the device, opt-in by LEJEPA_AUTOTUNE=1; unset, empty or 0 is off.

The first launch of a kernel for a (device, dtypes, K, M, knots, power of two of rows, variant) times the
candidates of its configuration, the shipped tile first, and the process keeps the fastest. Candidates that
cannot run are skipped.

- Timing synchronises with the device, so nothing is timed while a CUDA graph is captured: an untimed launch
  takes the shipped tile there. Run once before capturing, as graphs require anyway.
- A tile fixes the order in which numbers are added. Results are bitwise reproducible within a process once a
  choice is made; another process may choose another tile and differ in the last bits.
- No tensor's size depends on a tile (`count_splits`), so fake implementations need not know the choice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from .configs import Config, Tile
from .table import Plan

Timer = Callable[[Callable[[], None]], float]
Launch = Callable[[Tile], None]

_REPEATS = 10
# Too large for the device or its memory, or the compiler fails, whose passes raise RuntimeError.
CANNOT_RUN = (TritonError, RuntimeError)
# Errors of PyTorch or Triton after which no later launch on the device works.
_BROKEN = ("illegal memory access", "misaligned address", "unspecified launch failure", "illegal instruction",
           "device-side assert", "HIP error")  # fmt: skip
_chosen: dict[Hashable, Tile] = {}
collected: list[dict[str, Any]] | None = None  # of `collecting`


class Problem(NamedTuple):
    """What a choice depends on besides the kernel and its configuration."""

    x: Tensor
    A: Tensor
    plan: Plan
    variant: tuple[Hashable, ...]  # what else the compiler sees: precision, and of which gradient

    def key(self) -> Hashable:
        (views, N, K), M = self.x.shape, self.A.shape[1]
        rows = (views * N).bit_length()
        knots = self.plan.J, self.plan.equidistant
        return self.x.device, self.x.dtype, self.A.dtype, K, M, knots, rows, self.variant


def enabled() -> bool:
    """Whether LEJEPA_AUTOTUNE is 1. Raises ValueError for anything but 0 and 1."""
    value = os.environ.get("LEJEPA_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"LEJEPA_AUTOTUNE: expected 0 or 1 in the environment, got {value!r}")
    return value == "1"


def choose(config: Config, kernel: str, problem: Problem, launch: Launch) -> Tile:
    """The tile to launch a kernel with; `launch` may be called several times, with any candidate."""
    shipped = config.tile(kernel, problem.x.shape[2])
    if collected is not None:
        timed = [row for row in collected if row["kernel"] == kernel]  # from an earlier chunk
        if not timed:
            timed = _time_all(config, kernel, problem, launch)
            collected.extend(timed)
        return shipped if timed[0]["error"] is None else _fastest(timed)
    if enabled():
        key = (kernel, tuple(config.candidates(kernel, problem.x.shape[2])), problem.key())
        if key in _chosen:
            return _chosen[key]
        if not _capturing(problem.x):
            return _chosen.setdefault(key, _fastest(_time_all(config, kernel, problem, launch)))
    return shipped


def _fastest(timed: list[dict[str, Any]]) -> Tile:
    """The fastest tile; the shipped one if none can run, whose launch then raises the reason."""
    able = [row for row in timed if row["error"] is None]
    return Tile(**(min(able, key=lambda row: row["seconds"]) if able else timed[0])["tile"])


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _time_all(config: Config, kernel: str, problem: Problem, launch: Launch) -> list[dict[str, Any]]:
    (V, N, K), M = problem.x.shape, problem.A.shape[1]
    size = {"V": V, "N": N, "K": K, "M": M, "J": problem.plan.J, "dtype": str(problem.x.dtype)[6:]}
    rows: list[dict[str, Any]] = []
    for tile in config.candidates(kernel, K):
        seconds, error = None, None
        try:
            seconds = measure(lambda tile=tile: launch(tile), problem.x)  # type: ignore[misc]
        except CANNOT_RUN as failure:
            if any(reason in str(failure) for reason in _BROKEN):
                raise
            error = f"{type(failure).__name__}: {failure}"
        row = {"tile": tile._asdict(), "shipped": not rows, "seconds": seconds, "error": error}
        rows.append({"kernel": kernel, **size, **row})
    return rows


def measure(call: Callable[[], None], x: Tensor) -> float:
    """Seconds of a call on the device of x, the current one, after one call that compiles."""
    call()
    if not x.is_cuda:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(_REPEATS):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / _REPEATS


@contextmanager
def collecting(timer: Timer | None) -> Iterator[list[dict[str, Any]]]:
    """In the block `choose` times every kernel once, by `timer`; the rows are added to the yielded list."""
    global collected, measure
    before, collected = measure, []
    if timer is not None:
        measure = lambda call, x: timer(call)  # noqa: E731
    try:
        yield collected
    finally:
        measure, collected = before, None
