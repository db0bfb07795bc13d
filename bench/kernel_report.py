"""What the compiler makes of the shipped kernels, without a GPU: registers, spills, instructions, floors.

    python bench/kernel_report.py                       # all kernels for sm_90
    python bench/kernel_report.py --target all --dtype bf16 fp32
    python bench/kernel_report.py --json report.json --check

The launchers run on tensors without memory, and each kernel is compiled with the arguments that they pass:
for the reference size (V 8, N 2048, K 512, M 1024, J 17), for the giant one (V 10, N 4096, K 1536, M 4096)
where that takes another tile, and `fused` for the largest K of each tile. For sm_90 also for the minimal
size, odd sizes, more knots, arbitrary knots, a statistic for each direction, and bf16 embeddings with float32
directions: there spills are recorded rather than excluded.

Instructions are counted in the hot loop, the stretch of machine code between two branches that holds the
range reductions. A projected sample has one of them (two beyond 17 knots), known by its constant, so `per
sample` means: of that stretch, divided by its samples. Beyond 17 knots it is that of one of the programs of
`forward` that share the knots.

Floors are for one H200 and a launch of the whole size: instructions on the FP32 pipe, the matrix product, and
the bytes that programs read through the L2 cache, each by its rate below. Programs on a multiprocessor
overlap; where registers or shared memory leave room for one only, its product and its arithmetic add.

`predicted` is a model, no measurement. Every instruction of the loop over tiles is an issue slot, one a clock
and scheduler; the busiest multiprocessor counts. Two programs or more on one hide each other's waits: the
slowest of issue slots, matrix product and memory decides. A single one adds its product, its arithmetic, a
latency for each wait for the tensor cores (`drains`), and what its loads take longer than the instructions or
the steps of the product between a load and the first that needs it (`ahead`). Each launch has an overhead.
`measured` is the shipped tile's time in bench/results/kernel_tiles.jsonl, once there is one.

`--check` compares with bench/kernel_budgets.json and exits 1 when a budget is exceeded. A budget
whose key begins with "triton 3.8" replaces the common one for that version.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import triton
from benchlib import RESULTS, Row, print_table, read_rows
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lejepa_fast.kernels import backward, color_jitter, epilogue, forward, philox
from lejepa_fast.kernels.configs import ANY, TARGETS, Config, Tile, shipped_config
from lejepa_fast.kernels.table import Plan, count_splits, make_plan
from lejepa_fast.triton_operators import default_precision

BUDGETS = Path(__file__).parent / "kernel_budgets.json"
TIMES = RESULTS / "kernel_tiles.jsonl"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The names that end in 2 are Blackwell's packed instructions: two operations, issued once.
FP32 = ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "FCHK", "FADD2", "FMUL2", "FFMA2")
_DRAIN = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
TENSOR = ("HGMMA", "HMMA", "UTCHMMA", "UTCOMMA")
# The constant of the range reduction as the disassembler prints it; see `kernels/phases.py`.
_ROUND = re.compile(r"FADD.*12582912")
_LINE = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)")
# One H200. FP32: 128 lanes x 132 multiprocessors x boost clock. Matrix products and L2: assumptions until
# they are measured; random data clock below the peak rate. tf32 is half of bf16.
_FP32 = 128 * 132 * 1.98e9
_MATMUL = {"bf16": 780e12, "fp16": 780e12, "fp32": 390e12 / 3}  # float32 takes three tf32 products
_L2 = 5.5e12
_CLOCK, _SMS = 1.98e9, 132
# Assumptions until they are measured: device memory by a copy, clocks until a load from L2 arrives and until
# the tensor cores have finished, seconds of a launch, and of one that computes little.
_DRAM, _LOAD_CLOCKS, _DRAIN_CLOCKS, _LAUNCH, _SMALL = 4.3e12, 700, 100, 2e-6, 4e-6
_SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # of a program
SHARED_BYTES = {target: 1024 * kib for target, kib in _SHARED_KIB.items()}
_REGISTERS, _SHARED = 65536, SHARED_BYTES["sm_90"]  # of a multiprocessor, sm_90
TILED = {
    "_sigreg_fwd_kernel": "forward",
    "_sigreg_dp_kernel": "gradient",
    "_sigreg_dx_kernel": "product",
    "_sigreg_bwd_kernel": "fused",
}
PLAIN = {"_directions_kernel": "directions", "_sigreg_statistic_kernel": "statistic", "_sum_kernel": "sum"}
_PLAIN_TILE = Tile(32, 0, 0, 4, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_POINTERS = {dtype: f"*{name}" for name, dtype in DTYPES.items()}
_POINTERS |= {torch.uint8: "*u8", torch.int64: "*i64"}

# --- The kernels as they are launched --------------------------------------------------------------


class Size(NamedTuple):
    """Size of a problem: views, samples, dimensions, directions."""

    V: int
    N: int
    K: int
    M: int


class Kernel(NamedTuple):
    """A kernel with the arguments and options of a launch."""

    name: str
    function: Any
    arguments: dict[str, Any]
    tile: Tile


REFERENCE, GIANT = Size(8, 2048, 512, 1024), Size(10, 4096, 1536, 4096)
MINIMAL = Size(4, 256, 16, 256)
STEPS = {"reference bf16": ("bf16", REFERENCE), "reference fp32": ("fp32", REFERENCE)}
STEPS |= {"giant bf16": ("bf16", GIANT), "minimal bf16": ("bf16", MINIMAL)}
ODD = (Size(8, 2001, 60, 1000), Size(8, 2001, 500, 1000), Size(8, 2001, 768, 1024))
USUAL = make_plan(17, 3 / 16)


def launched(call: Callable[[], Any], target: str = "sm_90") -> list[Kernel]:
    """What `call` would launch on a GPU, with its shipped tiles; it gets tensors without memory."""
    found: list[Kernel] = []
    tile = _PLAIN_TILE

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options |= zip((parameter.name for parameter in kernel.params), arguments, strict=False)
        name = kernel.fn.__name__
        found.append(Kernel((TILED | PLAIN).get(name, name), kernel, options, tile))

    def launch_best(launch: Callable[[Tile], None], name: str, config: Config, x: Tensor, *_: Any) -> None:
        nonlocal tile
        tile = config.tile(name, x.shape[2])
        launch(tile)
        tile = _PLAIN_TILE

    with (
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(forward, "launch_best", launch_best),
        mock.patch.object(backward, "launch_best", launch_best),
        mock.patch.object(backward, "get_config", lambda device, itemsize: shipped_config(target, itemsize)),
        torch.device("meta"),
    ):
        call()
    return found


def step_kernels(
    target: str,
    dtype: str,
    size: Size,
    plan: Plan = USUAL,
    *,
    fused: bool,
    slice_grad: bool = False,
    directions: str | None = None,
) -> dict[str, Kernel]:
    """The kernels of a training step by name; the backward is one kernel (`fused`) or two.

    `slice_grad`: as for a statistic of each direction (`reduction=None`).
    `directions`: their dtype, where it is not that of the embeddings: both are multiplied as float32.
    """
    (V, N, K, M), mixed = size, directions is not None
    half = dtype != "fp32" and not mixed
    config = shipped_config(target, 2 if half else 4)
    config = config._replace(fused={ANY: config.tile("fused", K)} if fused else {})
    # AMD's is that of the CPU.
    precision = default_precision(torch.device("cuda" if target.startswith("sm_") else "cpu"))

    def step() -> None:
        number = torch.empty((), dtype=torch.int64)
        A, scale = philox.draw_directions(number, K, M, 3, DTYPES[directions or dtype])
        x, t = torch.empty(V, N, K, dtype=DTYPES[dtype]), torch.empty(plan.J)
        shared = (x, A, scale if half else None, t, plan, config, precision)
        table = forward.table_sums(*shared)
        options: Any = {"unbiased": False, "scale_by_n": True, "factor": None if slice_grad else 0.1}
        value, coef = epilogue.statistic(table, N, shared[2], t, t, t, plan, **options)
        backward.gradient(value, 0.1, coef, *shared)

    return {kernel.name: kernel for kernel in reversed(launched(step, target))}  # of chunks the first


def color_kernels(size: int, kernel_size: int) -> list[Kernel]:
    """Those of `kernels/color_jitter.py` for crops of `size` px: the blur's two passes are of two types."""

    def call() -> None:
        view, rows = torch.empty(1, size, size, 3, dtype=torch.uint8), torch.empty(1, color_jitter.COLUMNS)
        color_jitter.change_colors(view, rows, kernel_size=kernel_size, threshold=128, blurred=True)

    return launched(call)


