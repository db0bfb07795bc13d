"""Watching a run: its rows, its log, TensorBoard, profile and times, also on a disk that refuses."""

from __future__ import annotations

import errno
import gzip
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from training import CPU, Make, file_size_limit, rows_of, train_only

from lejepa_fast.errors import RunError
from lejepa_fast.train.engine.metrics import LOG_LINES, Metrics, peak_memory_gib
from lejepa_fast.train.engine.profiling import ACTIVE, SKIPPED, WARM_UP
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model import flops
from lejepa_fast.train.runtime.files import read_rows


def metrics_in(folder: Path, *, tensorboard: bool = False, step: int = 0, total: int = 9) -> Metrics:
    return Metrics(folder, enabled=True, tensorboard=tensorboard, step=step, total_steps=total)


def test_a_refused_row_leaves_no_part_of_it(tmp_path: Path) -> None:
    metrics = metrics_in(tmp_path)
    metrics.write("eval", 1, knn=1.0)
    whole = metrics.path.read_bytes()
    message = r"metrics\.jsonl: No space left on device; free some"
    with file_size_limit(len(whole) + 5), pytest.raises(RunError, match=message) as refusal:
        metrics.write("eval", 2, knn=2.0)
    assert "\n" not in str(refusal.value)
    assert metrics.path.read_bytes() == whole
    with metrics:
        metrics.write("eval", 2, knn=3.0)
    assert [row["knn"] for row in read_rows(metrics.path)] == [1.0, 3.0]


def test_refused_tensorboard_events_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = metrics_in(tmp_path, tensorboard=True)
    writer = metrics._board._get_file_writer().event_writer._async_writer._writer

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "write", refuse)
    monkeypatch.setattr(writer, "flush", refuse)

    def write_rows() -> None:
        for step in range(1000):
            metrics.write("eval", step, knn=step / 7)

    with metrics, pytest.raises(RunError, match=r"cannot write .*tensorboard: No space left on device"):
        write_rows()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_in_a_terminal_and_few_lines_without_one(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run of 40 epochs of the embedded images: 1,400 steps of 3 s with a row each 5."""
    clock, screen = [100.0], io.StringIO()
    screen.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    caplog.set_level(logging.INFO)
    numbers = dict.fromkeys(("loss", "prediction", "sigreg", "images_per_second", "data_wait"), 0.5)
    with metrics_in(tmp_path, total=1400) as metrics:
        for step in range(1, 1401):
            clock[0] += 3.0
            metrics.advance()
            if step == 1 or step % 5 == 0:
                metrics.write("train", step, **numbers, memory_gib=1.0, mfu=0.25)
    rows = read_rows(metrics.path)
    assert [(row["step"], row["eta_seconds"]) for row in rows] == [
        (step, 3.0 * (1400 - step)) for step in (1, *range(5, 1401, 5))
    ]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lejepa_fast")]
    assert ("1400/1400" in screen.getvalue()) == terminal
    assert ("loss 0.5000" in screen.getvalue()) == terminal
    assert len(lines) == 0 if terminal else LOG_LINES - 5 < len(lines) <= LOG_LINES
    if not terminal:
        start = "step 1400/1400 | loss 0.5000 (prediction 0.5000, sigreg 0.500) | 0 images/s | MFU 25.0%"
        assert lines[-1].startswith(start)


def test_a_torn_last_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    with metrics_in(tmp_path, step=1) as metrics:
        metrics.write("eval", 1, knn=float("nan"))
    rows = [{"kind": "train", "step": 1}, {"kind": "eval", "step": 1, "knn": None}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_a_run_reports_flops_memory_and_a_profile_of_the_steps_it_names(tiny: Make) -> None:
    cfg = tiny(profile=True, max_steps=SKIPPED + WARM_UP + ACTIVE)
    trainer = train_only(cfg)
    (start,) = rows_of(cfg, "run")
    assert start["gflops_per_image"] == pytest.approx(flops.count_flops(cfg).per_image / 1e9, abs=1e-3)
    assert start["compiled_blocks"] == 0  # on a CPU, where nobody asked for it
    rows = rows_of(cfg)
    assert all("mfu" not in row for row in rows)  # the peak of a CPU is not known
    assert 0.05 < rows[-1]["memory_gib"] <= peak_memory_gib(trainer.world.device)
    stem = f"step-{SKIPPED + WARM_UP + ACTIVE:08d}"
    files = {path.name: path for path in (trainer.run_dir / "profile").iterdir()}
    assert set(files) == {f"{stem}.trace.json.gz", f"{stem}.operators.txt"}
    events = json.loads(gzip.decompress(files[f"{stem}.trace.json.gz"].read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("Optimizer.step#AdamW.step") == ACTIVE
    assert "[memory]" in names
    assert "aten::" in files[f"{stem}.operators.txt"].read_text()


def test_evaluations_and_saves_do_not_count_as_training(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes only in a save (5 s), in the evaluation (7 s), in a step (1 s) and for a batch (0.25 s)."""
    clock = [0.0]

    def takes(seconds: float, work: Any = lambda *args, **options: None) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            clock[0] += seconds
            return work(*args, **options)

        return timed

    cfg = tiny(eval={"every": 1}, max_steps=5)
    trainer = Trainer(cfg, CPU)
    batches = type(trainer.loader).__iter__
    monkeypatch.setattr(type(trainer.loader), "__iter__", lambda self: map(takes(0.25, list), batches(self)))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer.saver, "start", takes(5))
    monkeypatch.setattr(trainer, "evaluate", takes(7))
    monkeypatch.setattr(trainer, "train_step", takes(1, trainer.train_step))
    trainer.run()
    assert [row["save_seconds"] for row in rows_of(cfg)] == [0, 0, 0, 0, 5]
    assert [row["images_per_second"] for row in rows_of(cfg)] == [8 / 1.25] * 5
    assert [row["data_wait"] for row in rows_of(cfg)] == [0.25 / 1.25] * 5
