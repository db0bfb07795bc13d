"""Everything that is to be known about lejepa_fast on a GPU, in one command of at most nine minutes.

    python bench/gpu_check.py --out DIR             # with a GPU; the package need not be installed
    python bench/gpu_check.py --out DIR --rehearse  # the same stages in small on the CPU; measures nothing
    python bench/gpu_check.py --out DIR --only training  # this stage with all the minutes: all of its cases

Stages run one after another, the most important first, each in a process of its own with a limit of time: its
own seconds, and up to as many again that earlier ones left. One that fails or overruns is reported, and the
later ones still have theirs. DIR gets the
rows of the benchmarks as they are measured, and `gpu_check.jsonl` with a row for each stage and each target.
The later, optional stages fill what is left of the nine minutes: it is no failure if that is too little.
Without the git history, LEJEPA_COMMIT=HASH in the environment names the commit that the rows carry.

Exit codes: 0 all stages but optional ones ran and all targets are met (of a rehearsal: all stages ran), 1
something failed, was stopped or missed its target, 2 wrong usage, such as no GPU.

Adding a stage: an entry in `STAGES` below. A benchmark follows one rule, `python bench/X.py --out DIR`: it
appends its rows to DIR as they come, prints by lines, and its exit code says whether it worked. One that also
knows --rehearse, for a few seconds on a CPU, can be part of the rehearsal; one that knows --budget-minutes is
told how much time it has.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BENCH, TESTS = ROOT / "bench", ROOT / "tests"
LEAST_SECONDS = 5  # a stage is not begun with less
LAST_SECONDS = 20  # kept to stop what runs and to print the tables
END_SECONDS = 12  # kept for a benchmark to start and to end within its time
# What the stages use beyond PyTorch and pytest; without them they do less, and say so.
HELPFUL = (
    "triton",
    "tyro",
    "timm",
    "pytest_timeout",
    "hypothesis",
    "matplotlib",
    "lightly",
    "lejepa",
)
NO_TESTS = {"kernel_helpers"}
OTHER_TILES = ("minimal-float32", "reference-float32", "giant-bfloat16")
GENERATED, SANITIZER = "kernel_generated", "sanitizer_finds_nothing"


class Run(NamedTuple):
    """What is run: on which machine, and whether it counts."""

    out: Path
    rehearse: bool
    seconds: float = 0.0  # until the stage is stopped

    @property
    def extra(self) -> list[str]:
        return ["--out", str(self.out), *(["--rehearse"] if self.rehearse else [])]


class Stage(NamedTuple):
    """One step of the check.

    Attributes:
        name: as it is reported.
        seconds: kept for it while earlier ones run; twice that, where there is so much, it is stopped. One
            that is optional is stopped after its seconds, and nothing is kept for it.
        command: arguments of Python, or a sentence that says why there is nothing to run.
        cases: cases of the targets (`gpu_targets.py`) that can be judged when it is done.
        rehearsed: whether a rehearsal runs it: with --rehearse, it takes seconds on a CPU.
        optional: whether it may lack the time; if it fails, it fails.
        rows: file of rows of kind `target`, which are judged already; when the stage runs alone, they are
            the check's targets. (With less time it measures some of them only.)
    """

    name: str
    seconds: int
    command: Callable[[Run], list[str] | str]
    cases: tuple[str, ...] = ()
    rehearsed: bool = True
    optional: bool = False
    rows: str | None = None


def _script(name: str, *arguments: str, budget: bool = False) -> Callable[[Run], list[str] | str]:
    """A benchmark of this folder, where the checkout has it; `budget`: it is told how much time there is."""

    def command(run: Run) -> list[str] | str:
        path = BENCH / name
        told = ["--budget-minutes", f"{(run.seconds - END_SECONDS) / 60:.2f}"] if budget else []
        if not path.is_file():
            return f"no bench/{name} in this checkout"
        return [str(path), *arguments, *told, *run.extra]

    return command


def _pytest(*arguments: str, parallel: bool = True) -> list[str]:
    """Tests in a process, or in many; the options of pyproject.toml ask for plugins that may not be there."""
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-rf", "--tb=short"]
    options += ["-o", "addopts=--import-mode=importlib", "-c", str(ROOT / "pyproject.toml")]
    runner = [str(BENCH / "parallel_tests.py")] if parallel else ["-m", "pytest"]
    return [*runner, *arguments, *options]


def _kernel_tests(run: Run) -> list[str]:
    """The tests that also run in the interpreter, and the ones that need a GPU."""
    files = [
        str(path)
        for path in sorted((TESTS / "kernels").glob("kernel_*.py"))
        if path.stem not in NO_TESTS | {GENERATED}
    ]
    if run.rehearse:
        return _pytest(*files, "-k", "double_backward", parallel=False)
    return _pytest(*files, str(TESTS / "kernels" / "test_kernels_gpu.py"), "-k", f"not {SANITIZER}")


def _generated_cases(run: Run) -> list[str] | str:
    if not importlib.util.find_spec("hypothesis"):
        return "hypothesis is not installed: the generated cases are left out"
    return _pytest(str(TESTS / "kernels" / f"{GENERATED}.py"))


def _sanitizer(run: Run) -> list[str] | str:
    if shutil.which("compute-sanitizer") is None:
        return "no compute-sanitizer on PATH"
    return _pytest(str(TESTS / "kernels" / "test_kernels_gpu.py"), "-k", SANITIZER)


def _loader_tests(run: Run) -> list[str] | str:
    """Parity of the DALI pipeline on the GPU with torchvision, and the loader's own GPU tests."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "DALI is not installed"
    names = ("parity", "loader", "backends", "corpus", "bad_images", "large", "headers")
    files = [str(TESTS / f"test_data_{name}.py") for name in names]
    return _pytest(*files, "-k", "gpu", parallel=False)


