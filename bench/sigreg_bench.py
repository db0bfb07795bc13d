"""Time and memory of SIGReg implementations, after checking that their results are right.

    python bench/sigreg_bench.py                    # one size, table, rows in bench/results/sigreg.jsonl
    python bench/sigreg_bench.py --sweep            # also against N and M, with a plot

Variants take turns in one process, over rotated input buffers. A variant whose value or gradient is off
is reported as wrong and not timed. Peak memory is taken in a fresh process for each variant. On a
machine without a GPU all this happens on the CPU, at a CPU size, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
from torch import Tensor

from lejepa_fast import sample_directions, sigreg, standard_normal_knots
from lejepa_fast.ops import Implementation


class Size(NamedTuple):
    """Views, samples per view, dimensions, slices, knots."""

    V: int
    N: int
    K: int
    M: int
    J: int

    def __str__(self) -> str:
        return f"V {self.V}, N {self.N}, K {self.K}, M {self.M}, J {self.J}"


CPU_SIZE = Size(1, 2048, 512, 1024, 17)
SWEEPS = {"N": [256, 512, 1024, 2048, 4096], "M": [128, 256, 512, 1024, 2048]}
BUFFERS = 8  # inputs taken in turns: at the CPU size together larger than the last-level cache
MAX_ERROR = 1e-4  # relative, value and gradient, against float64

Loss = Callable[[Tensor], Tensor]


# --- Variants -------------------------------------------------------------------------------------


def authors_formulation(size: Size, A: Tensor) -> Loss:
    """The statistic as the paper's code writes it: cos and sin of all N x M x J phases."""
    t, phi, weights = (a.float() for a in standard_normal_knots(3.0, size.J)[:3])

    def loss(x: Tensor) -> Tensor:
        phase = (x @ A).unsqueeze(-1) * t
        error = (phase.cos().mean(-3) - phi).square() + phase.sin().mean(-3).square()
        return ((error @ weights) * x.shape[-2]).mean()

    return loss


def ours(impl: Implementation) -> Callable[[Size, Tensor], Loss]:
    def build(size: Size, A: Tensor) -> Loss:
        knots = standard_normal_knots(3.0, size.J)
        t, phi, weights = (a.float() for a in knots[:3])
        return lambda x: sigreg(x, A, t, phi, weights, impl=impl, spacing=knots.spacing)

    return build


def compiled(build: Callable[[Size, Tensor], Loss]) -> Callable[[Size, Tensor], Loss]:
    return lambda size, A: torch.compile(build(size, A), dynamic=False)


def lightly_peer(size: Size, A: Tensor) -> Loss:
    from lightly.loss.lejepa_loss import SIGReg

    module = SIGReg(knots=size.J, t_max=3.0, num_vectors=size.M)
    # The same directions for all, so that results can be compared and sampling is not timed.
    module._generate_unit_vectors = lambda device, dtype, num_features: A.to(device, dtype)
    return module


VARIANTS: dict[str, Callable[[Size, Tensor], Loss]] = {
    "authors' formulation": authors_formulation,
    "  torch.compile of it": compiled(authors_formulation),
    "our reference": ours("reference"),
    "our impl='torch'": ours("torch"),
}
BASELINE = "authors' formulation"
if importlib.util.find_spec("lightly") and importlib.util.find_spec("lightly.loss.lejepa_loss"):
    VARIANTS["lightly"] = lightly_peer


# --- Measurements ---------------------------------------------------------------------------------


def inputs(size: Size, count: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(size.V, size.N, size.K, generator=generator) for _ in range(count)]
    return xs, sample_directions(size.K, size.M, step=0)


def exact(size: Size) -> tuple[Tensor, Tensor]:
    """Value and gradient by the reference in float64, a few directions at a time."""
    (x,), A = inputs(size, 1)
    x, knots = x.double().requires_grad_(), standard_normal_knots(3.0, size.J)
    value = torch.zeros((), dtype=torch.float64)
    for chunk in A.double().split(64, dim=1):
        part = sigreg(x, chunk, *knots[:3], reduction="sum", impl="reference") / (size.V * size.M)
        part.backward()
        value += part.detach()
    assert x.grad is not None
    return value, x.grad


def relative_error(loss: Loss, size: Size, value: Tensor, grad: Tensor) -> float:
    """Larger of the relative errors of value and gradient."""
    (x,), _ = inputs(size, 1)
    x.requires_grad_()
    got = loss(x)
    got.backward()
    assert x.grad is not None
    return max(abs(got.item() / value.item() - 1), ((x.grad - grad).norm() / grad.norm()).item())


def measure_times(size: Size, names: list[str], repeats: int) -> list[dict[str, Any]]:
    # Else the sizes of a sweep add up to torch.compile's recompilation limit, and it goes on in eager mode.
    torch._dynamo.reset()
    xs, A = inputs(size, BUFFERS)
    losses = {name: VARIANTS[name](size, A) for name in names}
    truth = exact(size)
    errors: dict[str, float | None] = {}
    for name, loss in losses.items():
        try:
            errors[name] = relative_error(loss, size, *truth)
        except RuntimeError as error:  # torch.compile without a C++ compiler, a peer of another version
            print(f"{name.strip()}: not available here: {str(error).strip().splitlines()[0]}")
            errors[name] = None
    right = {n: loss for n, loss in losses.items() if (e := errors[n]) is not None and e <= MAX_ERROR}

    def no_grad(loss: Loss) -> Callable[[Tensor], Tensor]:
        return torch.no_grad()(loss)

    def leaf(repeat: int) -> Tensor:
        return xs[repeat % BUFFERS].detach().requires_grad_()

    phases = {
        "forward": {n: Timed(leaf, no_grad(loss)) for n, loss in right.items()},
        "backward": {
            n: Timed(lambda repeat, loss=loss: loss(leaf(repeat)), Tensor.backward)  # type: ignore[misc]
            for n, loss in right.items()
        },
        "forward_backward": {
            n: Timed(leaf, lambda x, loss=loss: loss(x).backward())  # type: ignore[misc]
            for n, loss in right.items()
        },
    }
    times = {phase: interleaved_times(calls, repeats) for phase, calls in phases.items()}
    rows = []
    for name in names:
        row: dict[str, Any] = {"variant": name.strip(), **size._asdict(), "dtype": "float32"}
        row |= {"relative_error": errors[name], "correct": name in right}
        if name in right:
            row |= {phase: summary(times[phase][name]) for phase in phases}
        rows.append(row)
    return rows


