"""Everything to know about lejepa_fast on a GPU, in commands that fit a borrowed machine.

    python bench/gpu_check.py --out DIR --part 1    # timing: tiles, SIGReg at all sizes, ncu, torch.compile
    python bench/gpu_check.py --out DIR --part 2    # the reference again, kernel tests, a short training
    python bench/gpu_check.py --out DIR --part 3    # what fills the rest of the minutes
    python bench/gpu_check.py --out DIR --rehearse  # two of the stages in small on the CPU; measures nothing

A part takes at most five and a half minutes (`--minutes`). `--cache FOLDER` takes kernels that
`bake_cache.py` has compiled beforehand; rows of stages then count what had to be compiled all the same.

Stages run one after another, each in its own process with a time limit. What a stage leaves of its time goes
to the next ones, which get twice theirs at most; one that overruns takes no time from the others. A stage
that fails or overruns is reported, and the later ones still run. DIR gets the rows of the benchmarks as they
are measured, and `gpu_check.jsonl` with a row for each stage and, at the end, for each target. The package
need not be installed; PyTorch, Triton, timm, pytest and hypothesis must be. Without git history,
LEJEPA_COMMIT=HASH in the environment names the commit that the rows carry.

A stage that ran nothing (no test passed, no row written) has failed. Optional stages may lack their time or
their tool, but not fail. Exit codes: 0 all stages ran and all targets are met (in a rehearsal: all stages
ran), 1 something failed, was stopped or missed its target, 2 wrong usage, such as no GPU. A target that
another part measures may lack its figure.

To add a stage, add an entry to `STAGES`. A benchmark follows one rule, `python bench/X.py --out DIR`: it
appends its rows to DIR as they come, and its exit code says whether it worked.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bake_cache
import targets
import torch
from benchlib import ROOT, Row, Rows, command_line, print_table, read_rows
from tiles_bench import FIRST

PROCESSES = min(12, os.cpu_count() or 1)  # of the tests: each holds a context of the GPU
NO_TESTS = 5  # pytest's exit code
LEAST_SECONDS = 5  # a stage is not begun with less
PART_MINUTES = 5.5
LAST_SECONDS = 20  # kept to import PyTorch and to print the tables
GRACE = 5  # seconds that a stage gets to end after the signal to stop
END_SECONDS = 12  # kept for a benchmark to start and to end within its time


class Stage(NamedTuple):
    """One step of the check; optional are those of part 3 and those that need a tool."""

    name: str
    part: int
    seconds: int
    """It has so long, and up to twice that where earlier ones leave time."""
    arguments: tuple[str, ...]
    """Arguments for Python. {out} is the folder of the rows; {minutes} is the time that there is."""
    rows: str | None = None
    """File to which it must append a row."""
    case: str = ""
    """Case of the targets that is judged if it is part of the run."""
    needs: str = ""
    """Program or module without which there is nothing to run."""

    @property
    def optional(self) -> bool:
        return self.part == 3 or bool(self.needs)


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    """A benchmark of this folder."""
    return (str(ROOT / "bench" / name), *arguments, "--out", "{out}")


def _tests(*patterns: str, only: str) -> tuple[str, ...]:
    """Tests by file patterns and a pytest expression, in several processes."""
    found = sorted({str(path) for pattern in patterns for path in (ROOT / "tests").glob(pattern)})
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-rf", "--tb=short", "-k", only]
    # The options of pyproject.toml ask for plugins that may be missing.
    options += ["-c", str(ROOT / "pyproject.toml"), "-o", "addopts=--import-mode=importlib"]
    return (__file__, "--tests", *found, *options)


def _sigreg(part: int, seconds: int, case: str, *more: str) -> Stage:
    command = _script("sigreg_bench.py", "--cases", case, "--repeats", "30", *more)
    return Stage(" ".join(["sigreg", case, *more]), part, seconds, command, "sigreg.jsonl", case)


_TILES, _OTHERS = "kernel_tiles.jsonl", ("minimal-float32", "reference-float32")
_REFERENCE = _sigreg(1, 35, "reference-bfloat16", "--no-compile")
_KERNELS = ("kernels/kernel_*.py", "kernels/test_kernels_gpu.py")
_SLOW = "sanitizer or compile or 32_bits or generated"
_ACCURACY, _ACCURACY_ROWS = _script("accuracy_bench.py"), "sigreg_accuracy.jsonl"
# The backend "gpu", DALI on a GPU, is a parameter of these tests: other names hold "gpu", too.
_LOADER = _tests("data/test_*.py", only="[gpu")
_OTHER_TESTS = _tests("data/test_loader.py", "train/engine/test_step.py", only="on_the_gpu or for_the_gpu")
_BUDGET = ("--budget-minutes", "{minutes}")
STAGES = (
    Stage("environment", 1, 15, ("-m", "torch.utils.collect_env")),
    Stage("tiles", 1, 70, _script("tiles_bench.py", "--sizes", *FIRST), _TILES),
    _REFERENCE,
    _sigreg(1, 45, "giant-bfloat16"),
    _sigreg(1, 20, "minimal-float32", "--no-compile"),
    Stage("ncu", 1, 30, (__file__, "--ncu", "--out", "{out}"), needs="ncu"),
    _sigreg(1, 45, "reference-bfloat16"),
    _REFERENCE._replace(name="sigreg reference-bfloat16 again", part=2, seconds=25),
    _sigreg(2, 35, "reference-float32"),
    Stage("kernel tests", 2, 100, _tests(*_KERNELS, only=f"not ({_SLOW})")),
    Stage("accuracy", 2, 25, (*_ACCURACY, "--knots", "17"), _ACCURACY_ROWS, "accuracy"),
    Stage("training, 50 steps", 2, 30, _script("train_bench.py", "--smoke"), "train.jsonl"),
    _sigreg(2, 40, "minimal-float32"),
    Stage("other GPU tests", 3, 30, _OTHER_TESTS),
    Stage("loader tests", 3, 60, _LOADER, needs="nvidia.dali"),
    Stage("loader", 3, 60, _script("loader_bench.py", *_BUDGET), "loader.jsonl"),
    Stage("training", 3, 120, _script("train_bench.py", *_BUDGET), "train.jsonl"),
    Stage("sigreg, largest sizes", 3, 60, _script("sigreg_bench.py", "--largest"), "sigreg.jsonl"),
    Stage("sigreg, large sizes", 3, 60, _script("sigreg_bench.py", "--large"), "sigreg.jsonl"),
    Stage("sigreg, share of a step", 3, 60, _script("sigreg_bench.py", "--share"), "sigreg.jsonl"),
    Stage("sigreg against peers", 3, 60, _script("sigreg_bench.py", "--peers")),
    Stage("tiles of other sizes", 3, 90, _script("tiles_bench.py", "--sizes", *_OTHERS), _TILES),
    Stage("accuracy at other J", 3, 60, _ACCURACY, _ACCURACY_ROWS),
    Stage("sigreg against N and M", 3, 90, _script("sigreg_bench.py", "--sweep")),
    Stage("slow kernel tests", 3, 300, _tests(*_KERNELS, only=_SLOW)),
)
_CASE = _script("sigreg_bench.py", "--rehearse", "--repeats", "2", "--cases", FIRST[0])
REHEARSAL = (
    Stage("sigreg", 1, 90, _CASE, "sigreg.jsonl", FIRST[0]),
    Stage("training, 50 steps", 2, 30, _script("train_bench.py", "--rehearse", "--smoke"), "train.jsonl"),
)


class Outcome(NamedTuple):
    """`status`: ok, failed, stopped (overran its time), skipped (no time left) or absent (no tool for it)."""

    status: str
    seconds: float
    problem: str | None = None


def execute(arguments: Sequence[str], limit: float, environment: dict[str, str], folder: Path) -> Outcome:
    """Run Python with `arguments`, and stop it with all its processes after `limit` seconds."""
    began = time.monotonic()
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return Outcome("stopped", time.monotonic() - began, f"not done after {limit:.0f} s")
    finally:  # also at Ctrl-C, or at the end of the whole check: leave nothing running
        for number in (signal.SIGINT, signal.SIGKILL):  # at the first one pytest reports what failed so far
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    seconds = time.monotonic() - began
    return Outcome("failed", seconds, f"exit code {code}") if code else Outcome("ok", seconds)


# A kernel test mostly compiles, in one thread; the machine may lack pytest-xdist.
_SHARE = """
import sys, pytest
class Share:
    def pytest_collection_modifyitems(self, items):
        items[:] = items[int(sys.argv[1]) :: int(sys.argv[2])]
