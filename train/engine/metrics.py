"""What a run reports: metrics.jsonl, TensorBoard, Weights & Biases on request; a progress bar or log lines.

Rows of metrics.jsonl, one JSON object a line (a value that is not finite is null):

    {"kind": "run", "step", "device", "world_size", ...}     at each start of the program
    {"kind": "train", "step", "epoch", "loss", "prediction", "sigreg", "lr", "images_per_second",
     "data_wait", "save_seconds", "mfu", "memory_gib", "eta_seconds", "grad_norm", "embedding_std"}
                                                             every `log_every` steps; with a masked
                                                             objective also "target_std", "within_std",
                                                             "within_rank", "between_rank", "padding",
                                                             "momentum"
                                                             (engine/objectives.py), with a schedule
                                                             "weight_decay"
    {"kind": "evaluating", "step", "epoch"}                  when an evaluation begins
    {"kind": "eval", "step", "epoch", "knn", "linear", ...}  every `eval.every` epochs and at the end
    {"kind": "skipped", "step", "epoch", "rank", "loss", "ids", "images"}
                                                             a step that was not finite, by rank

`step` counts finished steps, `images_per_second` images (not views) over all ranks; `data_wait` is the share
of wall time spent waiting for the loader. Both are since the last row, without evaluations and without
`save_seconds`, the time that checkpoints held up the training. `mfu` (model flops utilization) is the share
of the devices' dense bf16 peak, if it is known (gpu_specs.py). `memory_gib` is `peak_memory_gib` of rank 0.
`eta_seconds` is the time left at the pace since this start, saves and evaluations included.
"""

import contextlib
import errno
import json
import logging
import math
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lejepa_fast.regular_files import open_regular
from lejepa_fast.train.engine.weights_and_biases import WandbRun
from lejepa_fast.train.runtime.files import disk_errors_named, read_rows, write_atomically
from lejepa_fast.train.runtime.signals import Interrupted

log = logging.getLogger("lejepa_fast.train")

LOG_LINES = 20
"""A run without a terminal prints about so many lines of progress, and of evaluations, in all."""
_WAY_OUT = "free some space or choose another --out"


