"""Time and memory of SIGReg implementations, after checking that their results are right.

    python bench/sigreg_bench.py                    # this machine's table, rows in bench/results/sigreg.jsonl
    python bench/sigreg_bench.py --sweep            # against N and M, with a plot
    python bench/sigreg_bench.py --peers            # against lightly and stable-pretraining, where installed
    python bench/sigreg_bench.py --largest --memory 80  # the largest N, and N = M, that fit into 80 GB
    python bench/sigreg_bench.py --large            # N 32,768, M 8,192 and the sizes of the paper's Table 6
    python bench/sigreg_bench.py --share            # share of SIGReg in training steps of ViT-S and ViT-L
    python bench/sigreg_bench.py --cases giant-bfloat16 --out DIR
    python bench/sigreg_bench.py --size 4 512 256 512 17

On a GPU it measures the sizes of the targets: device time and wall clock, launches, share of the floor.
Without a GPU, or with --device cpu, it measures one CPU size, and says so. A variant whose value or gradient
is off is reported as wrong and not timed. The others take turns in one process, over rotated inputs
(`timing.py`). On a GPU torch.compile comes last, beside ours again, and the rows of each such group are
written at once. Peak memory is the allocator's on a GPU, and that of a fresh process for each variant on a
CPU. The exit code is 1 when an implementation of ours fails or is wrong.

On a CPU the floor is the time of the three matrix products alone, which take turns with the others. On a
GPU the floor of a pass is the largest of three times: its matmul flops at the speed of a measured matmul, its
FP32 instructions at the rate of the chip, its bytes at the speed of a measured copy. `floor_ms` is forward
plus backward; `serial_floor_ms` adds the three instead.

`--largest` searches with measured steps: inputs and peak memory together must fit. It stops where a step
would take longer than `LONGEST_STEP`, and its row then says `at_least`. `--share` trains with
`train_bench.py` and times SIGReg alone at the size that the step has: the share of a variant is that of a
step in which it stands in place of ours. `--large` measures ours at the sizes of Table 6, whose own times
are of a V100. On a CPU, formulas that need minutes and tens of gigabytes are left out.
"""

import argparse
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import sigreg_variants as variants
import timing
import torch
from benchlib import Row, Rows, command_line, first_line, installed_version, machine, print_rows
from sigreg_variants import COMPILED, GRAPH, PACKAGES, REDUCED, TRITON, Case, Size
from torch import Tensor

# Their results live in a memory pool of the graph: the allocator's peak says nothing about them.
GRAPH_POOLS = (REDUCED, GRAPH)
PRODUCTS = "matrix products alone"
REHEARSED = Size(1, 9, 8, 8, 5)
LONGEST_STEP = {"cpu": 60.0, "cuda": 2.0}  # seconds
Calls = dict[tuple[str, str], timing.Call]
"""What is timed, by variant and phase."""


class Setting(NamedTuple):
    """Where it runs: on a GPU with its clock and ceilings, or on the CPU; a rehearsal counts for nothing."""

    device: torch.device
    clock: timing.GpuClock | None = None
    ceilings: timing.Ceilings | None = None
    rehearsal: bool = False


def groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Who is timed together. A compiler may take long or never end, so the rows of the others come before.

    TRITON is in every group, so that each ratio is one of figures that took turns.
    """
    if TRITON not in names:
        return [tuple(names)]
    quick = tuple(name for name in names if name not in (COMPILED, REDUCED))
    slow = [(COMPILED, TRITON), (REDUCED, TRITON, GRAPH)]
    return [quick, *(group for group in slow if group[0] in names)]


def measure(case: Case, setting: Setting, repeats: int, rows: Rows) -> list[Row]:
    """All variants of a case, written and printed group by group; a variant that cannot run says why."""
    bytes_each = case.size.V * case.size.N * case.size.K * case.dtype.itemsize
    count = setting.clock.buffers(bytes_each) if setting.clock else 8
    xs = variants.make_inputs(case, count, setting.device)
    written: list[Row] = []
    for number, names in enumerate(groups(case.variants)):
        torch._dynamo.reset()  # a sweep would reach torch.compile's limit of recompilations
        timing.free_memory()
        found = measure_together(case, names, xs, setting, repeats)
        written += rows.write(*({**row, "group": number} for row in found))
        show(found)
    return written


def measure_together(
    case: Case, names: Sequence[str], xs: list[Tensor], setting: Setting, repeats: int
) -> list[Row]:
    """A row for each of the variants, which take turns."""
    rows: dict[str, Row] = {}
    calls: Calls = {}
    for name in names:
        rows[name], phases = checked(case, name, xs[0], setting.device)
        for phase, function in phases.items():
            calls[name, phase] = partial(next, map(function, itertools.cycle(xs)))
    if not setting.clock:
        samples = [x.detach().flatten(0, 1) for x in xs]
        A = torch.randn(case.size.K, case.size.M, dtype=xs[0].dtype)
        rows[PRODUCTS] = {"correct": True}
        calls[PRODUCTS, "forward_backward"] = partial(
            next, map(partial(multiply, A), itertools.cycle(samples))
        )
    add_times(rows, calls, setting, repeats)
    products = rows.pop(PRODUCTS, None)
    for name, row in rows.items():
        if not row["correct"]:
            continue
        if products:
            row["floor_ms"] = products["forward_backward"]["median_ms"]
        elif setting.ceilings and case.half:  # the ceilings are those of half precision
            row |= floors(case.size, case.dtype.itemsize, setting.ceilings)
            row["ceilings"] = setting.ceilings._asdict()
        if "floor_ms" in row:
            row["share_of_floor"] = row["floor_ms"] / row["forward_backward"]["median_ms"]
        try:
            row |= memory_and_launches(case, name, calls[name, "forward_backward"], setting)
        except Exception as failure:  # the times are worth keeping
            print(f"{name}: memory or launches not measured: {first_line(failure)}", flush=True)
    return list(rows.values())


def multiply(A: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The matrix products of forward, recomputation and backward, alone."""
    return x @ A, (p := x @ A), p @ A.T


def checked(
    case: Case, name: str, x: Tensor, device: torch.device
) -> tuple[Row, dict[str, Callable[[Tensor], Any]]]:
    """The row of a variant so far, and its phases to time: none if its result is wrong."""
    row: Row = {"case": case.name, "variant": name, **case.size._asdict()}
    row |= {"dtype": case.dtype_name, "relative_error": None, "correct": False}
    if name in PACKAGES:
        row["version"] = installed_version(PACKAGES[name])
    try:
        loss, step, error = variants.build_and_compare(case, name, x, device)
        most = variants.MAX_ERROR[case.dtype]
        row |= {"relative_error": error, "correct": error <= most}
        if row["correct"]:
            forward = {} if name == GRAPH else {"forward": loss.forward}
            return row, {**forward, "forward_backward": step}
        problem = f"WRONG (error {error:.1e}, at most {most:.0e})"
    except torch.OutOfMemoryError:
        problem = "does not fit into memory"
    except Exception as failure:  # a compiler or a peer that does not work here; others go on
        problem = f"not available here: {first_line(failure)}"
        if name.startswith("our"):
            traceback.print_exc()
    print(f"{name}: {problem}", flush=True)
    timing.free_memory()
    return row | {"problem": problem}, {}


def add_times(rows: dict[str, Row], calls: Calls, setting: Setting, repeats: int) -> None:
    """Times of forward and of both, their difference as backward, and on a GPU the wall clock of both."""
    clock = setting.clock or (timing.once if setting.rehearsal else timing.wall_clock)
    failures: dict[tuple[str, str], Exception] = {}
    found = timing.interleave(calls, repeats, clock, 4 if setting.clock else 0, failures)
    if setting.clock:
        whole = {(name, "wall"): call for (name, phase), call in calls.items() if phase != "forward"}
        found |= timing.interleave(whole, 7, timing.wall_clock_of_many, failures=failures)
    for (name, phase), seconds in found.items():
        rows[name][phase] = timing.summary(seconds)
        if phase == "forward" and (both := found.get((name, "forward_backward"))):
            rows[name]["backward"] = timing.summary([b - f for b, f in zip(both, seconds, strict=True)])
    for (name, _), failure in failures.items():
        problem = f"failed while it was timed: {first_line(failure)}"
        if isinstance(failure, torch.OutOfMemoryError):
            problem = "does not fit into memory beside the others"
        rows[name] |= {"correct": False, "problem": problem}
        print(f"{name}: {problem}", flush=True)


