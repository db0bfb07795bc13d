"""Time and memory of SIGReg implementations, after checking that their results are right.

    python bench/sigreg_bench.py                    # this machine's table, rows in bench/results/sigreg.jsonl
    python bench/sigreg_bench.py --sweep            # also against N and M, with a plot
    python bench/sigreg_bench.py --cases giant-bfloat16 --out DIR
    python bench/sigreg_bench.py --size 4 512 256 512 17 --dtype bfloat16

On a GPU: the sizes of the targets, device time and wall clock, launches, share of the floor (how each is
measured: `gpu_timing.py`). Without one, or with --device cpu: one CPU size, and it says so. Variants take
turns in one process, over rotated inputs; on a GPU the compiler and the peers come last, each beside ours
again, and the rows of each such group are written at once. A variant whose value or gradient is off is
reported as wrong and not timed. Who takes part, in which dtypes, with whose directions: `sigreg_variants.py`.
Peak memory is the allocator's on a GPU; on the CPU it is that of a fresh process for each variant. The exit
code is 1 when an implementation of ours failed or is wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_timing
import sigreg_variants as variants
import torch
from benchlib import (
    RESULTS,
    Timed,
    append_rows,
    interleaved_times,
    machine,
    peak_extra_bytes,
    print_table,
    summary,
)
from sigreg_variants import COMPILED, GRAPH, REDUCED, TRITON, Case, Run, Size, Truth
from torch import Tensor

Row = dict[str, Any]
# Their results and buffers live in a memory pool of the graph: the allocator's peak says nothing about them.
GRAPH_POOLS = (REDUCED, GRAPH)


class Setting(NamedTuple):
    """Where: on a GPU with its clock and ceilings, or on the CPU; a rehearsal counts for nothing."""

    device: torch.device
    clock: gpu_timing.GpuClock | None = None
    ceilings: gpu_timing.Ceilings | None = None
    rehearsal: bool = False


# --- Measurements ---------------------------------------------------------------------------------


def groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Who is timed together. The compiler and the peers may take long, or for ever: rows come before them.

    Ours is in every group, so that each ratio is one of figures that took turns.
    """
    slow = [(COMPILED, TRITON), (REDUCED, TRITON, GRAPH), (*variants.PEERS, TRITON)]
    if TRITON not in names or not {COMPILED, REDUCED} & set(names):
        return [tuple(names)]
    last = [tuple(name for name in group if name in names) for group in slow]
    quick = tuple(name for name in names if name not in (COMPILED, REDUCED, *variants.PEERS))
    return [quick, *(group for group in last if set(group) - set(quick))]


def measure(
    case: Case, setting: Setting, repeats: int, keep: Callable[[list[Row]], None] = lambda rows: None
) -> list[Row]:
    """All variants of a case: rows with what went wrong where something did; `keep` gets them by groups."""
    device, clock = setting.device, setting.clock
    bytes_each = case.size.V * case.size.N * case.size.K * case.dtype.itemsize
    xs = variants.make_inputs(case, clock.buffers(bytes_each) if clock else 8, device)
    truth = variants.Truth(xs[0], case.size.J)
    # One date: the groups are one measurement.
    about = {**machine(device), **({"rehearsal": True} if setting.rehearsal else {})}
    rows = []
    for number, names in enumerate(groups(case.variants)):
        # Else a sweep reaches torch.compile's recompilation limit, and it goes on in eager mode.
        torch._dynamo.reset()
        if clock:
            gpu_timing.free_memory()
        together = measure_together(case, names, xs, truth, setting, repeats)
        rows += [{**row, "group": number, **about} for row in together]
        keep(rows[-len(together) :])
    return rows


