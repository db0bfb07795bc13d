"""What the benchmarks share: where a row was measured, statistics of timings, peak memory, tables."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_ROOT = Path(__file__).resolve().parents[1]
RESULTS = _ROOT / "bench" / "results"


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Where and with what a row was measured; without a device, on the GPU if there is one.

    A copy of the files without their git history has no commit of its own: LEJEPA_COMMIT can name it.
    """
    row: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _commit(),
        "command": _command(sys.argv),
    }
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        row["device"] = torch.cuda.get_device_name()
        row["driver"] = nvidia_smi("driver_version")
    return row


def _command(argv: Sequence[str]) -> str:
    """The command as it can be repeated elsewhere: without the folder that this machine kept the rows in."""
    arguments = shlex.join(["python", os.path.relpath(argv[0], _ROOT), *argv[1:]])
    return re.sub(r" --out[ =]('[^']*'|\S+)", "", arguments)


def nvidia_smi(field: str) -> str | None:
    """What nvidia-smi says about the first GPU, or None where there is no nvidia-smi."""
    answer = _output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"])
    return answer.splitlines()[0].strip() if answer else None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"model name\s*:\s*(.+)", text)
    return f"{match.group(1) if match else platform.machine()}, {os.cpu_count()} cores"


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _commit() -> str | None:
    if os.environ.get("LEJEPA_COMMIT"):
        return os.environ["LEJEPA_COMMIT"]
    commit = _output(["git", "rev-parse", "--short", "HEAD"])
    # Rows that a run has just written do not change what it measures.
    code = [":(top)", ":(top,exclude)bench/results"]
    dirty = _output(["git", "status", "--porcelain", "--untracked-files=no", "--", *code])
    return f"{commit}+changes" if commit and dirty else commit


def _output(command: Sequence[str]) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip() or None


Mark = Callable[[], None]


class Timed(NamedTuple):
    """What is timed: `run` of what `prepare` makes, untimed, from the number of the repetition.

    `run` calls the function that it gets beside its input between forward and backward.
    """

    prepare: Callable[[int], Any]
    run: Callable[[Any, Mark], Any]


class Times(NamedTuple):
    """Seconds of the repetitions of one call; no parts where the call does not mark them."""

    forward: list[float]
    backward: list[float]
    forward_backward: list[float]


def cpu_time(call: Timed, repeat: int) -> tuple[float | None, float | None, float]:
    """Seconds of one repetition: forward, backward, both."""
    prepared = call.prepare(repeat)
    marks: list[float] = []
    start = time.perf_counter()
    call.run(prepared, lambda: marks.append(time.perf_counter()))
    end = time.perf_counter()
    if not marks:
        return None, None, end - start
    return marks[0] - start, end - marks[0], end - start


def interleaved_times(
    calls: Mapping[str, Timed],
    repeats: int,
    once: Callable[[Timed, int], tuple[float | None, float | None, float]] = cpu_time,
    warm_up: int = 2,
) -> dict[str, Times]:
    """Seconds of each call, taking turns so that a slow spell of the machine hits all alike."""
    times = {name: Times([], [], []) for name in calls}
    for call in calls.values():  # compilation, allocator, caches
        for repeat in range(warm_up):
            once(call, repeat)
    for repeat in range(repeats):
        for name, call in calls.items():
            for kept, seconds in zip(times[name], once(call, repeat), strict=True):
                if seconds is not None:
                    kept.append(seconds)
    return times


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile, in milliseconds."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p20_ms": 1e3 * deciles[1],
        "p80_ms": 1e3 * deciles[7],
    }


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Resident memory of this process at its peak during `call`, above what it holds before.

    Linux only: the kernel's high-water mark of the resident set, reset before the call.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    call()
    return 1024 * (_status_kib("VmHWM") - before)


def _status_kib(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only")
    return int(match.group(1))


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none without the file, and none of a line that was not finished."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip(), flush=True)
