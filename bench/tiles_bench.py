"""Times of the candidate tiles of each kernel: python bench/tiles_bench.py --out DIR

On a GPU at the sizes of the targets, on the CPU (`--rehearse`, with TRITON_INTERPRET=1) at a tiny one.
Appends the rows of `lejepa_fast.kernels.autotune.time_candidates` to DIR/kernel_tiles.jsonl, size by size,
and prints for each kernel its fastest tile beside the shipped one: candidates for `kernels/configs.py`. The
backward is timed both ways: in one kernel (fused), and in two (gradient and product).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_timing
import sigreg_variants as variants
import torch
from benchlib import RESULTS, Timed, append_rows, machine, print_table
from sigreg_variants import GIANT, MINIMAL, REFERENCE, Size

from lejepa_fast import sample_unit_directions, triton_ops
from lejepa_fast.kernels import autotune

Row = dict[str, Any]
SIZES = (
    (REFERENCE, torch.bfloat16),
    (MINIMAL, torch.float32),
    (REFERENCE, torch.float32),
    (GIANT, torch.bfloat16),
)
TINY = ((Size(1, 20, 16, 16, 17), torch.float32),)


def gpu_timer(device: torch.device, repeats: int = 5) -> Callable[[Callable[[], None]], float]:
    """Seconds that a call takes on the device: the median, caches flushed before each."""
    clock = gpu_timing.GpuClock(device)

    def timer(call: Callable[[], None]) -> float:
        timed = Timed(lambda repeat: None, lambda _, between: call())
        clock.once(timed, 0)
        return statistics.median(clock.once(timed, repeat)[2] for repeat in range(repeats))

    return timer


def measure(size: Size, dtype: torch.dtype, device: torch.device, **options: Any) -> list[Row]:
    case = variants.Case("tiles", size, dtype, "given", ())
    (x,) = variants.make_inputs(case, 1, device)
    A, scale = sample_unit_directions(size.K, size.M, step=0, device=device, dtype=dtype)
    return autotune.time_candidates(
        x,
        A,
        scale if dtype.itemsize == 2 else None,
        J=size.J,
        t_max=variants.T_MAX,
        precision=triton_ops.default_precision(device),
        **options,
    )


def measure_other_way(
    size: Size, dtype: torch.dtype, device: torch.device, rows: Sequence[Row], **options: Any
) -> list[Row]:
    """The backward in two kernels where it is one by default, and the other way round."""
    fused = all(row["kernel"] != "fused" for row in rows)
    timed = measure(size, dtype, device, fused=fused, **options)
    return [{**row, "shipped": False} for row in timed if row["kernel"] != "forward"]


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
    parser.add_argument("--rehearse", action="store_true", help="a tiny size on the CPU")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("expected a GPU, PyTorch finds none; --rehearse runs on the CPU")
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    timing = {} if options.rehearse else {"timer": gpu_timer(device)}
    marks = {"rehearsal": True} if options.rehearse else {}
    for size, dtype in TINY if options.rehearse else SIZES:
        rows = measure(size, dtype, device, **timing)
        other = measure_other_way(size, dtype, device, rows, **timing)
        rows += other
        about = {"benchmark": "kernel_tiles", **marks, **machine(device)}
        append_rows(options.out / "kernel_tiles.jsonl", [{**row, **about} for row in rows])
        print(f"\n{size}, {variants.dtype_name(dtype)}", flush=True)
        show(rows)


if __name__ == "__main__":
    main()
