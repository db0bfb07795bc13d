"""Tiles chosen by timing on the device, opt-in by LEJEPA_AUTOTUNE=1; unset, empty or 0 is off.

The first launch of a kernel for a (device, dtypes, K, M, knots, power of two of rows, variant) times the
candidates of its configuration, and the process keeps the fastest. Candidates that cannot run are skipped.

- Timing synchronizes with the device, so nothing is timed while a CUDA graph is captured: an untimed launch
  takes the shipped tile there. Run once before capturing, as graphs require anyway.
- A tile fixes the order in which numbers are added. Results are bitwise reproducible within a process once a
  choice is made; another process may choose another tile and differ in the last bits.
- No tensor's size depends on a tile (`count_splits`), so fake implementations need not know the choice.
"""

import os
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from .configs import Config, Tile
from .table import Plan

_REPEATS = 10
# Too large for the device or its memory, or the compiler fails, whose passes raise RuntimeError.
CANNOT_RUN = (TritonError, RuntimeError)


def measure(call: Callable[[], None]) -> float:
    """Seconds of a call, after one that compiles."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()
    synchronize()
    start = time.perf_counter()
    for _ in range(_REPEATS):
        call()
    synchronize()
    return (time.perf_counter() - start) / _REPEATS


class Tuner:
    """Fastest tiles by problem.

    Args:
        timer: seconds that its argument, a call, takes.
    """

    def __init__(self, timer: Callable[[Callable[[], None]], float] = measure):
        self.timer = timer
        self.chosen: dict[Hashable, Tile] = {}
        self.rows: list[dict[str, Any]] = []
        """{"kernel", "tile", "shipped", "seconds", "error"} of every timing."""

    def time(self, kernel: str, tiles: list[Tile], launch: Callable[[Tile], None]) -> Tile:
        """The fastest of `tiles`; the first if none can run, whose launch then raises the reason."""
        able: dict[Tile, float] = {}
        for tile in tiles:
            error = None
            try:
                able[tile] = self.timer(lambda tile=tile: launch(tile))  # type: ignore[misc]
            except CANNOT_RUN as failure:
                error = f"{type(failure).__name__}: {failure}"
            row = {"kernel": kernel, "tile": tile._asdict(), "shipped": tile == tiles[0]}
            self.rows.append({**row, "seconds": able.get(tile), "error": error})
        return min(able, key=able.__getitem__, default=tiles[0])


process_tuner = Tuner()


def launch_best(
    launch: Callable[[Tile], None],
    kernel: str,
    config: Config,
    x: Tensor,
    A: Tensor,
    plan: Plan,
    *variant: Hashable,
) -> None:
    """Launch a kernel with the tile of `config`, or with the fastest candidate where autotuning is on.

    Args:
        launch: launches the kernel with any tile; called several times to time it.
        kernel: "forward", "gradient", "product" or "fused".
        config, x, A, plan: as for `forward.table_sums`.
        variant: what else the compiler sees.

    Raises:
        ValueError: LEJEPA_AUTOTUNE is neither 0 nor 1.
    """
    value = os.environ.get("LEJEPA_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"LEJEPA_AUTOTUNE: expected 0 or 1 in the environment, got {value!r}")
    tile = config.tile(kernel, x.shape[2])
    if value == "1":
        tiles, chosen = config.candidates(kernel, x.shape[2]), process_tuner.chosen
        rows = (x.shape[0] * x.shape[1]).bit_length()
        key = (kernel, *tiles, x.device, x.dtype, A.dtype, A.shape, plan.J, plan.equidistant, rows, *variant)
        if key not in chosen and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            chosen[key] = process_tuner.time(kernel, tiles, launch)
        tile = chosen.get(key, tile)
    launch(tile)
