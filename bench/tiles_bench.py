"""Times of the candidate tiles of each kernel: python bench/tiles_bench.py --out DIR

On a GPU at the sizes of the targets, on the CPU (`--rehearse`, with TRITON_INTERPRET=1) at a tiny one.
Appends the rows of `lejepa_fast.kernels.timing.time_candidates` to DIR/kernel_tiles.jsonl, kernel by
kernel, and prints for each its fastest tile beside the shipped one. The backward is timed both ways: in one
kernel (fused), and in two (gradient and product). Several processes compile the tiles before they are timed.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import sigreg_variants as variants
import timing
import torch
from benchlib import Row, Rows, command_line, print_table
from sigreg_variants import GIANT, MINIMAL, REFERENCE, Size

import lejepa_fast.kernels.timing
import lejepa_fast.triton_operators
from lejepa_fast import sample_unit_directions

Timer = Callable[[Callable[[], None]], float]
SIZES = {
    "reference-bfloat16": (REFERENCE, torch.bfloat16),
    "minimal-float32": (MINIMAL, torch.float32),
    "reference-float32": (REFERENCE, torch.float32),
    "giant-bfloat16": (GIANT, torch.bfloat16),
}
TINY = (Size(1, 20, 16, 16, 17), torch.float32)


def ways(size: Size, dtype: torch.dtype) -> tuple[bool, ...]:
    """Whether the backward is fused: both ways where dx may fit, else the compilation takes minutes."""
    largest = 512 if dtype.itemsize == 2 else 64
    return (False, True) if largest >= size.K else (False,)


def time_candidates(
    size: Size, dtype: torch.dtype, device: torch.device, fused: bool, timer: Timer
) -> list[Row]:
    case = variants.Case("tiles", size, dtype, ())
    (x,) = variants.make_inputs(case, 1, device)
    A, scale = sample_unit_directions(size.K, size.M, step=0, device=device, dtype=dtype)
    options: dict[str, Any] = {"J": size.J, "t_max": variants.T_MAX, "timer": timer, "fused": fused}
    options["precision"] = lejepa_fast.triton_operators.default_precision(device)
    scaled = scale if dtype.itemsize == 2 else None
    return lejepa_fast.kernels.timing.time_candidates(x.detach(), A, scaled, **options)


def compile_ahead(*job: Any) -> None:
    """Run every candidate once, from several processes: Triton keeps what they compile on disk."""
    count = min(8, os.cpu_count() or 1)
    try:
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_compile_share, *zip(*((*job, k, count) for k in range(count)), strict=True)))
    except Exception as failure:  # the timing shows which tile it was
        print(f"not all tiles are compiled ahead: {failure!r}", flush=True)


def _compile_share(
    size: Size, dtype: torch.dtype, device: torch.device, fused: bool, index: int, count: int
) -> None:
    calls = itertools.count(index)

    def timer(call: Callable[[], None]) -> float:
        if next(calls) % count:
            raise RuntimeError("another process compiles it")  # taken as a tile that cannot run
        call()
        return 1.0

    time_candidates(size, dtype, device, fused, timer)


def show(rows: Sequence[Row]) -> None:
    table = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        tried = [row for row in rows if row["kernel"] == kernel]
        timed = [row for row in tried if row["seconds"] is not None]
        best = min(timed, key=lambda row: row["seconds"], default=None)
        shipped = next((row for row in timed if row["shipped"]), None)
        cells = ["none runs", "-"]
        if best:
            cells = [" ".join(f"{k} {v}" for k, v in best["tile"].items()), f"{1e6 * best['seconds']:.1f}"]
        cells.append(f"{1e6 * shipped['seconds']:.1f}" if shipped else "does not run")
        table.append([kernel, *cells, f"{len(timed)} of {len(tried)}"])
    print_table(["kernel", "fastest tile", "us", "shipped us", "ran"], table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, rehearse="a tiny size on the CPU")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("expected a GPU, PyTorch finds none; --rehearse runs on the CPU")
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    timer: Timer = timing.once
    if not options.rehearse:
        clock = timing.GpuClock(device)
        timer = lambda call: statistics.median([clock(call) for _ in range(6)][1:])  # noqa: E731

    path = options.out / "kernel_tiles.jsonl"
    for size, dtype in [TINY] if options.rehearse else [SIZES[name] for name in options.sizes]:
        print(f"\n{size}, {variants.dtype_name(dtype)}", flush=True)
        rows: list[Row] = []
        for fused in ways(size, dtype):
            if not options.rehearse:
                compile_ahead(size, dtype, device, fused)
            found = time_candidates(size, dtype, device, fused, timer)
            fresh = [row for row in found if row["kernel"] != "forward" or not rows]
            rows += Rows(path, "kernel_tiles", device, rehearsal=options.rehearse).write(*fresh)
        show(rows)


if __name__ == "__main__":
    main()
