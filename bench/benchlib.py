"""What all benchmarks share: the command line, the row writer, tables."""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lejepa_fast.kernels.runtime import interpreting

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# Options of the trainer for many short runs on a CPU. They stay when the preset changes: rows made with them
# are compared with older ones.
SHORT_RUN = ["--preset", "laptop", "--model", "resnet18"]
SHORT_RUN += ["--model.kwargs", '{"channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]}']
SHORT_RUN += ["--crops.global-scale", "0.3", "1.0", "--crops.local-scale", "0.1", "0.4"]
SHORT_RUN += ["--crops.brightness", "0.4", "--crops.contrast", "0.4", "--crops.saturation", "0.2"]
SHORT_RUN += ["--crops.hue", "0.1", "--crops.grayscale-prob", "0.1"]


def let_interpreter_take_numpy() -> None:
    """Triton 3.6's interpreter converts loop bounds, arrays of one element, by `int`: NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if interpreting():
    let_interpreter_take_numpy()


def command_line(description: str | None, *, rehearse: str | None = None) -> argparse.ArgumentParser:
    """A parser with `--out` and, given its help text, `--rehearse`."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=plain)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows (%(default)s)")
    if rehearse:
        parser.add_argument("--rehearse", action="store_true", help=rehearse)
    return parser


class Rows:
    """Appends rows to a JSONL file as they come; each row says how and where it was measured.

    All rows of one object have the same date: they are one measurement.
    """

    def __init__(
        self, path: Path, benchmark: str, device: torch.device | None = None, *, rehearsal: bool = False
    ):
        self.path = path
        self.about: Row = {"benchmark": benchmark, **machine(device)}
        if rehearsal:
            self.about["rehearsal"] = True

    def write(self, *rows: Mapping[str, Any]) -> list[Row]:
        """Append `rows`; returns them as written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = [{**row, **self.about} for row in rows]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in written)
        return written

    def known(self, wanted: Mapping[str, Any]) -> list[Row]:
        """The rows of the file with these values: what need not be measured again."""
        return [row for row in read_rows(self.path) if wanted.items() <= row.items()]


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file: none without the file, and not the last line of an interrupted write."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def machine(device: torch.device | None = None) -> Row:
    """Where and with what a row is measured; `device` defaults to the GPU if there is one.

    LEJEPA_COMMIT in the environment names the commit of a copy without git history.
    """
    gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": nvidia_smi("driver_version") if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "commit": _commit(),
        "command": repeatable(sys.argv),
    }


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvidia_smi(field: str) -> str | None:
    """What nvidia-smi reports about the first GPU, or None where there is no nvidia-smi."""
    answer = _output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"])
    return answer.splitlines()[0].strip() if answer else None


def repeatable(argv: Sequence[str]) -> str:
    """The command line without `--out`, whose folder exists on one machine only."""
    arguments = shlex.join(["python", os.path.relpath(argv[0], ROOT), *argv[1:]])
    return re.sub(r" --out[ =]('[^']*'|\S+)", "", arguments)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return f"{match.group(1)}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    if os.environ.get("LEJEPA_COMMIT"):
        return os.environ["LEJEPA_COMMIT"]
    commit = _output(["git", "rev-parse", "--short", "HEAD"])
    # Rows that a run has just written do not change what it measures.
    code = [":(top)", ":(top,exclude)bench/results"]
    changed = _output(["git", "status", "--porcelain", "--untracked-files=no", "--", *code])
    return f"{commit}+changes" if commit and changed else commit


def _output(command: Sequence[str]) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip() or None


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip(), flush=True)


def print_rows(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    print_table(list(columns), cells(rows, columns))


def cells(rows: Sequence[Row], columns: Mapping[str, str]) -> list[list[str]]:
    """The lines of a table: a column is a format of the row, and "-" where a row lacks the figure."""

    def cell(form: str, row: Row) -> str:
        try:
            return form.format_map(row)
        except (KeyError, TypeError):  # no such key, or None
            return "-"

    return [[cell(form, row) for form in columns.values()] for row in rows]


def first_line(failure: BaseException) -> str:
    """Type and first line of an exception, at most 200 characters."""
    return traceback.format_exception_only(failure)[0].splitlines()[0][:200]
