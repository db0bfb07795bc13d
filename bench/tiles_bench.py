"""Times of the candidate tiles of each kernel: python bench/tiles_bench.py --out DIR

On a GPU at the sizes of the targets, on the CPU (`--rehearse`, with TRITON_INTERPRET=1) at a tiny one.
Appends a row for each candidate to DIR/kernel_tiles.jsonl, and prints for each kernel its fastest tile beside
the shipped one. The backward is timed both ways: in one kernel (fused), and in two (gradient and product, of
the first chunk of samples). Several processes compile the tiles before they are timed.
"""

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import sigreg_variants as variants
import timing
import torch
from benchlib import Row, Rows, command_line, print_table
from sigreg_variants import Case, Size

from lejepa_fast import sample_unit_directions, standard_normal_knots, triton_operators
from lejepa_fast.kernels import autotune, backward, epilogue, forward
from lejepa_fast.kernels.configs import ANY
from lejepa_fast.kernels.table import make_plan

Timer = Callable[[Callable[[], None]], float]
CASES = {case.key: case for case in variants.GPU_CASES}
FIRST = ("reference-bfloat16", "giant-bfloat16")
"""Sizes that `gpu_check.py` times before it does anything else."""
TINY = Case("tiny", Size(1, 9, 8, 8, 5), torch.float32, ())


def time_candidates(
    case: Case,
    device: torch.device,
    fused: bool,
    timer: Timer,
    write: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """Time the candidate tiles of one forward and backward pass.

    Args:
        case: size and dtype.
        device: where the kernels run.
        fused: True times the fused backward, for any K and M; False gradient and product.
        timer: seconds that its argument, a call, takes.
        write: gets each row before the next candidate is timed.

    Returns:
        Rows of "kernel", size, "tile", "shipped", "median_us" (None if the tile cannot run), "error" (why).
    """
    (_, N, K, M, J), (x,) = case.size, variants.make_inputs(case, 1, device)
    A, scale = sample_unit_directions(K, M, step=0, device=device, dtype=case.dtype)
    config = triton_operators.get_config(device, case.dtype.itemsize)
    config = config._replace(fused={ANY: config.tile("fused", min(K, max(config.fused)))} if fused else {})
    knots = standard_normal_knots(variants.T_MAX, J)
    t, phi, weights = (a.to(device, torch.float32) for a in knots[:3])
    plan, unit = make_plan(J, knots.spacing), scale if case.half else None
    shared = (x.detach(), A, unit, t, plan, config, triton_operators.default_precision(device))
    size = {**case.size._asdict(), "dtype": case.dtype_name}
    rows: list[Row] = []

    def write_rows() -> None:
        for row in tuner.rows[len(rows) :]:
            us = None if row["seconds"] is None else 1e6 * row["seconds"]
            rest = {key: row[key] for key in ("tile", "shipped", "error")}
            rows.append({"kernel": row["kernel"], **size, **rest, "median_us": us})
            write(rows[-1])

    def write_and_time(call: Callable[[], None]) -> float:
        write_rows()
        return timer(call)

    tuner = autotune.Tuner(write_and_time)
    with (
        mock.patch.dict(os.environ, LEJEPA_AUTOTUNE="1"),
        mock.patch.object(autotune, "process_tuner", tuner),
    ):
        try:
            table = forward.table_sums(*shared)
            options: Any = {"unbiased": False, "scale_by_n": True, "factor": 1.0}
            value, coef = epilogue.statistic(table, N, unit, t, phi, weights, plan, **options)
            backward.gradient(torch.ones_like(value), 1.0, coef, *shared)
        except autotune.CANNOT_RUN:  # no tile of a kernel can run: the rows say why
            if all(row["error"] is None for row in tuner.rows):
                raise
    write_rows()
    return rows


def time_case(case: Case, device: torch.device, timer: Timer, file: Rows) -> list[Row]:
    """Time all candidates of a case and write their rows as they come; both backwards share the forward."""
    rows: list[Row] = []

    def write(row: Row) -> None:
        if all((row["kernel"], row["tile"]) != (known["kernel"], known["tile"]) for known in rows):
            rows.extend(file.write(row))

    for fused in backwards(case):
        time_candidates(case, device, fused, timer, write)
    return rows


def backwards(case: Case) -> tuple[bool, ...]:
    """The values of `fused` to time: in one kernel only where dx may fit, else it compiles for minutes."""
    fits = (512 if case.half else 64) >= case.size.K
    return (False, True) if fits else (False,)


def compile_ahead(cases: Sequence[Case], device: torch.device) -> None:
    """Run every candidate once, from several processes: Triton keeps what they compile on disk."""
    count = min(8, os.cpu_count() or 1)
    jobs = [(c, device, f, share, count) for c in cases for f in backwards(c) for share in range(count)]
    try:
        with timing.fresh_processes(count) as pool:
            list(pool.map(compile_share, *zip(*jobs, strict=True)))
    except Exception as failure:  # the timing shows which tile it was
        print(f"not all tiles are compiled ahead: {failure!r}", flush=True)


def compile_share(case: Case, device: torch.device, fused: bool, index: int, count: int) -> None:
    """Run the candidates `index`, `index + count`, ... once."""
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
        timed = sorted((r for r in tried if r["median_us"] is not None), key=lambda row: row["median_us"])
        best = [" ".join(f"{k} {v}" for k, v in row["tile"].items()) for row in timed[:1]] or ["none runs"]
        best += [f"{row['median_us']:.1f}" for row in timed[:1]] or ["-"]
        shipped = [f"{row['median_us']:.1f}" for row in timed if row["shipped"]] or ["does not run"]
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
        compile_ahead(cases, device)

    for case in cases:
        print(f"\n{case.key}: {case.size}", flush=True)
        file = Rows(options.out / "kernel_tiles.jsonl", "kernel_tiles", device, rehearsal=options.rehearse)
        show(time_case(case, device, timer, file))


if __name__ == "__main__":
    main()
