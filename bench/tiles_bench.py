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
from types import SimpleNamespace
from unittest import mock

import sigreg_variants as variants
import timing
import torch
from benchlib import Row, Rows, command_line, print_rows
from sigreg_variants import TRITON, Case, Size

from lejepa_fast import triton_operators
from lejepa_fast.kernels import autotune
from lejepa_fast.kernels.configs import ANY

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
    config, K = triton_operators.get_config(device, case.dtype.itemsize), case.size.K
    config = config._replace(fused={ANY: config.tile("fused", min(K, max(config.fused)))} if fused else {})
    rows: list[Row] = []

    def append(timed: Row) -> None:
        seconds = timed.pop("seconds")
        us = None if seconds is None else 1e6 * seconds
        rows.append({**timed, **case.size._asdict(), "dtype": case.dtype_name, "median_us": us})
        write(rows[-1])

    tuner, (x,) = autotune.Tuner(timer), variants.make_inputs(case, 1, device)
    tuner.rows = SimpleNamespace(append=append)  # type: ignore[assignment]
    with (
        mock.patch.dict(os.environ, LEJEPA_AUTOTUNE="1"),
        mock.patch.object(autotune, "process_tuner", tuner),
        mock.patch.object(triton_operators, "get_config", return_value=config),
    ):
        try:
            variants.VARIANTS[TRITON](case, device).step(x)
        except autotune.CANNOT_RUN:  # no tile of a kernel can run: the rows say why
            if all(row["error"] is None for row in rows):
                raise
    return rows


def time_case(case: Case, device: torch.device, timer: Timer, file: Rows) -> list[Row]:
    """Time all candidates of a case and write their rows as they come; both backwards share the forward."""
    rows: list[Row] = []

    def write(row: Row) -> None:
        if row["kernel"] != "forward" or not fused:
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
    """Print the fastest tile of each kernel that runs, and its time beside that of the shipped one."""
    shown = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        tried = [row for row in rows if row["kernel"] == kernel]
        timed = sorted((r for r in tried if r["median_us"] is not None), key=lambda row: row["median_us"])
        row: Row = {"kernel": kernel, "ran": f"{len(timed)} of {len(tried)}"}
        for tile in timed[:1]:
            row |= {"us": tile["median_us"], "tile": " ".join(f"{k} {v}" for k, v in tile["tile"].items())}
        for tile in timed:
            row |= {"shipped us": tile["median_us"]} if tile["shipped"] else {}
        shown.append(row)
    columns = {"kernel": "{kernel}", "fastest tile": "{tile}", "us": "{us:.1f}"}
    print_rows(shown, columns | {"shipped us": "{shipped us:.1f}", "ran": "{ran}"})


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
