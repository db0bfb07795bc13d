"""What the compiler makes of the shipped kernels, without a GPU: registers, spills, instructions, floors.

    python bench/kernel_report.py                       # all kernels for sm_90
    python bench/kernel_report.py --target all          # also the targets without a disassembler
    python bench/kernel_report.py --json report.json --check

Every kernel is compiled for the reference size (V 8, N 2048, K 512, M 1024, J 17) with its shipped
configuration. Instructions are counted in the hot loop: the stretch of machine code between two
branches that holds the range reductions. One range reduction belongs to one projected sample, and its
constant can be found in the code, so `per sample` means: of that stretch, divided by its range
reductions. `--check` compares with bench/kernel_budgets.json and exits 1 when a budget is exceeded.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from benchlib import print_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lejepa_fast.kernels import backward, directions, finish, forward
from lejepa_fast.kernels.configs import TARGETS, Tile, shipped_config
from lejepa_fast.kernels.layout import Plan, make_plan

BUDGETS = Path(__file__).parent / "kernel_budgets.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VIEWS, SAMPLES, DIM, SLICES, KNOTS = 8, 2048, 512, 1024, 17
# The names that end in 2 are Blackwell's packed instructions: two operations, issued once.
FP32 = ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "FCHK", "FADD2", "FMUL2", "FFMA2")
TENSOR = ("HGMMA", "HMMA", "UTCHMMA", "UTCOMMA")
# The constant of the range reduction as the disassembler prints it; see `series.py`.
_ROUND = re.compile(r"FADD.*12582912")
_LINE = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)")
_H200_FP32 = 128 * 132 * 1.98e9  # lanes x multiprocessors x boost clock: instructions a second
_H200_MATMUL = 780e12  # bf16, measured on random data


Arguments = dict[str, Any]


class Kernel(NamedTuple):
    """A kernel with the arguments of one launch."""

    name: str
    function: Any
    arguments: Arguments
    tile: Tile


def shipped_kernels(target: str, dtype: str, plan: Plan, dim: int = DIM) -> list[Kernel]:
    """The launches of a forward and backward pass: tensors as "*type", numbers as values."""
    itemsize = 4 if dtype == "fp32" else 2
    config = shipped_config(target, itemsize)
    tensors: Arguments = {"x_ptr": f"*{dtype}", "a_ptr": f"*{dtype}", "scale_ptr": "*fp32", "t_ptr": "*fp32"}
    strides: Arguments = {
        "stride_xv": SAMPLES * dim,
        "stride_xn": dim,
        "stride_xk": 1,
        "stride_ak": SLICES,
        "stride_am": 1,
    }
    sizes: Arguments = {"views": VIEWS, "N": SAMPLES, "K": dim, "M": SLICES, "J": plan.J}
    factors: Arguments = {
        "factor_hi": 0.1,
        "factor_lo": 0.1,
        "giant_hi": 0.1,
        "giant_lo": 0.1,
        "out_factor": 0.1,
    }
    half_scale: Arguments = {"HAS_SCALE": itemsize == 2, "EQUIDISTANT": plan.equidistant, "B": plan.B}
    precision: Arguments = {"PRECISION": "tf32x3" if itemsize == 4 and target.startswith("sm") else "ieee"}
    common: Arguments = {
        **tensors,
        **strides,
        **sizes,
        **factors,
        **half_scale,
        **precision,
        "ROWS": plan.rows,
    }

    def blocks(tile: Tile, dimension: int = dim) -> Arguments:
        step = min(tile.block_k, max(16, triton.next_power_of_2(dimension)))
        return {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": step,
            "SINGLE_K": dimension <= step,
            "EVEN_K": dimension % step == 0,
            "EVEN_N": True,
        }

    sums: Arguments = {"out_ptr": "*fp32", "splits": 2, "tiles_per_split": 16, "G": plan.chunk_giants}
    sums |= {"CHUNKS": plan.chunks, "CHUNK_KNOTS": plan.chunk_knots}
    back: Arguments = {
        "coef_ptr": "*fp32",
        "grad_ptr": "*fp32",
        "out_ptr": f"*{dtype}",
        "G": plan.G,
        "FAR": plan.chunks > 1,
    }
    back |= {
        "SLICE_GRAD": False,
        "first_view": 0,
        "n_first": 0,
        "n_stop": SAMPLES,
        "stride_gv": 0,
        "stride_gm": 0,
    }
    small: Arguments = {"K": config.fused_max_dim, "stride_xn": config.fused_max_dim}
    fused_blocks = blocks(config.fused._replace(block_k=4096), config.fused_max_dim)
    done: Arguments = {"table_ptr": "*fp32", "count_ptr": "*fp32", "phi_ptr": "*fp32", "weights_ptr": "*fp32"}
    done |= {"value_ptr": "*fp32", "coef_ptr": "*fp32", "count": 2048.0, "splits": 2, "stride_split": 2 << 20}
    done |= {"stride_pj": 1, "stride_pm": 0, "stride_wj": 1, "stride_wm": 0, "COUNT_ON_DEVICE": False}
    done |= {"UNBIASED": False, "SCALE_BY_N": True, "REDUCE": True, "G": plan.G, "BLOCK_M": 32}
    pairs = (plan.G + 1) * (plan.B + 1) if plan.equidistant else plan.J
    done |= {"PAIRS": triton.next_power_of_2(pairs)}
    plain = Tile(32, 0, 0, 4, 3)
    product: Arguments = {"dp_ptr": f"*{dtype}", "rows": VIEWS * SAMPLES}
    draw: Arguments = {"step_ptr": "*i64", "out_ptr": f"*{dtype}", "seed": 3, "BLOCK_Q": 16, "BLOCK_M": 16}
    summing: Arguments = {"in_ptr": "*fp32", "out_ptr": "*fp32", "count": 256, "factor": 0.1, "BLOCK": 1024}
    return [
        Kernel("directions", directions._directions_kernel, {**common, **draw}, plain),
        Kernel(
            "forward",
            forward._sigreg_fwd_kernel,
            {**common, **sums, **blocks(config.forward)},
            config.forward,
        ),
        Kernel("finish", finish._sigreg_finish_kernel, {**common, **done}, plain),
        Kernel("sum", finish._sum_kernel, summing, plain),
        Kernel(
            "gradient",
            backward._sigreg_bwd_kernel,
            {**common, **back, **blocks(config.gradient), "STORE_DP": True},
            config.gradient,
        ),
        Kernel(
            "product",
            backward._sigreg_dx_kernel,
            {**common, **back, **blocks(config.product), **product},
            config.product,
        ),
        Kernel(
            "fused",
            backward._sigreg_bwd_kernel,
            {**common, **back, **small, **fused_blocks, "STORE_DP": False},
            config.fused,
        ),
    ]


def compile_kernel(kernel: Kernel, target: str) -> Any:
    """Compile as the launcher would: types from values, 1 as a constant, divisibility by 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.function.params):
        value = kernel.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            constants[parameter.name] = value
            signature[parameter.name] = "constexpr"
        elif isinstance(value, str):
            signature[parameter.name] = value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, str) or (isinstance(value, int) and value % 16 == 0)
        if signature[parameter.name] != "constexpr" and aligned and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": kernel.tile.num_warps, "num_stages": kernel.tile.num_stages}
    return triton.compile(source, target=gpu_target(target), options=options)