def memory_and_launches(case: Case, name: str, call: timing.Call, setting: Setting) -> Row:
    """Peak memory above the inputs and what was launched; last, so that a failure costs no time."""
    if setting.rehearsal:
        return {}
    if setting.clock is None:
        return {"peak_extra_mib": timing.in_fresh_process(step_cost, case, name, setting.device)[0] / 2**20}
    found: Row = {}
    if name not in GRAPH_POOLS:
        found["peak_extra_mib"] = timing.peak_extra_bytes(call, setting.device) / 2**20
    if kernels := timing.launches(call):
        found |= {"launches": sum(kernels.values()), "kernels": kernels}
    return found


def step_cost(case: Case, name: str, device: torch.device) -> tuple[float, float]:
    """Peak bytes of a training step above its inputs (infinite if it does not fit), and its seconds."""
    try:
        (x,) = variants.make_inputs(case, 1, device)
        loss = variants.VARIANTS[name](case, device)
        loss.step(x)  # compilation and thread pools are not the variant's memory
        began = time.perf_counter()
        peak = timing.peak_extra_bytes(lambda: loss.step(x), device)
        return peak, time.perf_counter() - began
    except torch.OutOfMemoryError:
        return math.inf, 0.0


def measure_largest(case: Case, setting: Setting, most_bytes: float, rows: Rows) -> list[Row]:
    """A row for each variant, with the largest N, or N = M, whose step fits into `most_bytes`, to 5 %."""
    (x,) = variants.make_inputs(case, 1, setting.device)
    written: list[Row] = []
    for name in case.variants:
        row, _ = checked(case, name, x, setting.device)
        row |= {"memory_gb": most_bytes / 1e9, "group": 0}
        if row["correct"]:
            row |= search(case, name, setting, most_bytes)
        written += rows.write(row)
    columns = {f"{case.name} in {most_bytes / 1e9:g} GB": "{variant}", "N": "{N:,}", "M": "{M:,}"}
    columns |= {"MiB": "{peak_mib:,.0f}", "step ms": "{step_ms:,.3g}", "more would fit": "{at_least}"}
    print_rows(written, columns | {"problem": "{problem}"})
    return written


def search(case: Case, name: str, setting: Setting, most_bytes: float) -> Row:
    """Doubles N, or N and M, until a step does not fit or takes too long, then bisects."""
    both, low, high, size = case.size.N == case.size.M, 0, 0, case.size.N
    cost = step_cost if setting.device.type == "cuda" else partial(timing.in_fresh_process, step_cost)
    row: Row = {"correct": False, "problem": "does not fit into memory"}
    while size not in (low, high) and (not high or high > 1.05 * low):
        tried = case._replace(size=case.size._replace(N=size, M=size if both else case.size.M))
        torch._dynamo.reset()
        timing.free_memory()
        used, seconds = cost(tried, name, setting.device)
        used += size * case.size.K * case.dtype.itemsize
        print(f"{name}: N {size}, M {tried.size.M}: {used / 1e9:.3g} GB, {seconds:.2g} s", flush=True)
        if used > most_bytes:
            high = size
        else:
            low, slow = size, seconds * (4 if both else 2) > LONGEST_STEP[setting.device.type]
            row = {**tried.size._asdict(), "peak_mib": used / 2**20, "step_ms": 1e3 * seconds}
            row["at_least"] = slow and not high
            if row["at_least"]:
                break
        size = (low + high) // 2 // 16 * 16 if high else 2 * low
    return row