def _smoke(run: Run) -> list[str]:
    small = ["--steps", "2", "--device", "cpu", "--impl", "torch"]
    return [str(BENCH / "pretrain_smoke.py"), *(small if run.rehearse else []), *run.extra]


def _sigreg(case: str, seconds: int) -> Stage:
    command = _script("sigreg_bench.py", "--cases", case, "--repeats", "30")
    return Stage(f"sigreg {case}", seconds, command, cases=(case,), rehearsed=False)


_LATER: dict[str, Any] = {"rehearsed": False, "optional": True}
STAGES = (
    Stage("environment", 40, lambda run: [str(Path(__file__)), "--describe", *run.extra]),
    Stage("kernel tests", 120, _kernel_tests),
    _sigreg("reference-bfloat16", 80),
    _sigreg("minimal-float32", 60),
    _sigreg("giant-bfloat16", 40),
    _sigreg("reference-float32", 50),
    Stage("accuracy", 50, _script("accuracy_bench.py"), cases=("accuracy",), rehearsed=False),
    Stage("tiles", 40, _script("tiles_bench.py", "--sizes", "reference-bfloat16")),
    Stage("pretraining, 50 steps", 30, _smoke),
    Stage("generated cases", 120, _generated_cases, **_LATER),
    Stage("tiles of other sizes", 90, _script("tiles_bench.py", "--sizes", *OTHER_TILES), **_LATER),
    Stage("loader tests", 90, _loader_tests, **_LATER),
    Stage("loader", 60, _script("loader_bench.py", budget=True), **_LATER),
    Stage("training", 60, _script("train_bench.py", budget=True), rows="train.jsonl", **_LATER),
    _sigreg("minimal-bfloat16", 80)._replace(optional=True),
    Stage("sigreg against N and M", 90, _script("sigreg_bench.py", "--sweep-only"), **_LATER),
    Stage("sanitizer", 300, _sanitizer, **_LATER),
)
# The cases of the benchmark are rehearsed in one process.
REHEARSAL = (
    Stage(
        "sigreg, all cases",
        90,
        _script("sigreg_bench.py", "--cases", "minimal-float32", "--repeats", "2"),
        cases=("reference-bfloat16", "giant-bfloat16", "minimal-float32", "reference-float32", "accuracy"),
    ),
)


# --- Running a stage ------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """`status`: ok, failed, stopped (overran its time), skipped (no time left) or absent (nothing to run)."""

    status: str
    seconds: float
    problem: str | None = None