def gpu_target(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


def inspect(compiled: Any, target: str) -> dict[str, Any]:
    """Figures of a compiled kernel; without a disassembler for the target only its shared memory."""
    row: dict[str, Any] = {"shared_bytes": compiled.metadata.shared}
    if not target.startswith("sm_"):
        return row
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run(
                [TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    row["registers"] = int(re.findall(r"REG:(\d+)", usage)[-1])
    everything = Counter(_LINE.findall(code))
    row["spills"] = everything["LDL"] + everything["STL"]
    row["stack_bytes"] = int(re.findall(r"STACK:(\d+)", usage)[-1])
    row["tensor_instructions"] = sum(everything[name] for name in TENSOR)
    row["tensor_kind"] = next((name for name in TENSOR if everything[name]), None)
    samples, loop = hot_loop(code)
    if samples:
        row["per_sample"] = {
            "fp32": sum(loop[name] for name in FP32) / samples,
            "mufu": loop["MUFU"] / samples,
            "shfl": loop["SHFL"] / samples,
            "total": sum(loop.values()) / samples,
        }
    return row


def hot_loop(code: str) -> tuple[int, Counter[str]]:
    """Range reductions and instructions of the straight stretches of code that hold the reductions."""
    samples, counts = 0, Counter[str]()
    stretch: list[str] = []
    for line in [*code.splitlines(), "BRA"]:
        if re.match(r"\s*\.L_", line) or "BRA" in line:
            reductions = sum(bool(_ROUND.search(entry)) for entry in stretch)
            if reductions:
                samples += reductions
                counts.update(_LINE.findall("\n".join(stretch)))
            stretch = []
        stretch.append(line)
    return samples, counts


def floors(row: dict[str, Any]) -> dict[str, float]:
    """Microseconds that the FP32 pipe and the matmul of one pass need on an H200 at the reference size."""
    samples = VIEWS * SAMPLES * SLICES
    fp32 = row["per_sample"]["fp32"] * samples / _H200_FP32
    return {"fp32_us": 1e6 * fp32, "matmul_us": 1e6 * 2 * samples * DIM / _H200_MATMUL}


def report(target: str, dtypes: list[str]) -> list[dict[str, Any]]:
    plan = make_plan(KNOTS, 3 / (KNOTS - 1))
    rows = []
    for dtype in dtypes:
        for kernel in shipped_kernels(target, dtype, plan):
            figures = inspect(compile_kernel(kernel, target), target)
            row = {
                "kernel": kernel.name,
                "target": target,
                "dtype": dtype,
                **kernel.tile._asdict(),
                **figures,
            }
            if kernel.name == "directions":
                row.pop("per_sample", None)  # it draws normals and projects nothing
            if "per_sample" in row:
                row["floor_h200"] = floors(row)
            rows.append(row)
    return rows


def violations(rows: list[dict[str, Any]], budgets: dict[str, Any]) -> list[str]:
    """What breaks the rules: a spill, no tensor-core instructions, 10 % more instructions than recorded."""
    found = []
    for row in rows:
        budget = budgets.get(f"{row['target']} {row['dtype']} {row['kernel']}")
        if budget is None:
            continue
        name = f"{row['kernel']} ({row['dtype']}, {row['target']})"
        if row["spills"] or row["stack_bytes"]:
            found.append(f"{name}: {row['spills']} spill instructions, {row['stack_bytes']} bytes of stack")
        if budget.get("tensor_kind") != row["tensor_kind"]:
            found.append(f"{name}: {row['tensor_kind']} instructions instead of {budget.get('tensor_kind')}")
        if "fp32" in budget:
            got, most = row["per_sample"]["fp32"], 1.1 * budget["fp32"]
            if got > min(most, budget["at_most"]):
                found.append(f"{name}: {got:.1f} FP32 instructions a sample, budget {budget['fp32']:.1f}")
    return found


def show(rows: list[dict[str, Any]]) -> None:
    header = ["kernel", "target", "dtype", "tile", "regs", "spills", "shared", "tensor"]
    header += ["fp32/smp", "mufu", "shfl", "all/smp", "fp32 us", "matmul us"]
    table = []
    for row in rows:
        tile = f"{row['block_m']}x{row['block_n']}x{row['block_k']} w{row['num_warps']} s{row['num_stages']}"
        each = row.get("per_sample")
        cells = [row["kernel"], row["target"], row["dtype"], tile, str(row.get("registers", "-"))]
        cells += [str(row.get("spills", "-")), str(row["shared_bytes"]), row.get("tensor_kind") or "-"]
        cells += [f"{each[k]:.1f}" for k in ("fp32", "mufu", "shfl", "total")] if each else ["-"] * 4
        cells += [f"{row['floor_h200'][k]:.0f}" for k in ("fp32_us", "matmul_us")] if each else ["-"] * 2
        table.append(cells)
    print_table(header, table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="sm_90")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], nargs="+", default=["bf16"])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 when a budget is exceeded")
    options = parser.parse_args()
    targets = TARGETS if options.target == "all" else [options.target]
    rows = [row for target in targets for row in report(target, options.dtype)]
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"V {VIEWS}, N {SAMPLES}, K {DIM}, M {SLICES}, J {KNOTS} (the fused kernel: its largest K)\n")
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    found = violations(rows, json.loads(BUDGETS.read_text())) if options.check else []
    for line in found:
        print(f"over budget: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