def measure_share(case: Case, setting: Setting, repeats: int, rows: Rows) -> list[Row]:
    """The share of SIGReg in a training step, with ours and with the authors' formula in its place."""
    import train_bench  # it imports the trainer

    trained = train_bench.run_case(train_bench.Case(case.name, case.size.N, steps=train_bench.WINDOW))
    if "error" in trained:
        lost = {"variant": case.variants[0], "correct": False, "problem": trained["error"]}
        found: list[Row] = [{**lost, "dtype": case.dtype_name, **case.size._asdict()}]
    else:
        xs = variants.make_inputs(case, 2, setting.device)
        found = measure_together(case, case.variants, xs, setting, repeats)
        rest = trained["step_ms"] * (1 - trained["sigreg_share"])
        for row in found:
            if row["correct"]:
                own = row["forward_backward"]["median_ms"]
                row |= {"step_ms": rest + own, "share": own / (rest + own)}
    written = rows.write(*({**row, "case": "share", "model": case.name, "group": 0} for row in found))
    columns = {"": "{model}, {N} images, {variant}", "step ms": "{step_ms:.4g}", "share": "{share:.2%}"}
    print_rows(written, columns | {"problem": "{problem}"})
    return written


def floors(size: Size, itemsize: int, ceilings: timing.Ceilings) -> dict[str, float]:
    """Milliseconds below which no implementation gets, forward plus backward; see the module."""
    rows, samples = size.V * size.N, size.V * size.N * size.M
    x, A, sums = rows * size.K * itemsize, size.K * size.M * itemsize, 8 * size.V * size.J * size.M
    passes = [  # flops, FP32 instructions, bytes; the instructions are those of the cheapest known algorithm
        (2 * samples * size.K, samples * (4 * (size.J - 1) + 8), x + A + sums),
        (4 * samples * size.K, samples * (4 * (size.J - 1) + 10), 2 * x + A + sums),
    ]
    rates = (ceilings.matmul_flops, ceilings.fp32_rate, ceilings.copy_bytes)
    times = [[work / rate for work, rate in zip(each, rates, strict=True)] for each in passes]
    return {"floor_ms": 1e3 * sum(map(max, times)), "serial_floor_ms": 1e3 * sum(map(sum, times))}


def show(rows: Sequence[Row]) -> None:
    """Variants that took turns as a table, against the first of them that ran."""
    base = next((row["forward_backward"]["median_ms"] for row in rows if row["correct"]), math.nan)
    shown = [
        row if "problem" in row else {**row, "speed": base / row["forward_backward"]["median_ms"]}
        for row in rows
    ]
    columns = {rows[0]["dtype"]: "{variant}"}
    columns |= {f"{phase} ms": f"{{{phase}[median_ms]:.3g}}" for phase in variants.PHASES}
    columns |= {"p20 .. p80": "{forward_backward[p20_ms]:.3g} .. {forward_backward[p80_ms]:.3g}"}
    columns |= {"speed": "{speed:.2f}x", "peak MiB": "{peak_extra_mib:.0f}", "launches": "{launches}"}
    print_rows(shown, columns | {"of floor": "{share_of_floor:.0%}", "problem": "{problem:.60}"})