def measure_together(
    case: Case, names: Sequence[str], xs: list[Tensor], truth: Truth, setting: Setting, repeats: int
) -> list[Row]:
    """Variants that take turns: a row for each."""
    rows: dict[str, Row] = {}
    calls: dict[str, Timed] = {}
    for name in names:
        rows[name], run = checked(case, name, xs[0], truth, setting.device)
        if run is not None:
            calls[name] = Timed(
                lambda repeat: xs[repeat % len(xs)].detach().requires_grad_(), named(name, run)
            )
    time_in_turns(calls, rows, setting, repeats)
    for name, call in calls.items():
        if setting.ceilings and gpu_timing.has_floor(case, setting.ceilings):
            floor = gpu_timing.floors(case.size, case.dtype.itemsize, setting.ceilings)
            share = floor["floor_ms"] / rows[name]["forward_backward"]["median_ms"]
            rows[name] |= {**floor, "share_of_floor": share, "ceilings": setting.ceilings._asdict()}
        try:
            rows[name] |= memory_and_launches(case, name, call, setting)
        except Exception as failure:  # the times are worth keeping
            print(f"{name.strip()}: memory not measured: {_first_line(failure)}", flush=True)
    return list(rows.values())


class VariantError(Exception):
    """A variant failed that had run before; its name is the argument."""


def named(name: str, run: Run) -> Run:
    def run_or_say_who(x: Tensor, between: Callable[[], None]) -> tuple[Tensor, Tensor]:
        try:
            return run(x, between)
        except Exception as failure:
            raise VariantError(name) from failure

    return run_or_say_who


def time_in_turns(calls: dict[str, Timed], rows: dict[str, Row], setting: Setting, repeats: int) -> None:
    """Times into the rows. A variant that fails, or lacks memory beside the others, goes, and they stay."""
    clock, warm_up = setting.clock, 0 if setting.rehearsal else 2
    while calls:
        try:
            if clock:
                times = interleaved_times(calls, repeats, once=clock.once, warm_up=4)
                walls = gpu_timing.wall_times(calls)
            else:
                times, walls = interleaved_times(calls, repeats, warm_up=warm_up), {}
        except VariantError as failure:
            (name,), cause = failure.args, failure.__cause__
            problem = "does not fit into memory beside the others"
            if not isinstance(cause, torch.OutOfMemoryError):
                problem = f"failed while it was timed: {_first_line(cause)}"
            del calls[name]
            rows[name] |= {"correct": False, "problem": problem}
            print(f"{name.strip()}: {problem}", flush=True)
            if clock:
                gpu_timing.free_memory()
            continue
        for name, parts in times.items():
            rows[name] |= {phase: summary(v) for phase, v in parts._asdict().items() if v}
        for name, seconds in walls.items():
            rows[name]["wall"] = summary(seconds)
        return


def checked(case: Case, name: str, x: Tensor, truth: Truth, device: torch.device) -> tuple[Row, Run | None]:
    """The row of a variant so far, and its training step if it ran and its result is right."""
    row: Row = {"benchmark": "sigreg", "case": case.name, "variant": name.strip(), **case.size._asdict()}
    row |= {"dtype": variants.dtype_name(case.dtype), "directions": case.directions}
    row |= {"relative_error": None, "correct": False}
    problem = too_large(case, name, device)
    if problem is None:
        try:
            run, error = build_and_compare(case, name, x, truth, device)
        except torch.OutOfMemoryError:
            problem = "does not fit into memory"
        except Exception as failure:  # a compiler or a peer that does not work here; others go on
            problem = f"not available here: {_first_line(failure)}"
            if name.startswith("our"):
                traceback.print_exc()
        else:
            most = variants.MAX_ERROR[case.dtype]
            row |= {"relative_error": error, "correct": error <= most}
            if row["correct"]:
                return row, run
            problem = f"WRONG (error {error:.1e}, at most {most:.0e})"
    print(f"{name.strip()}: {problem}", flush=True)
    if device.type == "cuda":
        gpu_timing.free_memory()
    return row | {"problem": problem}, None


def _first_line(failure: BaseException | None) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:200]}" if lines else type(failure).__name__