def execute(arguments: Sequence[str], limit: float, environment: dict[str, str], folder: Path) -> Outcome:
    """Run Python with `arguments`, pass its lines on as they come, and stop it after `limit` seconds."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=folder,
        start_new_session=True,  # so that its own processes can be stopped with it
    )
    last: collections.deque[str] = collections.deque(maxlen=40)

    def forward() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            print(f"  {line.rstrip()}", flush=True)

    reader = threading.Thread(target=forward, daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        stop(process)
        reader.join(5)
        return Outcome("stopped", time.monotonic() - began, f"not done after {limit:.0f} s")
    except BaseException:  # Ctrl-C, or the end of the whole check: leave nothing running
        stop(process)
        raise
    reader.join(5)
    seconds = time.monotonic() - began
    if code == 0:
        return Outcome("ok", seconds)
    if code == 5 and any("pytest" in a or "parallel_tests" in a for a in arguments[:2]):
        return Outcome("absent", seconds, "no such tests")
    said = next((line.strip() for line in reversed(last) if line.strip()), "nothing was printed")
    return Outcome("failed", seconds, f"exit code {code}: {said[:300]}")


def stop(process: subprocess.Popen[str]) -> None:
    # At the first one pytest still tells what failed so far.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            break
    with contextlib.suppress(ProcessLookupError):  # what it started may not have followed it
        os.killpg(process.pid, signal.SIGKILL)


def make_environment(rehearse: bool, site: Path) -> dict[str, str]:
    """The environment of the stages, which import the package from `site`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the kernel tests ask for determinism
    if rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return environment


def link_checkout(site: Path) -> None:
    """Make `site` a folder to import this checkout's lejepa_fast from, laid out as an installation would.

    `kernels/` and `train/` lie beside the package and are imported as parts of it (setup.py). So nothing
    needs to be installed, and what is installed from elsewhere is not what is checked.
    """
    package = site / "lejepa_fast"
    package.mkdir(parents=True)
    for entry in [*(ROOT / "lejepa_fast").iterdir(), ROOT / "kernels", ROOT / "train"]:
        (package / entry.name).symlink_to(entry)


# --- The check ------------------------------------------------------------------------------------


