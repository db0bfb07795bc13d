"""Times of the candidate tiles of each kernel: python bench/tiles_bench.py --out DIR

On a GPU at the sizes of the targets, on the CPU (`--rehearse`, with TRITON_INTERPRET=1) at a tiny one.
Appends the rows of `lejepa_fast.kernels.timing.time_candidates` to DIR/kernel_tiles.jsonl, kernel by
kernel, and prints for each its fastest tile beside the shipped one. The backward is timed both ways: in one
kernel (fused), and in two (gradient and product). Several processes compile the tiles before they are timed.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Sequence

import sigreg_variants as variants
import timing
import torch
from benchlib import Row, Rows, command_line, print_table
from sigreg_variants import Case, Size

import lejepa_fast.kernels.timing
import lejepa_fast.triton_operators
from lejepa_fast import sample_unit_directions

Timer = Callable[[Callable[[], None]], float]
CASES = {case.key: case for case in variants.GPU_CASES}
TINY = Case("tiny", Size(1, 20, 16, 16, 17), torch.float32, ())


def time_candidates(case: Case, device: torch.device, fused: bool, timer: Timer) -> list[Row]:
    (x,) = variants.make_inputs(case, 1, device)
    A, scale = sample_unit_directions(case.size.K, case.size.M, step=0, device=device, dtype=case.dtype)
    return lejepa_fast.kernels.timing.time_candidates(
        x.detach(),
        A,
        scale if case.half else None,
        J=case.size.J,
        t_max=variants.T_MAX,
        precision=lejepa_fast.triton_operators.default_precision(device),
        fused=fused,
        timer=timer,
    )


def compile_ahead(*job: object) -> None:
    """Run every candidate once, from several processes: Triton keeps what they compile on disk."""
    count = min(8, os.cpu_count() or 1)
    try:
        with timing.fresh_processes(count) as pool:
            list(pool.map(_compile_share, *zip(*((*job, k, count) for k in range(count)), strict=True)))
    except Exception as failure:  # the timing shows which tile it was
        print(f"not all tiles are compiled ahead: {failure!r}", flush=True)


def _compile_share(case: Case, device: torch.device, fused: bool, index: int, count: int) -> None:
    calls = itertools.count(index)

    def timer(call: Callable[[], None]) -> float:
        if next(calls) % count:
            raise RuntimeError("another process compiles it")  # taken as a tile that cannot run
        call()
        return 1.0

    time_candidates(case, device, fused, timer)


def show(rows: Sequence[Row]) -> None:
    table = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        tried = [row for row in rows if row["kernel"] == kernel]
        timed = sorted((row for row in tried if row["seconds"] is not None), key=lambda row: row["seconds"])
        best = [" ".join(f"{k} {v}" for k, v in row["tile"].items()) for row in timed[:1]] or ["none runs"]
        best += [f"{1e6 * row['seconds']:.1f}" for row in timed[:1]] or ["-"]
        shipped = [f"{1e6 * row['seconds']:.1f}" for row in timed if row["shipped"]] or ["does not run"]
        table.append([kernel, *best, *shipped, f"{len(timed)} of {len(tried)}"])
    print_table(["kernel", "fastest tile", "us", "shipped us", "ran"], table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, rehearse="a tiny size on the CPU")
    parser.add_argument("--sizes", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    options = parser.parse_args(arguments)
    device, timer, cases = torch.device("cpu"), timing.once, [TINY]
    if not options.rehearse:
        if not torch.cuda.is_available():
            parser.error("expected a GPU, PyTorch finds none; --rehearse runs on the CPU")
        device, cases = torch.device("cuda", torch.cuda.current_device()), [CASES[k] for k in options.sizes]
        clock = timing.GpuClock(device)
        timer = lambda call: statistics.median([clock(call) for _ in range(6)][1:])  # noqa: E731

    path = options.out / "kernel_tiles.jsonl"
    for case in cases:
        print(f"\n{case.key}: {case.size}", flush=True)
        rows: list[Row] = []
        # The backward in one kernel only where dx may fit: else the compilation takes minutes.
        largest = 512 if case.half else 64
        for fused in (False, True) if largest >= case.size.K else (False,):
            if not options.rehearse:
                compile_ahead(case, device, fused)
            found = time_candidates(case, device, fused, timer)
            fresh = [row for row in found if row["kernel"] != "forward" or not rows]
            rows += Rows(path, "kernel_tiles", device, rehearsal=options.rehearse).write(*fresh)
        show(rows)


if __name__ == "__main__":
    main()