def too_large(case: Case, name: str, device: torch.device) -> str | None:
    """Why a variant that materialises all phases is not tried, or None."""
    if device.type != "cuda" or name not in variants.MATERIALISING:
        return None
    needed, free = variants.estimated_bytes(case.size), torch.cuda.mem_get_info(device)[0]
    if needed <= free:
        return None
    return f"does not fit: needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def build_and_compare(
    case: Case, name: str, x: Tensor, truth: Truth, device: torch.device
) -> tuple[Run, float]:
    given = variants.given_directions(case, device)
    loss = variants.VARIANTS[name](case, given, device)
    keeping, run = variants.step_of(loss, keep_directions=True), variants.step_of(loss)
    if name == GRAPH:
        keeping = run = gpu_timing.graphed(run, device)
    leaf = x.detach().requires_grad_()
    if name == GRAPH:  # the second call is a replay with another input than the captured one
        keeping(x.flip(1).detach().requires_grad_(), lambda: None)
    got = keeping(leaf, lambda: None)
    # Before the next call overwrites them: results of a graph live in its pool.
    error = variants.relative_error((got[0].clone(), got[1].clone()), truth(loss.directions()))
    loss.forget()
    return run, error


def memory_and_launches(case: Case, name: str, timed: Timed, setting: Setting) -> Row:
    """Peak memory above the inputs and what was launched: measured last, so that a failure costs no time."""

    def call() -> Any:
        return timed.run(timed.prepare(0), lambda: None)

    if setting.rehearsal:
        return {"peak_extra_mib": peak_extra_bytes(call) / 2**20, **interpreted(name, call)}
    if setting.clock is None:
        return {"peak_extra_mib": measure_memory(case, name) / 2**20}
    found: Row = {}
    if name not in GRAPH_POOLS:
        found["peak_extra_mib"] = gpu_timing.peak_extra_bytes(call) / 2**20
    try:
        kernels = gpu_timing.launches(call)
    except Exception as failure:  # a profiler that may not look at the device
        print(f"{name.strip()}: launches not counted: {_first_line(failure)}", flush=True)
        return found
    return found | ({"launches": sum(kernels.values()), "kernels": kernels} if kernels else {})


def interpreted(name: str, call: Callable[[], Any]) -> dict[str, Any]:
    if name != TRITON:
        return {}
    counts: dict[str, int] = {}
    with gpu_timing.interpreted_launches(counts):
        call()
    return {"launches": sum(counts.values()), "kernels": counts}


def measure_memory(case: Case, name: str) -> int:
    """Peak resident bytes above the inputs, forward and backward, in a fresh process."""
    command = [sys.executable, __file__, "--peak-memory-of", name, "--size", *map(str, case.size)]
    command += ["--dtype", variants.dtype_name(case.dtype), "--directions", case.directions]
    run = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"measuring the memory of {name.strip()!r} failed: {run.stderr.strip()[-300:]}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_memory_here(case: Case, name: str) -> int:
    device = torch.device("cpu")
    (x,) = variants.make_inputs(case, 1, device)
    run = variants.step_of(variants.VARIANTS[name](case, variants.given_directions(case, device), device))

    def call() -> None:
        run(x.detach().requires_grad_(), lambda: None)

    call()  # compilation and thread pools are not the variant's memory
    return peak_extra_bytes(call)


# --- Output ---------------------------------------------------------------------------------------


