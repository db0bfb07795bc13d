"""The meter; metrics.jsonl and TensorBoard, also on a disk that refuses."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from lejepa_fast.errors import RunError
from lejepa_fast.train.engine.metrics import LOG_LINES, Meter, Metrics
from lejepa_fast.train.runtime.files import read_rows


def metrics_in(folder: Path, *, tensorboard: bool = False, step: int = 0) -> Metrics:
    return Metrics(folder, enabled=True, tensorboard=tensorboard, step=step, total_steps=9)


def write_rows(metrics: Metrics, count: int) -> None:
    for step in range(count):
        metrics.write("eval", step, knn=step / 7)


def test_a_refused_row_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = metrics_in(tmp_path)
    metrics.write("eval", 1, knn=1.0)
    whole = metrics.path.read_bytes()
    write, calls = os.write, []

    def half_of_it(descriptor: int, data: bytes) -> int:
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:5])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_of_it)
        with pytest.raises(RunError, match=r"metrics\.jsonl: No space left on device; free some") as refusal:
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
    with metrics, pytest.raises(RunError, match=r"cannot write .*tensorboard: No space left on device"):
        write_rows(metrics, 1000)
    assert "Traceback" not in capsys.readouterr().err


def test_meter_counts_images_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    meter = Meter()
    for _ in range(4):
        meter.add(100, waited=0.5)
    clock[0] = 12.5
    meter.pause(2.0)  # an evaluation
    meter.saved(0.5)
    assert meter.read() == {"images_per_second": 40.0, "data_wait": 0.2, "save_seconds": 0.5}
    clock[0] = 13.5
    meter.add(7, waited=0.0)
    assert meter.read() == {"images_per_second": 7.0, "data_wait": 0.0, "save_seconds": 0.0}


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_in_a_terminal_and_few_lines_without_one(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run of 40 epochs of the embedded images: 1,400 steps with a row each 5."""
    screen = io.StringIO()
    screen.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", screen)
    caplog.set_level(logging.INFO)
    numbers = dict.fromkeys(("loss", "prediction", "sigreg", "images_per_second", "data_wait"), 0.5)
    with Metrics(tmp_path, enabled=True, tensorboard=False, step=0, total_steps=1400) as metrics:
        for step in range(1, 1401):
            metrics.advance()
            if step == 1 or step % 5 == 0:
                metrics.write("train", step, **numbers, memory_gib=1.0, mfu=0.25)
    assert len(read_rows(metrics.path)) == 281
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lejepa_fast")]
    assert ("1400/1400" in screen.getvalue()) == terminal
    assert ("loss 0.5000" in screen.getvalue()) == terminal
    assert len(lines) == 0 if terminal else LOG_LINES - 5 < len(lines) <= LOG_LINES
    if not terminal:
        assert lines[-1].startswith(
            "step 1400/1400 | loss 0.5000 (prediction 0.5000, sigreg 0.500) | 0 images/s"
        )
        assert "MFU 25.0%" in lines[-1]


def test_a_torn_last_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    with metrics_in(tmp_path, step=1) as metrics:
        metrics.write("eval", 1, knn=float("nan"))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"kind": "train", "step": 1},
        {"kind": "eval", "step": 1, "knn": None},
    ]
