"""Train a grid of runs: `python train/sweep.py --grid loss.lambd=0.01,0.05 --out DIR -- OPTIONS`.

OPTIONS are those of train/pretrain.py, and hold for all runs. Each run is a process of train/pretrain.py with
its own folder DIR/NAME, named by its values, and its output in DIR/NAME.log. Called again, the sweep leaves
out finished runs and resumes the others. At the end: a table, DIR/sweep.json, sweep.png and plane.png. Exit
codes: 0 done, 1 a run failed, 2 wrong usage, 130 Ctrl-C; after SIGTERM 0, as of the trainer.
"""

import dataclasses
import difflib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from lejepa_fast.errors import RunError, UsageError, printable
from lejepa_fast.train import config
from lejepa_fast.train.config.names import resolve_name
from lejepa_fast.train.report.runs import END_SHARE, RunRecord, json_text, read_run
from lejepa_fast.train.runtime.command import (
    aligned,
    checked_arguments,
    log_to_stderr,
    parse_options,
    run_command,
)
from lejepa_fast.train.runtime.files import disk_errors_named, write_atomically
from lejepa_fast.train.runtime.signals import Interrupted, SignalWatch

SCRIPT = Path(__file__).with_name("pretrain.py")
POLL_SECONDS = 0.2
# Settings that a run may be continued with, or counts as done with, although they are others now.
_MAY_DIFFER = {"out", "resume", "device", "compile", "log_every", "checkpoint_every", "keep_checkpoints"} | {
    *("tensorboard", "wandb", "profile", "data.workers", "data.prefetch", "data.backend", "data.value_range"),
}
_FIGURES = ("knn_trained", "knn_untrained", "linear_trained", "linear_untrained", "effective_rank", "rankme")