def show(rows: Sequence[Row]) -> None:
    """Variants that took turns, as a table: times in milliseconds, speed against the first where that ran."""
    base = rows[0] if rows[0]["correct"] else None
    on_gpu = any("wall" in row for row in rows)
    header = [
        rows[0]["dtype"],
        "fwd ms",
        "bwd ms",
        "both ms",
        "p20 .. p80",
        "speed",
        "peak MiB",
        "of the first",
    ]
    header += ["wall ms", "launches", "of floor"] if on_gpu else []
    table = []
    for row in rows:
        if not row["correct"]:
            table.append([row["variant"], row["problem"].split(":")[0], *[""] * (len(header) - 2)])
            continue
        both = row["forward_backward"]
        parts = [f"{row[p]['median_ms']:.3g}" if p in row else "-" for p in ("forward", "backward")]
        cells = [row["variant"], *parts, f"{both['median_ms']:.3g}"]
        cells.append(f"{both['p20_ms']:.3g} .. {both['p80_ms']:.3g}")
        cells.append(f"{base['forward_backward']['median_ms'] / both['median_ms']:.2f}x" if base else "")
        peak = row.get("peak_extra_mib")
        cells.append("-" if peak is None else f"{peak:.0f}")
        base_peak = base.get("peak_extra_mib") if base else None
        cells.append(f"{peak / base_peak:.3f}" if peak is not None and base_peak else "")
        if on_gpu:
            share = row.get("share_of_floor")
            cells += [f"{row['wall']['median_ms']:.3g}", str(row.get("launches", "-"))]
            cells.append("-" if share is None else f"{100 * share:.0f} %")
        table.append(cells)
    print_table(header, table)