def plot(rows: Sequence[Row], base: Case, sweeps: dict[str, list[int]], path: Path) -> None:
    """Time and peak memory against N and against M, one line a variant."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", flush=True)
        return
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for (axis, values), (upper, lower) in zip(sweeps.items(), axes.T, strict=True):
        fixed = {k: v for k, v in base.size._asdict().items() if k != axis}
        here = [
            row for row in rows if row["correct"] and fixed.items() <= row.items() and row[axis] in values
        ]
        for variant in base.variants:
            own = sorted((row for row in here if row["variant"] == variant), key=lambda row: row[axis])
            along = [row[axis] for row in own]
            upper.plot(along, [row["forward_backward"]["median_ms"] for row in own], "o-", label=variant)
            lower.plot(along, [max(row.get("peak_extra_mib", 0), 0.1) for row in own], "o-")
        lower.set_xlabel({"N": "samples N", "M": "directions M"}[axis])
        upper.set_title(", ".join(f"{k} {v}" for k, v in fixed.items()), fontsize=10)
        for ax in (upper, lower):
            ax.set_yscale("log")
            ax.set_xscale("log", base=2)
            ax.grid(True, alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[1][0].set_ylabel("peak memory above inputs, MiB")
    axes[0][0].legend(fontsize=9)
    figure.suptitle(f"SIGReg in {rows[0]['dtype']} on {rows[0]['device']}")
    figure.savefig(path, dpi=130)
    print(f"plot: {path}", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    small = "the cases of a GPU at a tiny size on the CPU, for TRITON_INTERPRET=1: no figure means anything"
    parser = command_line(__doc__, rehearse=small)
    keys = [case.key for case in variants.GPU_CASES]
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cases", nargs="+", choices=keys, metavar="CASE", help=f"of {', '.join(keys)}")
    what.add_argument("--size", type=int, nargs=5, metavar=tuple("VNKMJ"), help="another size, in float32")
    what.add_argument("--peers", action="store_true", help="against public packages, at sizes in common use")
    what.add_argument("--sweep", action="store_true", help="vary N and M, and plot")
    what.add_argument("--largest", action="store_true", help="the largest N, and N = M, that fit")
    what.add_argument("--large", action="store_true", help="N 32,768, M 8,192, and the paper's Table 6")
    what.add_argument("--share", action="store_true", help="of SIGReg in a training step")
    parser.add_argument("--memory", type=float, help="GB, for --largest; default: 80 on a GPU, 1 on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each variant")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() and not options.rehearse
    if options.memory is not None and not options.memory > 0:
        parser.error(f"--memory: expected a positive number of GB, got {options.memory}")
    if options.repeats < 2:
        parser.error(f"--repeats: expected at least 2, got {options.repeats}")
    if options.size and min(options.size) < 1:
        parser.error(f"--size: expected five positive numbers, got {options.size}")
    if options.device == "cuda" and not gpu:
        parser.error("--device: expected a GPU for cuda, PyTorch finds none; use --device cpu")
    if options.cases and not options.rehearse and (options.device == "cpu" or not gpu):
        parser.error("--cases: these sizes need a GPU; use --size for one on the CPU")
    if options.peers and not variants.PEERS:
        parser.error("--peers: none of them is installed; pip install 'lejepa_fast[peers]'")
    options.device = torch.device(options.device or ("cuda" if gpu else "cpu"))
    return options


def choose_cases(options: argparse.Namespace) -> list[Case]:
    gpu = options.device.type == "cuda"
    for name, cases_of in variants.CASES_OF.items():
        if getattr(options, name):
            return cases_of(gpu)
    cases = [c for c in variants.GPU_CASES if options.cases is None or c.key in options.cases]
    if options.rehearse:
        quick = (variants.BASELINE, variants.STREAMING, TRITON)
        return [c._replace(size=REHEARSED, variants=quick) for c in cases]
    if not gpu:
        cases = [variants.CPU_CASE]
    if options.size:
        cases = [cases[0]._replace(name="custom", size=Size(*options.size), dtype=torch.float32)]
    left_out = (COMPILED, REDUCED) if options.no_compile else ()
    return [c._replace(variants=[v for v in c.variants if v not in left_out]) for c in cases]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device, gpu = options.device, options.device.type == "cuda"
    where = f"the {'GPU' if gpu else 'CPU'}: {machine(device)['device']}"
    print(f"SIGReg on {where}, {torch.get_num_threads()} threads", flush=True)
    setting = Setting(device, rehearsal=options.rehearse)
    if gpu:
        setting = Setting(device, timing.GpuClock(device), timing.measure_ceilings(device))
        print(f"ceilings, a second: {setting.ceilings}", flush=True)
    path = options.out / "sigreg.jsonl"
    repeats = options.repeats // 3 + 2 if options.sweep or options.large else options.repeats
    rows: list[Row] = []
    for case in choose_cases(options):
        print(f"\n{case.key}: {case.size}", flush=True)
        file = Rows(path, "sigreg", device, rehearsal=options.rehearse)
        if options.largest:
            rows += measure_largest(case, setting, 1e9 * (options.memory or (80 if gpu else 1)), file)
        elif options.share:
            rows += measure_share(case, setting, repeats, file)
        else:
            rows += measure(case, setting, repeats, file)
    if options.sweep:
        plot(rows, variants.sweep_base(gpu), variants.SWEEPS[gpu], options.out / "sigreg.png")
    print(f"rows: {path}", flush=True)
    failed = [row for row in rows if row["variant"].startswith("our") and not row["correct"]]
    if any("does not fit" not in row["problem"] for row in failed):
        print("error: an implementation of ours failed or is wrong, see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