@dataclass(frozen=True)
class Options:
    """Train a grid of runs. Options of train/pretrain.py, after `--`, hold for all of them."""

    grid: tuple[str, ...]
    """Options by their names in config.json and their values: KEY=VALUE,VALUE ..., such as
    loss.lambd=0.01,0.05; or KEY=[JSON, ...] for values with commas, or of several numbers."""
    out: Path
    """Folder of the sweep, which gets a run folder for each point of the grid."""
    jobs: config.settings.AtLeast1 | None = None
    """Runs at a time, in turn on the GPUs; None: one for each GPU, without GPUs one."""
    index: int | None = None
    """Train this point of the grid alone, numbered from 0: for job arrays."""
    list: bool = False
    """Print the numbered points and their commands, and train nothing."""


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    values: dict[str, Any]
    """Value of each option of the grid, by its name in config.json."""
    folder: Path
    command: list[str]
    """That trains it."""

    @property
    def log(self) -> Path:
        """Gets the output of the run."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def finished(self) -> bool:
        """Whether the run has its report."""
        return (self.folder / "report" / "summary.json").is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    log_to_stderr()
    return run_command(lambda: _sweep(argv))


def _sweep(argv: Sequence[str] | None) -> None:
    arguments = [*checked_arguments(argv)]
    middle = arguments.index("--") if "--" in arguments else len(arguments)
    options, shared = parse_options(Options, arguments[:middle]), arguments[middle + 1 :]
    points = make_points(options.grid, shared, options.out)
    if options.list:
        for number, point in enumerate(points):
            print(number, shlex.join(point.command))
        return
    if options.index is not None:
        if not 0 <= options.index < len(points):
            raise UsageError(f"index: expected 0 to {len(points) - 1}, the points, got {options.index}")
        point = points[options.index]
        if point.finished:
            print(f"{point.folder} is finished")
            return
        sys.stdout.flush()
        os.execv(sys.executable, point.command)  # which gets the signals of the job
    failed = run_points(points, jobs=options.jobs)
    finish(points, options.out, {"grid": list(options.grid), "options": shared}, failed)
    if failed:
        first = next(iter(failed.values()))
        raise RunError(f"{len(failed)} of {len(points)} runs failed, the first with: {first}")


def make_points(grid: Sequence[str], shared: Sequence[str], out: Path) -> list[Point]:
    """Return the points of a grid, the last option varying fastest; every configuration is checked.

    Args:
        grid: texts KEY=VALUE,VALUE or KEY=[JSON, ...].
        shared: options of train/pretrain.py for all runs.
        out: folder of the sweep.

    Raises:
        UsageError: an unknown key, a value that the trainer refuses, a value given twice, or a folder that
            holds a run with other settings.
    """
    for name in ("--out", "--resume"):
        if any(each == name or each.startswith(f"{name}=") for each in shared):
            raise UsageError(f"{name}: a sweep chooses the folder of each run, and resumes it; leave it out")
    base = config.flat(config.to_dict(config.parse(shared)))
    axes = [_axis(text, base) for text in grid]
    keys = [key for key, _ in axes]
    if not axes:
        raise UsageError("grid: expected KEY=VALUE,VALUE, got nothing")
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise UsageError(f"grid: {min(twice)} is given twice; put all its values into one list")
    points: dict[Path, Point] = {}
    for choice in itertools.product(*(values for _, values in axes)):
        arguments = [*shared, *itertools.chain.from_iterable(choice)]
        cfg = config.resolve(config.parse(arguments))
        settings = config.flat(config.to_dict(cfg))
        values = {key: settings[key] for key in keys}
        folder = out / _name(values)
        if folder in points:
            raise UsageError(
                f"grid: two points have the name {folder.name}; leave out equal values, and values "
                "that differ in no letter or digit"
            )
        config.validate(dataclasses.replace(cfg, out=folder))
        if "model.name" in keys:
            resolve_name(cfg.model.name)
        _check_same_settings(folder, settings)
        command = [sys.executable, str(SCRIPT), *arguments, "--out", str(folder)]
        points[folder] = Point(values, folder, command)
    return list(points.values())


def _axis(text: str, base: Mapping[str, Any]) -> tuple[str, list[list[str]]]:
    """Key and values of an axis, each value as arguments of train/pretrain.py."""
    key, equals, listed = text.partition("=")
    key = key.lstrip("-").replace("-", "_")
    if not equals or not listed:
        raise UsageError(f"grid: expected KEY=VALUE,VALUE, got {text!r}")
    if key in ("out", "resume") or key not in base:
        near = difflib.get_close_matches(key, base.keys() - {"out", "resume"}, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near and key not in base else ""
        raise UsageError(f"grid: expected an option by its name in config.json, got {key!r}{hint}")
    values: list[Any] = listed.split(",")
    if listed.startswith("["):
        try:
            values = json.loads(listed)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"grid: {key}: {listed} is not JSON: {error}") from error
    if not values or "" in values:
        raise UsageError(f"grid: {key}: expected values between the commas, got {text!r}")
    return key, [_arguments(key, value, base[key]) for value in values]


def _arguments(key: str, value: Any, example: Any) -> list[str]:
    """An option of train/pretrain.py; `example` is a value of it."""
    section, _, name = key.rpartition(".")
    name = name.replace("_", "-")
    prefix = f"--{section}." if section else "--"
    if isinstance(example, bool):
        if str(value).lower() not in ("true", "false"):
            raise UsageError(f"grid: {key}: expected true or false, got {value!r}")
        return [prefix + ("" if str(value).lower() == "true" else "no-") + name]
    if isinstance(value, list):
        return [prefix + name, *map(str, value)]
    if isinstance(value, dict):
        return [prefix + name, json.dumps(value)]
    return [prefix + name, str(value)]


def _name(values: Mapping[str, Any]) -> str:
    """A folder's name for these values."""
    parts = [f"{k}={'-'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in values.items()]
    return re.sub(r"[^A-Za-z0-9_.=,+-]+", "-", ",".join(parts)).strip("-")


def _check_same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise UsageError if the folder holds a run with other settings."""
    if not (folder / "config.json").is_file():
        return
    theirs = config.flat(config.to_dict(config.load_json(folder / "config.json")))
    for key in settings.keys() - _MAY_DIFFER:
        if theirs[key] != settings[key]:
            raise UsageError(
                f"out: {folder} holds a run with {key} {theirs[key]}, and this sweep has {settings[key]}; "
                "choose another --out"
            )


def run_points(
    points: Sequence[Point],
    *,
    jobs: int | None = None,
    ended: Callable[[Point], object] = lambda point: None,
) -> dict[Path, str]:
    """Train all points that are not finished, and print a line when one ends.

    Args:
        points: see `make_points`.
        jobs: runs at a time; None: the number of GPUs, at least 1.
        ended: called with each point that is finished, also with those that were before.

    Returns:
        For each run that failed, by its folder, why. SIGTERM and Ctrl-C end the runs that are training, which
        save their state first, and raise Interrupted.
    """
    failed: dict[Path, str] = {}
    waiting = [point for point in points if not point.finished]
    if len(waiting) < len(points):
        print(f"{len(points) - len(waiting)} of {len(points)} runs are finished already", flush=True)
    for point in points:
        if point.finished:
            ended(point)
    gpus: Sequence[str | None] = _gpus() or [None]
    free = [gpus[i % len(gpus)] for i in range(jobs or len(gpus))]
    running: dict[subprocess.Popen[bytes], tuple[Point, str | None, float]] = {}
    with (signals := SignalWatch()):
        try:
            while (waiting or running) and not signals.requested:
                while waiting and free:
                    point, gpu = waiting.pop(0), free.pop(0)
                    running[_start(point, gpu)] = point, gpu, time.monotonic()
                time.sleep(POLL_SECONDS)
                for process in [each for each in running if each.poll() is not None]:
                    point, gpu, began = running.pop(process)
                    free.append(gpu)
                    if point.finished and not process.returncode:
                        said = f"{_figures(read_run(point.folder))}, {time.monotonic() - began:.0f} s"
                        ended(point)
                    else:
                        failed[point.folder] = _reason(point, process.returncode)
                        said = f"failed: {failed[point.folder]}"
                    count = len(points) - len(waiting) - len(running)
                    print(f"[{count}/{len(points)}] {point.folder.name}: {said}", flush=True)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
        if signals.signum is not None:
            text = f"stopped by {Signals(signals.signum).name}; run the same command again to continue"
            raise Interrupted(text, signals.signum)
    return failed


def _gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _start(point: Point, gpu: str | None) -> "subprocess.Popen[bytes]":
    """Start a run in a session of its own: Ctrl-C at the terminal reaches it through this process alone."""
    environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    with disk_errors_named(point.log, "choose another --out"):
        point.log.parent.mkdir(parents=True, exist_ok=True)
        with point.log.open("ab") as file:
            return subprocess.Popen(
                point.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )


def _reason(point: Point, code: int) -> str:
    """Why a run failed: the last error of its log, else its exit code; and where the log is. A run that got
    SIGTERM by itself ends with code 0; the last line of its log says so."""
    lines = point.log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines[-50:] if not code or re.match(r"error|\w*Error\b", line)]
    return f"{printable(errors[-1]) if errors else f'exit code {code}'} ({point.log})"


def _figures(run: RunRecord) -> str:
    accuracies = {name: run.summary.get(f"{name}_trained") for name in ("knn", "linear")}
    known = [f"{name} {value:.1f} %" for name, value in accuracies.items() if value is not None]
    return ", ".join([f"loss {run.loss:.4g}", *known])


def finish(points: Sequence[Point], out: Path, asked: Mapping[str, Any], failed: Mapping[Path, str]) -> None:
    """Print the table of a sweep, and write sweep.json and the figures of the runs that are finished."""
    runs = {point.folder: read_run(point.folder) for point in points if point.finished}
    rows = []
    for point in points:
        row: dict[str, Any] = {"run": point.folder.name, "values": point.values, "state": "unfinished"}
        if run := runs.get(point.folder):
            losses = {name: getattr(run, name) for name in ("loss", "prediction", "sigreg")}
            figures = {name: run.summary.get(name) for name in _FIGURES}
            row |= {"state": run.state, "steps": run.steps, **losses, **figures}
        if point.folder in failed:
            row |= {"state": "failed", "error": failed[point.folder]}
        rows.append(row)
    text = json_text({**asked, "loss_over_last": END_SHARE, "runs": rows})
    write_atomically(out / "sweep.json", text.encode(), way_out="choose another --out")
    print(_table(rows))
    if known := [point for point in points if point.folder in runs]:
        from lejepa_fast.train.report.run_plots import plot_grid, plot_loss_plane

        with disk_errors_named(out, "choose another --out"):
            plot_grid(out / "sweep.png", [point.values for point in known], list(runs.values()))
            plot_loss_plane(out / "plane.png", list(runs.values()))
    written = "sweep.json, sweep.png, plane.png" if known else "sweep.json"
    print(f"{out}: {written}; without labels: lejepa-select {out}/*/")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = list(rows[0]["values"])
    figures = [("loss", ".4g"), ("knn_trained", ".1f"), ("linear_trained", ".1f"), ("effective_rank", ".3g")]
    lines = [[*keys, "loss", "kNN %", "linear %", "eff. rank", "state"]]
    for row in rows:
        cells = ["-" if row.get(name) is None else f"{row[name]:{form}}" for name, form in figures]
        lines.append([*(str(row["values"][key]) for key in keys), *cells, row["state"]])
    return aligned(lines)


if __name__ == "__main__":
    sys.exit(main())
