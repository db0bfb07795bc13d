"""What a run reports: metrics.jsonl always, TensorBoard unless switched off, Weights & Biases on request, a
progress bar or log lines.

Rows of metrics.jsonl (one JSON object a line; a value that is not finite is written as null):

    {"kind": "run", "step", "device", "world_size", ...}     at each start of the program
    {"kind": "train", "step", "epoch", "loss", "prediction", "sigreg", "lr", "images_per_second",
     "data_wait", "save_seconds", "mfu", "memory_gib", "eta_seconds", "grad_norm", "embedding_std"}
                                                             every `log_every` steps
    {"kind": "eval", "step", "epoch", "knn", "linear", ...}  every `eval.every` epochs and at the end
    {"kind": "skipped", "step", "epoch", "rank", "loss", "ids", "images"}
                                                             a step that was not finite, by rank (skipped.py)

`step` counts finished steps, `data_wait` is the share of wall time spent waiting for the loader, and
`images_per_second` counts images (not views) over all ranks; both are over the steps since the last row,
without evaluations and without `save_seconds`, during which the training stood still for checkpoints.
`mfu`, model flops utilisation, is the share of the devices' dense bf16 peak that the model's operations
make (see flops.py and accelerators.py); where the peak is not known there is none. `memory_gib` is the most
that rank 0 has held since the program started: of the allocator on a GPU, else of the process.
`eta_seconds` is the time left at the pace since this start, saves and evaluations included.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from lejepa_fast.errors import RunError
from lejepa_fast.train.engine.weights_and_biases import WandbRun
from lejepa_fast.train.runtime.files import write_atomically
from lejepa_fast.train.runtime.signals import Interrupted

log = logging.getLogger("lejepa_fast.train")

_WAY_OUT = "free some space or choose another --out"


class Metrics:
    """Writer of a run folder's metrics; on ranks other than 0 build it with `enabled=False`.

    Rows beyond `step` are dropped: they come from a run that went on after the checkpoint that this one
    resumes from, and their steps are about to be run again. `wandb` opens the run there, if one is
    asked for. A context: what is raised in it, but for an interruption, marks the run there as failed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool,
        tensorboard: bool,
        step: int,
        total_steps: int,
        wandb: Callable[[], WandbRun | None] = lambda: None,
    ):
        self.path = run_dir / "metrics.jsonl"
        self._enabled = enabled
        self._board: Any = None
        self._wandb: WandbRun | None = None
        self._bar: tqdm | None = None
        if not enabled:
            return
        with _refusals_named(self.path):
            _drop_rows_after(self.path, step)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._board_path = run_dir / "tensorboard"
        if tensorboard:
            self._board = _open_board(self._board_path, purge_step=step + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)
        self._total_steps = total_steps
        self._started, self._first_step = time.perf_counter(), step
        try:
            self._wandb = wandb()  # last: nothing that fails after it leaves a run open there
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None and not isinstance(error, Interrupted))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a row, and its numbers elsewhere under `kind/name`. RunError if the disk refuses."""
        if not self._enabled:
            return
        if kind == "train":
            values["eta_seconds"] = self._seconds_left(step)
        row = {"kind": kind, "step": step, **{key: _json_number(value) for key, value in values.items()}}
        with _refusals_named(self.path):
            _append_whole(self._file, (json.dumps(row, allow_nan=False) + "\n").encode())
        numbers = {key: value for key, value in values.items() if _is_number(value) and key != "epoch"}
        if self._board is not None:
            with _refusals_named(self._board_path):
                for key, value in numbers.items():
                    self._board.add_scalar(f"{kind}/{key}", value, step)
        if self._wandb is not None:
            self._wandb.add(kind, step, numbers)
        if kind == "train":
            self._show(step, values)

    def advance(self) -> None:
        """One more step on the progress bar."""
        if self._bar is not None:
            self._bar.update()

    def close(self, *, failed: bool = False) -> None:
        """Never an error: rows are in the file already, and TensorBoard's last are worth no traceback."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        if self._wandb is not None:
            self._wandb.close(failed=failed)
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _seconds_left(self, step: int) -> float:
        pace = (time.perf_counter() - self._started) / max(1, step - self._first_step)
        return pace * max(0, self._total_steps - step)

    def _show(self, step: int, values: dict[str, Any]) -> None:
        parts = (
            f"loss {values['loss']:.4f} "
            f"(prediction {values['prediction']:.4f}, sigreg {values['sigreg']:.3f})"
            f" | {values['images_per_second']:.0f} images/s"
        )
        if "mfu" in values:
            parts += f" | MFU {values['mfu']:.1%}"
        parts += f" | data wait {values['data_wait']:.0%} | {values['memory_gib']:.1f} GiB"
        if values.get("save_seconds"):
            parts += f" | save {values['save_seconds']:.1f} s"
        if self._bar is not None:
            self._bar.set_postfix_str(parts)
            return
        left = tqdm.format_interval(int(values["eta_seconds"]))
        log.info("step %d/%d | %s | %s left", step, self._total_steps, parts, left)


class Meter:
    """Wall time, waiting time and images since the last reading.

    `flops_per_image` are operations of the model and `peak_flops` those that all devices together can do in
    a second; without either there is no MFU.
    """

    def __init__(self, *, flops_per_image: float | None = None, peak_flops: float | None = None) -> None:
        self._share_per_image = flops_per_image / peak_flops if flops_per_image and peak_flops else None
        self.restart()

    def restart(self) -> None:
        """Forget what was counted."""
        self._images, self._waited, self._saving = 0, 0.0, 0.0
        self._since = time.perf_counter()

    def add(self, images: int, waited: float) -> None:
        """Count one step: images over all ranks, and seconds that this rank waited for its batch."""
        self._images += images
        self._waited += waited

    def read(self) -> dict[str, float]:
        """`images_per_second`, `data_wait`, `save_seconds` and, if known, `mfu` since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        values = {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        values["save_seconds"] = self._saving
        if self._share_per_image is not None:
            values["mfu"] = values["images_per_second"] * self._share_per_image
        self._images, self._waited, self._saving, self._since = 0, 0.0, 0.0, now
        return values

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training: an evaluation."""
        self._since += seconds

    def saved(self, seconds: float) -> None:
        """Leave out what a save held up the training, and count it."""
        self._saving += seconds
        self.pause(seconds)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: tensors on a GPU (allocator's count), else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; [] if there is no such file. A torn last line (power cut) is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            log.warning("%s: left out a line that is not JSON", path)
    return rows


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = read_rows(path)
    kept = [row for row in rows if row.get("step", 0) <= step]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if text == path.read_text(encoding="utf-8"):
        return
    write_atomically(path, lambda file: file.write(text.encode()), way_out=_WAY_OUT)


def _append_whole(descriptor: int, row: bytes) -> None:
    """Append the row to the file, or nothing of it and raise OSError: half a row would spoil the next one."""
    end = os.fstat(descriptor).st_size
    try:
        left = memoryview(row)
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


def _open_board(folder: Path, *, purge_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    with _refusals_named(folder):
        board = SummaryWriter(str(folder), purge_step=purge_step)
    # It writes in a thread, passes an error on to the next call and lets Python print a traceback as well.
    report = threading.excepthook

    def report_others(end: Any) -> None:
        if not (issubclass(end.exc_type, OSError) and type(end.thread).__name__ == "_AsyncWriterThread"):
            report(end)

    threading.excepthook = report_others
    return board


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """RunError, naming the path, for an OSError inside."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; {_WAY_OUT}") from error