sys.exit(pytest.main(sys.argv[3:], plugins=[Share()]))
"""


def run_tests(arguments: Sequence[str]) -> int:
    """pytest with these arguments, a share of the tests in each process; 1 if a test fails or none passes."""

    def run(index: int) -> tuple[int, bool]:
        command = [sys.executable, "-c", _SHARE, str(index), str(PROCESSES), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        print(f"process {index}:", *(done.stdout + done.stderr).splitlines(), sep="\n  ", flush=True)
        return done.returncode, bool(re.search(r"\d+ passed", done.stdout))

    with ThreadPoolExecutor(PROCESSES) as pool:
        codes, passed = zip(*pool.map(run, range(PROCESSES)), strict=True)
    return int(not {*codes} <= {0, NO_TESTS} or not any(passed))


# One launch of each kernel at the reference size.
_STEP = """
import torch, lejepa_fast
x = torch.randn(8, 2048, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
lejepa_fast.SIGReg(1024, impl="triton").to("cuda")(x).backward()
"""


def run_ncu(out: Path) -> int:
    """Nsight Compute on a step: its report in out/kernels.ncu-rep, as text in out/kernels.txt."""
    report = str(out / "kernels.ncu-rep")
    command = ["ncu", "--clock-control", "none", "--set", "full", "-k", "regex:^_(sigreg|sum|directions)"]
    command += ["-f", "-o", report, sys.executable, "-c", _STEP]
    if code := subprocess.call(command):
        return code
    text = subprocess.run(["ncu", "--import", report, "--page", "details"], stdout=subprocess.PIPE, text=True)
    (out / "kernels.txt").write_text(text.stdout, encoding="utf-8")
    return int("_sigreg_fwd_kernel" not in text.stdout)


def installed(tool: str) -> bool:
    """Whether a program or a module can be found."""
    try:
        return bool(shutil.which(tool) or importlib.util.find_spec(tool))
    except ModuleNotFoundError:  # not even the package around the module
        return False


def rows_of(writer: Rows, name: str | None) -> list[Row]:
    """Rows of this check in a file of its folder."""
    rows = read_rows(writer.path.parent / name) if name else []
    return [row for row in rows if row["date"] >= writer.about["date"]]


def run_stages(
    stages: Sequence[Stage],
    writer: Rows,
    seconds: float,
    cache: Path | None = None,
    *,
    rehearse: bool = False,
) -> dict[Stage, Outcome]:
    """Run stages within so many seconds, in a rehearsal without limits, and write a row for each."""
    deadline = time.monotonic() + seconds - LAST_SECONDS
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg", "PYTHONPATH": path}
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the kernel tests ask for determinism
    if rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    outcomes: dict[Stage, Outcome] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if cache:
            bake_cache.install(cache, folder / "kernels")
            environment["TRITON_CACHE_DIR"] = str(folder / "kernels")
        for number, stage in enumerate(stages, 1):
            # Of the time that is left, the stages that must run keep theirs. A busy CPU tells nothing of it.
            left = deadline - time.monotonic() - GRACE
            kept = sum(each.seconds + GRACE for each in stages[number:] if each.part != 3)
            limit = left if rehearse else min(2 * stage.seconds, left - kept)
            print(f"\n=== {stage.name}: at most {max(0, limit):.0f} s", flush=True)
            before, kernels = len(rows_of(writer, stage.rows)), len([*folder.glob("kernels/*/*.cubin")])
            if stage.needs and not installed(stage.needs):
                outcome = Outcome("absent", 0.0, f"{stage.needs} is not installed")
            elif limit < LEAST_SECONDS:
                outcome = Outcome("skipped", 0.0, "no time is left")
            else:
                out, budget = str(writer.path.parent), f"{(limit - END_SECONDS) / 60:.2f}"
                arguments = [a.replace("{out}", out).replace("{minutes}", budget) for a in stage.arguments]
                outcome = execute(arguments, limit, environment, folder)
            if outcome.status == "ok" and stage.rows and len(rows_of(writer, stage.rows)) == before:
                outcome = outcome._replace(status="failed", problem=f"it wrote no row to {stage.rows}")
            outcomes[stage] = outcome
            print(f"=== {stage.name}: {outcome.status} {outcome.problem or ''}", flush=True)
            row = {"stage": stage.name, **outcome._asdict()}
            if cache:
                row["compiled"] = len([*folder.glob("kernels/*/*.cubin")]) - kernels
            writer.write(row)
    return outcomes


def summarize(outcomes: dict[Stage, Outcome], writer: Rows) -> int:
    """Write and print what the targets say, print the stages; the exit code."""
    rows = [row for name in targets.FILES for row in rows_of(writer, name)]
    judged = writer.write(*targets.judge(rows, *(stage.case for stage in outcomes)))
    print()
    cells = [[s.name, o.status, f"{o.seconds:.0f} s", o.problem or ""] for s, o in outcomes.items()]
    print_table(["stage", "", "time", "problem"], cells)
    print()
    targets.print_judged(judged)
    print(f"rows: {writer.path.parent}", flush=True)
    good = [("ok",), ("ok", "stopped", "skipped", "absent")]
    failed = any(outcome.status not in good[stage.optional] for stage, outcome in outcomes.items())
    # Of these cases another part measures the rest.
    elsewhere = {stage.case for stage in STAGES if stage not in outcomes}
    missed = [r for r in judged if r["met"] is False or (r["met"] is None and r["case"] not in elsewhere)]
    return int(failed or bool(missed and "rehearsal" not in writer.about))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, rehearse="in small, on the CPU")
    minutes = f"for all stages together; default: {PART_MINUTES} for each part"
    parser.add_argument("--minutes", type=float, help=minutes)
    parts = (1, 2, 3)
    parser.add_argument("--part", type=int, choices=parts, nargs="+", default=parts, help="default: all")
    parser.add_argument("--cache", type=Path, help="folder that bake_cache.py has filled")
    parser.add_argument("--ncu", action="store_true", help="only profile a launch of each kernel, and end")
    tests = "run pytest with all further arguments, in several processes, and end"
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help=tests)
    options = parser.parse_args(arguments)
    if options.tests:
        return run_tests(options.tests)
    if options.cache and not any(options.cache.glob("*/*.cubin")):
        parser.error(f"--cache: expected a folder that bake_cache.py has filled, got {options.cache}")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    if not options.rehearse and not torch.cuda.is_available():
        print("error: PyTorch finds no GPU here; --rehearse runs the stages on the CPU", file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --out: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    if options.ncu:
        return run_ncu(options.out)
    stages = REHEARSAL if options.rehearse else [stage for stage in STAGES if stage.part in options.part]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    writer = Rows(options.out.resolve() / "gpu_check.jsonl", "gpu_check", rehearsal=options.rehearse)
    seconds = 3600 if options.rehearse else 60 * (options.minutes or PART_MINUTES * len(options.part))
    return summarize(run_stages(stages, writer, seconds, options.cache, rehearse=options.rehearse), writer)


if __name__ == "__main__":
    sys.exit(main())