def compile_kernel(kernel: Kernel, target: str) -> Any:
    """Compile as the launcher would: types from values, 1 as a constant, divisibility by 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    options = dict(kernel.arguments)
    for index, parameter in enumerate(kernel.function.params):
        name, value = parameter.name, options.pop(parameter.name)
        special, whole = not parameter.do_not_specialize, isinstance(value, int)
        if parameter.is_constexpr or (special and whole and value == 1):
            constants[name], signature[name] = value, "constexpr"
            continue
        tensor = isinstance(value, Tensor)
        signature[name] = _POINTERS[value.dtype] if tensor else "i32" if whole else "fp32"
        if special and (tensor or (whole and value % 16 == 0)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature=signature, constexprs=constants, attrs=attributes)
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32) if nvidia else GPUTarget("hip", target, 64)
    return triton.compile(source, target=gpu, options=options)


# --- What the compiler makes of them ---------------------------------------------------------------

Case = tuple[str, Plan, Size, Kernel]
"""What is uneven about it, and a kernel for this size."""


def cases(target: str, dtype: str, *, uneven: bool = True) -> list[Case]:
    """Every kernel with its sizes; the giant size where it takes another tile than the reference.

    `uneven`: on sm_90 also sizes, knots and gradients that the shipped tiles were not chosen for.
    """
    config = shipped_config(target, 4 if dtype == "fp32" else 2)
    found: list[Case] = []

    def add(what: str, size: Size, *names: str, plan: Plan = USUAL, inputs: str = dtype, **more: Any) -> None:
        kernels = step_kernels(target, inputs, size, plan, fused="fused" in names, **more)
        found.extend((what.format(*size), plan, size, kernels[name]) for name in names)

    add("", REFERENCE, *PLAIN.values())
    for name in ("forward", "gradient", "product"):
        add("", REFERENCE, name)
        new = config.tile(name, GIANT.K) != config.tile(name, REFERENCE.K)
        if new or (target == "sm_90" and dtype == "bf16"):
            add("", GIANT, name)
    for K in config.fused:
        add("", REFERENCE._replace(K=K), "fused")
    if target == "sm_90" and dtype == "bf16":
        add("minimal", MINIMAL, "forward", "fused")
    if target != "sm_90" or dtype == "fp16" or not uneven:
        return found
    small, large = ("forward", "fused"), ("forward", "gradient", "product")
    if dtype == "fp32":  # embeddings in bf16 with directions in float32, read element by element
        add("bf16 x N {1} K {2} M {3}", ODD[1], *large, inputs="bf16", directions="fp32")
        return found
    for size in ODD:
        add("N {1} K {2} M {3}", size, *(small if size.K <= 64 else large))
    plans = [(f"J {knots}", make_plan(knots, 3 / (knots - 1))) for knots in (33, 65)]
    for what, plan in [*plans, ("arbitrary knots", make_plan(17, None))]:
        add(what + " K {2}", REFERENCE, "forward", "gradient", plan=plan)
        add(what + " K {2}", REFERENCE._replace(K=256), "fused", plan=plan)
        add(what + " K {2}", GIANT, "gradient", plan=plan)
    add("reduction None K {2}", REFERENCE._replace(K=64), "fused", slice_grad=True)
    add("reduction None K {2}", REFERENCE, "gradient", "product", slice_grad=True)
    return found


def inspect(compiled: Any, target: str, reductions: int = 1) -> Row:
    """Figures of a compiled kernel, with so many range reductions for each projected sample.

    AMD's come from its assembly text, without the hot loop.
    """

    def number(pattern: str) -> int:
        return int(re.findall(rf"{pattern}:\s*(\d+)", text)[-1])

    row: Row = {"shared_bytes": compiled.metadata.shared}
    if not target.startswith("sm_"):
        text = compiled.asm["amdgcn"]
        row |= {"registers": number(r"\.vgpr_count"), "stack_bytes": number(r"\.private_segment_fixed_size")}
        row["spills"] = number(r"\.vgpr_spill_count") + number(r"\.sgpr_spill_count")
        tensor = len(re.findall(r"\bv_mfma_", text))
        return row | {"tensor_instructions": tensor, "tensor_kind": "MFMA" if tensor else None}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(TOOLS / "cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    everything = Counter(_LINE.findall(text))
    row |= {"registers": number("REG"), "spills": everything["LDL"] + everything["STL"]}
    row |= {"stack_bytes": number("STACK"), "tensor_instructions": sum(everything[name] for name in TENSOR)}
    row["tensor_kind"] = next((name for name in TENSOR if everything[name]), None)
    row["code"] = Code(text)
    samples, loop = hot_loop(text)
    if samples:
        samples /= reductions
        kinds = {"fp32": FP32, "mufu": ("MUFU",), "shfl": ("SHFL",), "total": tuple(loop)}
        row["loop_samples"] = samples
        row["per_sample"] = {k: sum(loop[name] for name in names) / samples for k, names in kinds.items()}
    return row


def hot_loop(code: str) -> tuple[float, Counter[str]]:
    """Range reductions and instructions of the straight stretches of code that hold the reductions."""
    samples, counts = 0.0, Counter[str]()
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


def l2_bytes(kernel: Kernel, size: Size, plan: Plan, dtype: str, target: str) -> float:
    """Bytes that all programs of a launch read and write, the small tables aside."""
    item, tile, config = 4 if dtype == "fp32" else 2, kernel.tile, shipped_config(target, 2)
    rows, outputs = size.V * size.N, size.V * size.N * size.M
    if kernel.name == "fused":
        return item * (2.0 * rows * size.K + rows / tile.block_n * size.K * size.M)
    if kernel.name == "product":
        reads = outputs * size.K * (1 / tile.block_k + 1 / tile.block_n)
        return item * (reads + rows * size.K)
    chunks = plan.chunks if kernel.name == "forward" else 1
    samples = count_splits(size.V, size.N, size.M, chunks, config.split)[1] if tile.resident else tile.block_n
    reads = chunks * outputs * size.K * (1 / tile.block_m + 1 / samples)
    return item * (reads + (outputs if kernel.name == "gradient" else 0))


def floors(row: Row, kernel: Kernel, size: Size, plan: Plan) -> dict[str, float]:
    """Microseconds of a launch for the whole size on an H200, by pipe, and of the pipe that decides."""
    outputs = size.V * size.N * size.M
    products = 4 if kernel.name == "fused" else 2
    outputs *= plan.chunks if kernel.name == "forward" else 1  # each program of a table projects anew
    fp32 = row["per_sample"]["fp32"] * outputs / _FP32 if "per_sample" in row else 0.0
    matmul = products * outputs * size.K / _MATMUL[row["dtype"]]
    l2 = l2_bytes(kernel, size, plan, row["dtype"], row["target"]) / _L2
    threads = 32 * kernel.tile.num_warps
    resident = min(_REGISTERS // (threads * row["registers"]), _SHARED // (row["shared_bytes"] + 1024))
    both = max(fp32, matmul) if resident > 1 else fp32 + matmul
    figures = {"fp32_us": fp32, "matmul_us": matmul, "l2_us": l2, "floor_us": max(both, l2)}
    return {name: 1e6 * seconds for name, seconds in figures.items()} | {"programs_per_sm": resident}


class Tiles(NamedTuple):
    """How a step of one kernel is made of launches, programs and tiles."""

    launches: int
    programs: int  # of a launch
    tiles: int  # of a program
    steps: int  # of the matrix product of a tile
    flops: float  # of a tile


def tiles_of(kernel: Kernel, size: Size) -> Tiles:
    given, tile, (V, N, K, M) = kernel.arguments, kernel.tile, size
    steps, flops = -(-K // given["BLOCK_K"]), 2.0 * tile.block_m * tile.block_n * K
    if kernel.name == "fused":
        return Tiles(1, V * -(-N // tile.block_n), -(-M // tile.block_m), 1, 2 * flops)
    if kernel.name == "product":
        rows, steps = given["rows"], -(-M // tile.block_m)
        programs = -(-rows // tile.block_n) * -(-K // tile.block_k)
        return Tiles(-(-V * N // rows), programs, 1, steps, 2.0 * tile.block_n * tile.block_k * M)
    rows = V * N * given["CHUNKS"] if kernel.name == "forward" else given["out_ptr"].shape[0]
    samples = N if kernel.name == "forward" else given["n_stop"] - given["n_first"]
    programs = rows // samples * given["splits"] * -(-M // tile.block_m)
    launches = 1 if kernel.name == "forward" else -(-V * N // rows)
    return Tiles(launches, programs, -(-given["split_samples"] // tile.block_n), steps, flops)


class Code:
    """Machine code of a kernel: its instructions, and its loops from branch target to backward branch."""

    def __init__(self, text: str):
        found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)
        place = {int(address, 16): i for i, (address, _) in enumerate(found)}
        self.lines = [line for _, line in found]
        ends: dict[int, int] = {}
        for i, line in enumerate(self.lines):
            target = re.search(r"BRA\S* (?:`\()?0x([0-9a-f]+)", line)
            if target and place[int(target[1], 16)] < i:
                ends[place[int(target[1], 16)]] = i + 1
        self.loops = [range(*loop) for loop in ends.items()]

    def has(self, loop: range, *patterns: str) -> bool:
        return all(any(re.search(pattern, self.lines[i]) for i in loop) for pattern in patterns)

    def tile_loop(self, kernel: Kernel) -> range:
        """The loop over tiles: of those with the tensor cores and range reductions, the first and smallest.

        That of a product is the whole kernel, one tile.
        """
        whole = range(len(self.lines))
        wanted = ("|".join(TENSOR), _ROUND.pattern)
        found = [loop for loop in self.loops if self.has(loop, *wanted)]
        return whole if kernel.name == "product" else min(found, key=lambda loop: (len(loop), loop[0]))

    def times(self, loop: range, kernel: Kernel, steps: int) -> Counter[int]:
        """How often each instruction of a tile is executed."""
        times = Counter(loop)
        for inner in self.loops:
            if inner[0] < loop[0] or inner[-1] > loop[-1] or inner == loop:
                continue
            reduces, multiplies = self.has(inner, _ROUND.pattern), self.has(inner, "|".join(TENSOR))
            count = kernel.arguments["SUB_TILES"] if reduces else steps if multiplies else 1
            for i in inner:
                times[i] *= count
        return times

    def ahead(self, loop: range, times: Counter[int]) -> tuple[int | None, int]:
        """Instructions between the loads of the next tile or step and the first that needs one of them.

        Also the steps of the product that lie between them.
        """
        copies = [i for i in loop if self.lines[i].startswith("LDGDEPBAR")]
        waits = [i for i in loop if re.search(r"\bDEPBAR\.LE SB0", self.lines[i]) and times[i] > 1]
        if waits:  # asynchronous copies: a wait leaves so many groups of them in flight
            inner = min((r for r in self.loops if waits[0] in r), key=len)
            groups = int(self.lines[waits[0]].split()[-1], 16) // max(1, sum(i in inner for i in copies))
            return groups * len(inner), groups
        loads = [i for i in loop if times[i] == 1 and "LDG.E.128" in self.lines[i]]
        if not loads:
            return None, 0
        first = [int(re.findall(r"\bR(\d+)", self.lines[i])[0]) for i in loads]
        names = re.compile(r"\bR(" + "|".join(str(r + k) for r in first for k in range(4)) + r")\b")
        distance = 0
        for i in [*range(loads[-1] + 1, loop[-1] + 1), *range(loop[0], loads[-1])]:
            if names.search(self.lines[i]) and i not in loads:
                break
            distance += times[i]
        return distance, 0


def predict(row: Row, code: Code, kernel: Kernel, size: Size) -> Row:
    """Microseconds of a step on an H200 by the model above, and what it is made of."""
    loop, plan = code.tile_loop(kernel), tiles_of(kernel, size)
    times = code.times(loop, kernel, plan.steps)
    drains = sum(times[i] for i in loop if _DRAIN in code.lines[i])
    (ahead, ahead_steps), warps = code.ahead(loop, times), kernel.tile.num_warps
    samples = kernel.tile.block_m * kernel.tile.block_n / (32 * warps)
    # Clocks of a tile on a multiprocessor: issue slots, those of MUFU (16 lanes), product.
    issue = warps / 4 * sum(times.values())
    mufu = warps * 2 * sum(times[i] for i in loop if "MUFU" in code.lines[i])
    product = plan.flops / (_MATMUL[row["dtype"]] / _SMS / _CLOCK)
    tiles = plan.launches * -(-plan.programs // _SMS) * plan.tiles
    alone = row["floor_h200"]["programs_per_sm"] < 2 or plan.programs <= _SMS
    wait = 0.0
    if alone:
        # In a loop over steps each of the first loads of a tile is waited for.
        between = max((ahead or 0) * warps / 4, ahead_steps * product / plan.steps)
        late = 0.0 if ahead is None else max(0.0, _LOAD_CLOCKS - between)
        stepped = plan.steps > 1 and not kernel.tile.resident
        wait = drains * _DRAIN_CLOCKS + (_LOAD_CLOCKS + plan.steps * late if stepped else late)
    busy = issue + product if alone and kernel.name != "product" else max(issue, product)
    start = plan.launches * warps / 4 * -(-plan.programs // _SMS) * (len(code.lines) - len(loop))
    clocks = (max(busy, mufu) + wait) * tiles + start
    V, N, K, M = size
    item, outputs = (4 if row["dtype"] == "fp32" else 2), V * N * M if kernel.name != "forward" else 0
    moved = item * (V * N * K * (1 if kernel.name in ("forward", "gradient") else 2) + K * M)
    moved += item * outputs if kernel.name in ("gradient", "product") and plan.launches == 1 else 0
    memory = max(row["floor_h200"]["l2_us"] * 1e-6, moved / _DRAM)
    parts = {"issue_us": issue * tiles, "product_us": product * tiles, "wait_us": wait * tiles}
    parts = {name: 1e6 * figure / _CLOCK for name, figure in parts.items()}
    total = max(clocks / _CLOCK, memory) + plan.launches * _LAUNCH
    row |= {"ahead": ahead, "drains": drains}
    if kernel.name != "product":
        row["slots_per_sample"] = sum(times.values()) / samples
    return parts | {"memory_us": 1e6 * memory, "launches": plan.launches, "time_us": 1e6 * total}


def _row(target: str, dtype: str, uneven: str, plan: Plan, size: Size, kernel: Kernel) -> Row:
    row = {"triton": triton.__version__, "kernel": kernel.name, "uneven": uneven, "target": target}
    row |= {"dtype": dtype, **size._asdict()}
    reductions = 2 if plan.chunks > 1 else 1  # giant steps far from 0 have one of their own
    row |= {**kernel.tile._asdict(), **inspect(compile_kernel(kernel, target), target, reductions)}
    samples, code = row.pop("loop_samples", None), row.pop("code", None)
    if not plan.equidistant or kernel.name not in TILED.values():
        # A range reduction for each knot, which counts no samples; normals, where nothing is projected.
        row.pop("per_sample", None)
        return row
    # Packed instructions of sm_100 reduce two samples.
    if samples and "SUB_TILES" in kernel.arguments and target != "sm_100":
        due = kernel.tile.block_m * kernel.tile.block_n / kernel.arguments["SUB_TILES"]
        row["repeated"] = samples * 32 * kernel.tile.num_warps / due
    if target == "sm_90":
        row["floor_h200"] = floors(row, kernel, size, plan)
        row["predicted_h200"] = predict(row, code, kernel, size)
    return row


def report(target: str, dtypes: list[str], *, which: Literal["all", "even", "first"] = "all") -> list[Row]:
    """Rows of all cases, of those of even sizes, or of the first case of each kernel."""
    rows = []
    for dtype in dtypes:
        found = cases(target, dtype, uneven=which == "all")
        if which == "first":
            found = [*{case[-1].name: case for case in reversed(found)}.values()]
        rows += [_row(target, dtype, *case) for case in found]
    return rows


def violations(rows: list[Row], budgets: Row) -> list[str]:
    """What breaks the rules: no recorded budget, more spills than recorded (none, if none are), other
    tensor-core instructions, 10 % more FP32 instructions than recorded, more shared memory than a program
    can have.
    """
    found = []
    for row in rows:
        version = ".".join(row["triton"].split(".")[:2])
        name = f"{row['target']} {row['dtype']} {row['kernel']} {row['uneven'] or row['K']}"
        if row["shared_bytes"] > SHARED_BYTES[row["target"]]:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory")
        budget = budgets.get(f"triton {version} {name}") or budgets.get(name)
        if budget is None:
            found.append(f"{name}: no budget in {BUDGETS.name}")
            continue
        allowed = budget.get("spills", 0)
        if row["spills"] > allowed or (row["stack_bytes"] and not allowed):
            found.append(f"{name}: {row['spills']} spill instructions, {row['stack_bytes']} bytes of stack")
        if row.get("repeated", 1) > budget.get("repeated", 1):
            found.append(f"{name}: threads work on each projection {row['repeated']:g} times")
        if budget.get("tensor_kind") != row["tensor_kind"]:
            found.append(f"{name}: {row['tensor_kind']} instructions instead of {budget.get('tensor_kind')}")
        if "fp32" in budget:
            got, most = row["per_sample"]["fp32"], 1.1 * budget["fp32"]
            if got > min(most, budget.get("at_most", most)):
                found.append(f"{name}: {got:.1f} FP32 instructions a sample, budget {budget['fp32']:.1f}")
    return found


def measured(row: Row) -> float | None:
    """Microseconds of a step with this tile, as bench/tiles_bench.py timed it on an H200, or None."""
    wanted = {name: row[name] for name in (*Size._fields, "kernel")}
    wanted |= {"J": 17, "dtype": str(DTYPES[row["dtype"]]).removeprefix("torch.")}
    wanted["tile"] = {name: row[name] for name in Tile._fields}
    found = None
    for timed in read_rows(TIMES):
        on_h200 = "H200" in timed["device"] and "rehearsal" not in timed
        if on_h200 and wanted.items() <= timed.items() and timed["median_us"]:
            found = timed["median_us"] * row["predicted_h200"]["launches"]
    return found


def show_steps(rows: list[Row]) -> None:
    """Predicted time of forward and backward, beside the sum of the floors of its kernels."""
    table = []
    for name, (dtype, size) in STEPS.items():
        fuses = shipped_config("sm_90", 4 if dtype == "fp32" else 2).fuses(size.K, size.M)
        kernels = ("forward", "fused") if fuses else ("forward", "gradient", "product")
        wanted = {"dtype": dtype, **size._asdict()}
        even = [row for row in rows if "predicted_h200" in row and row["uneven"] in ("", "minimal")]
        known = {row["kernel"]: row for row in even if wanted.items() <= row.items()}
        if not known.keys() >= set(kernels):
            continue
        parts = [known[kernel]["predicted_h200"] for kernel in kernels]
        total = sum(part["time_us"] for part in parts) + 1e6 * _SMALL * len(PLAIN)
        floor = sum(known[kernel]["floor_h200"]["floor_us"] for kernel in kernels)
        launches = sum(part["launches"] for part in parts) + len(PLAIN)
        target = "200" if name == "reference bf16" else "-"
        table.append([name, "+".join(kernels), str(launches), f"{floor:.0f}", f"{total:.0f}", target])
    if table:
        print("\nA step on an H200. These are predictions: no GPU has measured them.\n")
        print_table(["step", "kernels", "launches", "floor us", "predicted us", "target us"], table)


def show(rows: list[Row]) -> None:
    header = ["kernel", "size", "target", "dtype", "tile", "regs", "spills", "shared", "tensor"]
    header += ["fp32/smp", "all/smp", "ahead", "drains", "issue us", "matmul us", "l2 us", "floor us"]
    header += ["predicted us", "measured us"]
    table = []
    for row in rows:
        tile = f"{row['block_m']}x{row['block_n']}x{row['block_k']} w{row['num_warps']} s{row['num_stages']}"
        tile += f" t{row['sub_tiles']}" + " resident" * row["resident"]
        cells = [row["kernel"], row["uneven"] or f"K {row['K']}", row["target"], row["dtype"], tile]
        cells += [str(row[key]) for key in ("registers", "spills", "shared_bytes", "tensor_kind")]
        floor, predicted = row.get("floor_h200", {}), row.get("predicted_h200", {})
        figures = [row.get("per_sample", {}).get("fp32"), row.get("slots_per_sample")]
        cells += ["-" if figure is None else f"{figure:.1f}" for figure in figures]
        figures = [row.get("ahead"), row.get("drains"), predicted.get("issue_us")]
        figures += [floor.get(name) for name in ("matmul_us", "l2_us", "floor_us")]
        figures += [predicted.get("time_us"), measured(row) if predicted else None]
        table.append([*cells, *("-" if figure is None else f"{figure:.0f}" for figure in figures)])
    print_table(header, table)
    show_steps(rows)


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
    print(f"reference {REFERENCE}, giant {GIANT}, J 17\n")
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    found = violations(rows, json.loads(BUDGETS.read_text())) if options.check else []
    for line in found:
        print(f"over budget: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