class Check:
    """Runs the stages and keeps the rows."""

    def __init__(self, run: Run, minutes: float, folder: Path, began: float, only: str | None = None):
        self.run = run
        self.only = only
        self.folder = folder
        self.deadline = began + 60 * minutes - LAST_SECONDS
        link_checkout(folder / "site")
        self.environment = make_environment(run.rehearse, folder / "site")
        sys.path.insert(0, str(folder / "site"))
        import benchlib  # only now: without PyTorch, --help still answers

        self.lib = benchlib
        self.about = benchlib.machine()
        self.began = self.about["date"]
        self.path = run.out / "gpu_check.jsonl"
        self.outcomes: dict[str, Outcome] = {}
        self.judged: list[dict[str, Any]] = []

    def stages(self) -> list[Stage]:
        if self.only:
            stage = next(stage for stage in STAGES if stage.name == self.only)
            return [stage._replace(seconds=round(self.deadline - time.monotonic()))]
        if not self.run.rehearse:
            return list(STAGES)
        return [*REHEARSAL, *(stage for stage in STAGES if stage.rehearsed)]

    def limit(self, stage: Stage, left: float, later: Sequence[Stage]) -> float:
        """Seconds for a stage: later ones that must run keep theirs, or a share if that is too much."""
        if stage.optional:
            return min(stage.seconds, left)
        kept = sum(each.seconds for each in later if not each.optional)
        share = left * stage.seconds / (stage.seconds + kept)
        return min(2 * stage.seconds, max(share, left - kept))

    def carry_out(self, stage: Stage, later: Sequence[Stage] = ()) -> None:
        left = self.deadline - time.monotonic()
        limit = self.limit(stage, left, later)
        print(f"\n=== {stage.name}: at most {max(0, limit):.0f} s", flush=True)
        command = stage.command(self.run._replace(seconds=limit))
        if isinstance(command, str):
            outcome = Outcome("absent", 0.0, command)
        elif left < LEAST_SECONDS:
            outcome = Outcome("skipped", 0.0, "no time is left")
        else:
            outcome = execute(command, limit, self.environment, self.folder)
        self.outcomes[stage.name] = outcome
        print(f"=== {stage.name}: {describe(outcome)}", flush=True)
        self._append({"stage": stage.name, **outcome._asdict()})
        self._judge(stage)

    def _judge(self, stage: Stage) -> None:
        """The targets that this stage was for: their rows are kept now, whatever happens later."""
        import gpu_targets

        if self.only and stage.rows:
            rows = self.lib.read_rows(self.run.out / stage.rows)
            self.judged += [r for r in rows if r["kind"] == "target" and r["date"] >= self.began]
            return
        targets = [target for target in gpu_targets.TARGETS if target.case in stage.cases]
        if not targets:
            return
        rows = [row for name in gpu_targets.FILES for row in self.lib.read_rows(self.run.out / name)]
        judged = gpu_targets.judge([row for row in rows if row["date"] >= self.began], targets)
        self.judged += judged
        for row in judged:
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        marks = {"rehearsal": True} if self.run.rehearse else {}
        self.lib.append_rows(self.path, [{"benchmark": "gpu_check", **row, **marks, **self.about}])

    def summarise(self) -> int:
        """Print both tables; the exit code."""
        import gpu_targets

        print()
        stages = [[name, o.status, f"{o.seconds:.0f} s"] for name, o in self.outcomes.items()]
        self.lib.print_table(["stage", "", "time"], stages)
        print()
        self.lib.print_table(["target", "goal", "figure", "met or not"], gpu_targets.table_of(self.judged))
        notes = [(row["target"], row["reason"] or row.get("note")) for row in self.judged]
        if self.run.rehearse:
            notes = [("no target is measured", "this was a rehearsal")]
        for name, note in [*((n, o.problem) for n, o in self.outcomes.items()), *notes]:
            if note:
                print(f"{name}: {note}", flush=True)
        print(f"rows: {self.run.out}", flush=True)
        optional = {stage.name for stage in STAGES if stage.optional and not self.only}
        failed = any(
            outcome.status == "failed" or (outcome.status in ("stopped", "skipped") and name not in optional)
            for name, outcome in self.outcomes.items()
        )
        missed = any(not row["met"] for row in self.judged)
        return 1 if failed or (missed and not self.run.rehearse) else 0


def describe(outcome: Outcome) -> str:
    return f"{outcome.status} after {outcome.seconds:.0f} s" + (
        f" ({outcome.problem})" if outcome.problem else ""
    )


def print_environment() -> None:
    import benchlib
    import torch

    import lejepa_fast

    for key, value in benchlib.machine().items():
        print(f"{key}: {value}")
    print(f"lejepa_fast: {Path(lejepa_fast.__file__).parent}")
    print(f"not installed: {', '.join(n for n in HELPFUL if not importlib.util.find_spec(n)) or '-'}")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "none, and Triton needs one")
    print(f"C compiler: {compiler}")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(f"memory: {free / 2**30:.0f} GiB free of {total / 2**30:.0f} GiB")
        for name in ("clocks.sm", "clocks.max.sm"):
            print(f"{name}: {benchlib.nvidia_smi(name)} MHz")
        x = torch.randn(64, 8, device="cuda").requires_grad_()
        loss = lejepa_fast.SIGReg(num_slices=16, impl="triton").to("cuda")(x)
        loss.backward()
        print(f"impl='triton' works: SIGReg of 64 normal samples is {loss.item():.3f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all rows")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--rehearse", action="store_true", help="in small, on the CPU")
    parser.add_argument(
        "--only", choices=[stage.name for stage in STAGES], help="this stage, with all minutes"
    )
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if options.describe:
        print_environment()
        return 0
    if options.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("error: PyTorch finds no GPU here; --rehearse runs the stages on the CPU", file=sys.stderr)
            return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --out: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options.out.resolve(), options.rehearse)
        check = Check(run, options.minutes, Path(folder), began, options.only)
        stages = check.stages()
        for number, stage in enumerate(stages):
            check.carry_out(stage, stages[number + 1 :])
        return check.summarise()


if __name__ == "__main__":
    sys.exit(main())