def measure_memory(size: Size, name: str) -> int:
    """Peak resident bytes above the inputs, forward and backward, in a fresh process."""
    command = [sys.executable, __file__, "--peak-memory-of", name, "--size", *map(str, size)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"measuring the memory of {name.strip()!r} failed: {run.stderr.strip()[-300:]}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_memory_here(size: Size, name: str) -> int:
    (x,), A = inputs(size, 1)
    loss = VARIANTS[name](size, A)

    def call() -> None:
        loss(x.detach().requires_grad_()).backward()

    call()  # compilation and thread pools are not the variant's memory
    return peak_extra_bytes(call)


def measure(size: Size, names: list[str], repeats: int) -> list[dict[str, Any]]:
    rows = measure_times(size, names, repeats)
    for row, name in zip(rows, names, strict=True):
        if row["correct"]:
            row["peak_extra_mib"] = measure_memory(size, name) / 2**20
    about = machine()
    return [{"benchmark": "sigreg", **row, **about} for row in rows]


# --- Output ---------------------------------------------------------------------------------------


def show(rows: list[dict[str, Any]], names: list[str]) -> None:
    baseline = rows[names.index(BASELINE)]
    table = []
    for name, row in zip(names, rows, strict=True):
        if not row["correct"]:
            error = row["relative_error"]
            table.append(
                [name, "not available" if error is None else f"WRONG (error {error:.1e})", *[""] * 6]
            )
            continue
        both = row["forward_backward"]
        speed = memory = ""
        if baseline["correct"]:
            speed = f"{baseline['forward_backward']['median_ms'] / both['median_ms']:.2f}x"
            memory = f"{row['peak_extra_mib'] / baseline['peak_extra_mib']:.3f}"
        table.append(
            [
                name,
                f"{row['forward']['median_ms']:.1f}",
                f"{row['backward']['median_ms']:.1f}",
                f"{both['median_ms']:.1f}",
                f"{both['p20_ms']:.1f} .. {both['p80_ms']:.1f}",
                speed,
                f"{row['peak_extra_mib']:.0f}",
                memory,
            ]
        )
    header = ["float32", "fwd ms", "bwd ms", "both ms", "p20 .. p80", "speed", "peak MiB", "of baseline"]
    print_table(header, table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory against N and against M, one line a variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (axis, values) in enumerate(SWEEPS.items()):
        fixed = {k: v for k, v in CPU_SIZE._asdict().items() if k != axis}
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
            axes[1][column].plot(xs, [max(picked[v]["peak_extra_mib"], 0.1) for v in xs], **style)
        axes[1][column].set_xlabel({"N": "samples N", "M": "slices M"}[axis])
        axes[0][column].set_title(", ".join(f"{k} {v}" for k, v in fixed.items()), fontsize=10)
    for ax in axes.flat:
        ax.set(xscale="log", yscale="log")
        ax.set_xscale("log", base=2)
        ax.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[1][0].set_ylabel("peak memory above inputs, MiB")
    axes[0][0].legend(fontsize=9)
    figure.suptitle(f"SIGReg in float32 on {rows[0]['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=5, metavar=tuple("VNKMJ"), default=CPU_SIZE)
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each variant")
    parser.add_argument("--sweep", action="store_true", help="also vary N and M, and plot")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for sigreg.jsonl and sigreg.png")
    parser.add_argument("--peak-memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats: expected at least 2, got {options.repeats}")
    if min(options.size) < 1:
        parser.error(f"--size: expected five positive numbers, got {options.size}")
    return options


def main() -> None:
    options = parse()
    size = Size(*options.size)
    if options.peak_memory_of:
        print(peak_memory_here(size, options.peak_memory_of))
        return
    names = list(VARIANTS)
    where = (
        "CPU" if not torch.cuda.is_available() else "CPU (this benchmark's GPU part comes with the kernels)"
    )
    print(f"SIGReg on the {where}: {machine()['device']}, {torch.get_num_threads()} threads\n{size}\n")
    rows = measure(size, names, options.repeats)
    show(rows, names)
    if options.sweep:
        for axis, values in SWEEPS.items():
            for value in values:
                if (other := size._replace(**{axis: value})) != size:
                    print(f"\n{other}")
                    more = measure(other, names, max(2, options.repeats // 3))
                    show(more, names)
                    rows += more
        plot(rows, options.out / "sigreg.png")
        print(f"\nplot: {options.out / 'sigreg.png'}")
    append_rows(options.out / "sigreg.jsonl", rows)
    print(f"rows: {options.out / 'sigreg.jsonl'}")


if __name__ == "__main__":
    main()