def plot(rows: Sequence[Row], base: Case, sweeps: dict[str, list[int]], path: Path) -> None:
    """Time and peak memory against N and against M, one line a variant."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno plot: matplotlib is not installed", flush=True)
        return

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (axis, values) in enumerate(sweeps.items()):
        fixed = {k: v for k, v in base.size._asdict().items() if k != axis}
        for variant in dict.fromkeys(row["variant"] for row in rows):
            picked = {
                row[axis]: row
                for row in rows
                if row["variant"] == variant and row["correct"] and all(row[k] == v for k, v in fixed.items())
            }
            xs = [v for v in values if v in picked]
            style = {"marker": "o", "linewidth": 2.5 if variant.startswith("our impl") else 1.2}
            times = [picked[v]["forward_backward"]["median_ms"] for v in xs]
            axes[0][column].plot(xs, times, label=variant, **style)
            peaks = {v: picked[v]["peak_extra_mib"] for v in xs if "peak_extra_mib" in picked[v]}
            axes[1][column].plot(list(peaks), [max(peak, 0.1) for peak in peaks.values()], **style)
        axes[1][column].set_xlabel({"N": "samples N", "M": "slices M"}[axis])
        axes[0][column].set_title(", ".join(f"{k} {v}" for k, v in fixed.items()), fontsize=10)
    for ax in axes.flat:
        ax.set(xscale="log", yscale="log")
        ax.set_xscale("log", base=2)
        ax.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[1][0].set_ylabel("peak memory above inputs, MiB")
    axes[0][0].legend(fontsize=9)
    figure.suptitle(f"SIGReg in {rows[0]['dtype']} on {rows[0]['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"\nplot: {path}", flush=True)


# --- Command line ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    keys = list(dict.fromkeys(case.key for case in variants.GPU_CASES))
    parser.add_argument("--cases", nargs="+", choices=keys, metavar="CASE", help=f"of {', '.join(keys)}")
    parser.add_argument("--size", type=int, nargs=5, metavar=tuple("VNKMJ"), help="one other size")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of --size")
    parser.add_argument("--directions", choices=["drawn", "given"], help="of --size: inside the call or not")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each variant")
    parser.add_argument("--sweep", action="store_true", help="also vary N and M, and plot")
    parser.add_argument("--sweep-only", action="store_true", help="the sweep alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for sigreg.jsonl and sigreg.png")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="the cases of a GPU at a tiny size on the CPU, for TRITON_INTERPRET=1: no figure means anything",
    )
    parser.add_argument("--peak-memory-of", choices=variants.VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats: expected at least 2, got {options.repeats}")
    if options.size and min(options.size) < 1:
        parser.error(f"--size: expected five positive numbers, got {options.size}")
    if options.size is None and (options.dtype or options.directions):
        parser.error("--dtype and --directions belong to --size")
    if options.size and options.cases:
        parser.error("--size and --cases both choose what is measured; give one of them")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU for cuda, PyTorch finds none; use --device cpu")
    if options.cases and not options.rehearse and _device(options).type == "cpu":
        parser.error("--cases: these sizes need a GPU; use --size for one on the CPU")
    options.sweep |= options.sweep_only
    return options


def _device(options: argparse.Namespace) -> torch.device:
    available = torch.cuda.is_available() and not options.rehearse
    if (options.device or ("cuda" if available else "cpu")) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    if options.size:
        takes_part = variants.EVERYONE if device.type == "cuda" else variants.CPU_CASE.variants
        dtype = getattr(torch, options.dtype or "float32")
        return [Case("custom", Size(*options.size), dtype, options.directions or "given", takes_part)]
    cases = [c for c in variants.GPU_CASES if options.cases is None or c.key in options.cases]
    if options.rehearse:
        tiny = Size(1, 20, 16, 16, 17)
        left_out = (COMPILED, REDUCED, GRAPH)
        return [
            c._replace(size=tiny, variants=tuple(v for v in c.variants if v not in left_out)) for c in cases
        ]
    return cases if device.type == "cuda" else [variants.CPU_CASE]


def gpu_setting(device: torch.device) -> Setting:
    clock = gpu_timing.GpuClock(device)
    ceilings = gpu_timing.measure_ceilings(clock, device)
    print(
        f"ceilings: bf16 matmul {ceilings.matmul_flops / 1e12:.0f} TFLOP/s, "
        f"copy {ceilings.copy_bytes / 1e12:.2f} TB/s, "
        f"FP32 {ceilings.fp32_rate / 1e12:.1f} T instructions/s (clock: {ceilings.clock_source})",
        flush=True,
    )
    gpu_timing.free_memory()
    return Setting(device, clock, ceilings)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = _device(options)
    cases = choose_cases(options, device)
    if options.peak_memory_of:
        print(peak_memory_here(cases[0], options.peak_memory_of))
        return 0
    where = f"the {'GPU' if device.type == 'cuda' else 'CPU'}: {machine(device)['device']}"
    print(f"SIGReg on {where}, {torch.get_num_threads()} threads", flush=True)
    setting = gpu_setting(device) if device.type == "cuda" else Setting(device, rehearsal=options.rehearse)
    path = options.out / "sigreg.jsonl"

    def run(case: Case, repeats: int) -> list[Row]:
        print(f"\n{case}", flush=True)
        return measure(case, setting, repeats, keep)

    def keep(rows: list[Row]) -> None:
        append_rows(path, rows)  # at once: what comes later may be stopped
        show(rows)

    rows: list[Row] = []
    for case in cases if not options.sweep_only else []:
        rows += run(case, options.repeats)
    if options.sweep:
        around = next((case for case in cases if case.directions == "drawn"), cases[0])
        rows += sweep(around, rows, run, device, options)
    print(f"rows: {path}", flush=True)
    failed = [row for row in rows if row["variant"].startswith("our") and not row["correct"]]
    if any("does not fit" not in row["problem"] for row in failed):
        print("error: an implementation of ours failed or is wrong, see above", file=sys.stderr)
        return 1
    return 0


def sweep(
    case: Case,
    rows: list[Row],
    run: Callable[[Case, int], list[Row]],
    device: torch.device,
    options: argparse.Namespace,
) -> list[Row]:
    """Vary N and M around a case, and plot with the rows that there already are."""
    sweeps = variants.SWEEPS[device.type]
    base = case._replace(variants=variants.SWEEP_VARIANTS[device.type])
    wanted = {"case": case.name, "dtype": variants.dtype_name(case.dtype), "directions": case.directions}
    found = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    added: list[Row] = []
    for size in dict.fromkeys(base.size._replace(**{a: v}) for a, vs in sweeps.items() for v in vs):
        if size != base.size or not found:
            added += run(base._replace(name="sweep", size=size), max(2, options.repeats // 3))
    plot([*found, *added], base, sweeps, options.out / "sigreg.png")
    return added


if __name__ == "__main__":
    sys.exit(main())
