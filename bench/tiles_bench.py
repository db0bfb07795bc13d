"""Times of the candidate tiles of each kernel: python bench/tiles_bench.py --out DIR

On a GPU at the sizes of the targets, on the CPU (`--rehearse`, with TRITON_INTERPRET=1) at a tiny one.
Appends the rows of `lejepa_fast.kernels.timing.time_candidates` to DIR/kernel_tiles.jsonl, kernel by
kernel, and prints for each its fastest tile beside the shipped one: candidates for `kernels/configs.py`. The
backward is timed both ways: in one kernel (fused), and in two (gradient and product). Tiles are compiled by
several processes before they are timed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gpu_timing
import sigreg_variants as variants
import torch
from benchlib import RESULTS, Timed, append_rows, machine, print_table
from sigreg_variants import GIANT, MINIMAL, REFERENCE, Size

from lejepa_fast import sample_unit_directions, triton_operators
from lejepa_fast.kernels import autotune, timing

Row = dict[str, Any]
Save = Callable[[Sequence[Row]], None]
Timer = Callable[[Callable[[], None]], float]
SIZES = {
    "reference-bfloat16": (REFERENCE, torch.bfloat16),
    "minimal-float32": (MINIMAL, torch.float32),
    "reference-float32": (REFERENCE, torch.float32),
    "giant-bfloat16": (GIANT, torch.bfloat16),
}
TINY = {"tiny-float32": (Size(1, 20, 16, 16, 17), torch.float32)}
FUSED_MAX_DIM = 512  # beyond it, and in float32, dx is far from fitting: minutes of compilation for nothing


def gpu_timer(device: torch.device, repeats: int = 5) -> Timer:
    """Seconds that a call takes on the device: the median, caches flushed before each."""
    clock = gpu_timing.GpuClock(device)

    def timer(call: Callable[[], None]) -> float:
        timed = Timed(lambda repeat: None, lambda _, between: call())
        clock.once(timed, 0)
        return statistics.median(clock.once(timed, repeat)[2] for repeat in range(repeats))

    return timer


def time_once(
    size: Size, dtype: torch.dtype, device: torch.device, timer: Timer, **options: Any
) -> list[Row]:
    case = variants.Case("tiles", size, dtype, "given", ())
    (x,) = variants.make_inputs(case, 1, device)
    A, scale = sample_unit_directions(size.K, size.M, step=0, device=device, dtype=dtype)
    return timing.time_candidates(
        x,
        A,
        scale if dtype.itemsize == 2 else None,
        J=size.J,
        t_max=variants.T_MAX,
        precision=triton_operators.default_precision(device),
        timer=timer,
        **options,
    )


def measure(
    size: Size, dtype: torch.dtype, device: torch.device, timer: Timer, save: Save, **options: Any
) -> list[Row]:
    """The rows of all candidates, handed to `save` as soon as a kernel is done."""
    saved = 0

    def saving_timer(call: Callable[[], None]) -> float:
        nonlocal saved
        done = autotune.collected or []  # of the kernels before this one
        if len(done) > saved:
            save(done[saved:])
            saved = len(done)
        return timer(call)

    rows = time_once(size, dtype, device, saving_timer, **options)
    save(rows[saved:])
    return rows


def measure_both_ways(
    size: Size, dtype: torch.dtype, device: torch.device, timer: Timer, save: Save
) -> list[Row]:
    """The backward as it is by default, and in two kernels where that is one or the other way round."""
    rows = measure(size, dtype, device, timer, save)
    fused = all(row["kernel"] != "fused" for row in rows)
    if fused and not worth_fusing(size, dtype):
        return rows

    def others(rows: Sequence[Row]) -> list[Row]:
        return [{**row, "shipped": False} for row in rows if row["kernel"] != "forward"]

    return rows + others(measure(size, dtype, device, timer, lambda rows: save(others(rows)), fused=fused))


def worth_fusing(size: Size, dtype: torch.dtype) -> bool:
    return size.K <= FUSED_MAX_DIM and (dtype.itemsize == 2 or size.K <= 64)


def compile_ahead(size: Size, dtype: torch.dtype, device: torch.device) -> None:
    """Run every candidate once, from several processes: Triton keeps what they compile on disk."""
    count = min(8, os.cpu_count() or 1)
    ways = (False, True) if worth_fusing(size, dtype) else (False,)
    jobs = [(size, dtype, device, fused, k, count) for fused in ways for k in range(count)]
    try:
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_compile_share, *zip(*jobs, strict=True)))
    except Exception as failure:  # the timing says which tile it was
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

    time_once(size, dtype, device, timer, fused=fused)


def show(rows: Sequence[Row]) -> None:
    table = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        timed = [row for row in rows if row["kernel"] == kernel and row["seconds"] is not None]
        shipped = next((row for row in timed if row["shipped"]), None)
        if not timed:
            table.append([kernel, "-", "-", "-", "none runs"])
            continue
        best = min(timed, key=lambda row: row["seconds"])
        cells = [kernel, tile_name(best), f"{1e6 * best['seconds']:.1f}"]
        missing = "does not run" if any(row["shipped"] for row in rows if row["kernel"] == kernel) else "-"
        cells.append(f"{1e6 * shipped['seconds']:.1f}" if shipped else missing)
        table.append([*cells, f"{len(timed)} of {sum(row['kernel'] == kernel for row in rows)}"])
    print_table(["kernel", "fastest tile", "us", "shipped us", "ran"], table)


def tile_name(row: Row) -> str:
    """`block_m x block_n x block_k`, then what else there is to a tile."""
    tile = dict(row["tile"])
    blocks = "x".join(str(tile.pop(f"block_{axis}")) for axis in "mnk")
    return " ".join([blocks, *(f"{name} {value}" for name, value in tile.items())])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for kernel_tiles.jsonl")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--rehearse", action="store_true", help="a tiny size on the CPU")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("expected a GPU, PyTorch finds none; --rehearse runs on the CPU")
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    timer = _host_timer if options.rehearse else gpu_timer(device)
    marks = {"rehearsal": True} if options.rehearse else {}
    about = {"benchmark": "kernel_tiles", **marks, **machine(device)}

    def save(rows: Sequence[Row]) -> None:
        append_rows(options.out / "kernel_tiles.jsonl", [{**row, **about} for row in rows])

    for size, dtype in TINY.values() if options.rehearse else [SIZES[name] for name in options.sizes]:
        print(f"\n{size}, {variants.dtype_name(dtype)}", flush=True)
        if not options.rehearse:
            compile_ahead(size, dtype, device)
        show(measure_both_ways(size, dtype, device, timer, save))


def _host_timer(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