class Metrics:
    """Context that measures a run and writes its rows, if `enabled`: on rank 0. RunError if the disk refuses.

    `step` counts the finished steps; rows of metrics.jsonl beyond it are dropped, because their steps run
    again. `peak_rate` is images a second at the peak of all devices together; None: there is no MFU. `wandb`
    opens the run at Weights & Biases, which any exception but Interrupted marks as failed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool,
        tensorboard: bool,
        step: int,
        total_steps: int,
        peak_rate: float | None = None,
        wandb: Callable[[], WandbRun | None] = lambda: None,
    ):
        self.path = run_dir / "metrics.jsonl"
        self._enabled = enabled
        self._file: Any = None
        self._board: Any = None
        self._hook, self._former_hook = None, threading.excepthook
        self._wandb: WandbRun | None = None
        self._first_step, self._total_steps, self._peak_rate = step, total_steps, peak_rate
        self._logged: dict[str, int] = {}
        self._started = time.perf_counter()
        self.restart()
        self._board_folder = run_dir / "tensorboard"
        hidden: bool | None = True
        if enabled:
            hidden = None  # if there is no terminal
            with disk_errors_named(self.path, _WAY_OUT):
                _drop_rows_after(self.path, step)
                self._file = open_regular(self.path, "ab", buffering=0)
            if tensorboard:
                with disk_errors_named(self._board_folder, _WAY_OUT):
                    self._board = _open_board(self._board_folder, purge_step=step + 1)
                    self._hook = threading.excepthook
            self._wandb = wandb()  # last, so that no later failure leaves a run open there
        self._bar = tqdm(
            total=total_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1, disable=hidden
        )

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Close everything; raises nothing, since the rows are written already."""
        self._bar.close()
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        if threading.excepthook is self._hook:  # nobody else has set one meanwhile
            threading.excepthook = self._former_hook
        if self._wandb is not None:
            self._wandb.close(failed=kind is not None and not issubclass(kind, Interrupted))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a row, and its numbers to TensorBoard and W&B as `kind/name`; of kind "train" with `_times`."""
        if not self._enabled:
            return
        if kind == "train":
            values |= self._times(step)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        row = {"kind": kind, "step": step, **finite}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with disk_errors_named(self.path, _WAY_OUT):
            opened = os.fstat(self._file.fileno())
            if not (self.path.exists() and os.path.samestat(opened, self.path.stat())):
                raise OSError(errno.ENOENT, "the file or its folder was removed or moved during the run")
            end = opened.st_size
            if self._file.write(line) < len(line):  # part of a row would spoil the next one
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        numbers = {k: v for k, v in values.items() if type(v) in (int, float) and k != "epoch"}
        if self._board is not None:
            with disk_errors_named(self._board_folder, _WAY_OUT):
                for key, value in numbers.items():
                    self._board.add_scalar(f"{kind}/{key}", value, step)
        if self._wandb is not None:
            self._wandb.add(kind, step, numbers)
        if kind == "train":
            self._show(step, values)

    def restart(self) -> None:
        """Begin to count images and times anew."""
        self._images, self._waited, self._saving = 0, 0.0, 0.0
        self._since = time.perf_counter()

    def count_step(self, images: int, waited: float) -> None:
        """Count a step: images over all ranks, and seconds that this rank waited for its batch."""
        self._images += images
        self._waited += waited
        self._bar.update()

    def pause(self, seconds: float, *, saving: bool = False) -> None:
        """Leave out time that was not training: an evaluation or, counted as `save_seconds`, a save."""
        self._since += seconds
        self._saving += seconds * saving

    def _times(self, step: int) -> dict[str, float]:
        """What a row of kind "train" says of the time since the last one."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rate, waited = self._images / seconds, self._waited / seconds
        times = {"images_per_second": rate, "data_wait": waited, "save_seconds": self._saving}
        if self._peak_rate is not None:
            times["mfu"] = rate / self._peak_rate
        pace = (now - self._started) / max(1, step - self._first_step)
        self.restart()
        return times | {"eta_seconds": pace * max(0, self._total_steps - step)}

    def log_is_due(self, kind: str, step: int) -> bool:
        """Whether to log a line of this kind: about LOG_LINES of a run without a terminal."""
        since = step - self._logged.get(kind, -self._total_steps)
        due = since >= self._total_steps / LOG_LINES or step == self._total_steps or not self._bar.disable
        if due:
            self._logged[kind] = step
        return due

    def _show(self, step: int, values: dict[str, Any]) -> None:
        """Show a row on the progress bar or, without a terminal, as a line of the log."""
        parts = "(prediction {prediction:.4f}, sigreg {sigreg:.3f}) ".format_map(values)
        if "momentum" in values:  # I-JEPA: the loss is the prediction
            parts = "(target std {target_std:.3f}) ".format_map(values)
        text = (
            f"loss {values['loss']:.4f} {parts}| {values['images_per_second']:.0f} images/s | "
            f"{'MFU {mfu:.1%} | '.format_map(values) if 'mfu' in values else ''}"
            f"data wait {values['data_wait']:.0%} | {values['memory_gib']:.1f} GiB"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        elif self.log_is_due("train", step):
            left = tqdm.format_interval(int(values["eta_seconds"]))
            log.info("step %d/%d | %s | %s left", step, self._total_steps, text, left)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in GiB that this process has held: the allocator's on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _drop_rows_after(path: Path, step: int) -> None:
    text = "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step).encode()
    if path.exists() and text != path.read_bytes():
        write_atomically(path, text, way_out=_WAY_OUT)


def _open_board(folder: Path, *, purge_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # Its thread hands an OSError to the next call, and Python prints a traceback of it as well.
    default = threading.excepthook

    def without_writer(end: Any) -> None:
        if not (issubclass(end.exc_type, OSError) and type(end.thread).__name__ == "_AsyncWriterThread"):
            default(end)

    threading.excepthook = without_writer
    return SummaryWriter(str(folder), purge_step=purge_step)
