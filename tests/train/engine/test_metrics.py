"""Watching a run: rows, log, TensorBoard, profile, times, Weights & Biases, also on a disk that refuses."""

import errno
import gzip
import io
import json
import logging
import os
import random
import signal
import sys
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from training import CPU, file_size_limit, rows_of, train_only

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.engine.metrics import LOG_LINES, Metrics, peak_memory_gib
from lejepa_fast.train.engine.profiling import ACTIVE, SKIPPED, WARM_UP
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.engine.weights_and_biases import WandbRun
from lejepa_fast.train.model import flops
from lejepa_fast.train.runtime.files import read_rows
from lejepa_fast.train.runtime.signals import Interrupted


def metrics_in(folder, *, tensorboard=False, step=0, total=9, **options):
    return Metrics(folder, enabled=True, tensorboard=tensorboard, step=step, total_steps=total, **options)


def test_a_refused_row_leaves_no_part_of_it(tmp_path):
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


def test_refused_tensorboard_events_are_one_line(tmp_path, monkeypatch, capsys):
    """What hides the second message of them goes with the run."""
    hook = threading.excepthook
    metrics = metrics_in(tmp_path, tensorboard=True)
    assert threading.excepthook is not hook
    writer = metrics._board._get_file_writer().event_writer._async_writer._writer

    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "write", refuse)
    monkeypatch.setattr(writer, "flush", refuse)

    def write_rows():
        for step in range(1000):
            metrics.write("eval", step, knn=step / 7)

    with metrics, pytest.raises(RunError, match=r"cannot write .*tensorboard: No space left on device"):
        write_rows()
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is hook
    theirs = Mock()
    (tmp_path / "other").mkdir()
    with metrics_in(tmp_path / "other", tensorboard=True):
        monkeypatch.setattr(threading, "excepthook", theirs)
    assert threading.excepthook is theirs, "set meanwhile by something else"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_in_a_terminal_and_few_lines_without_one(terminal, tmp_path, monkeypatch, caplog):
    """A run of 40 epochs of the embedded images: 1,400 steps of 3 s, a row each 5, an evaluation each 35."""
    clock, screen = [100.0], io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    caplog.set_level(logging.INFO)
    numbers = dict.fromkeys(("loss", "prediction", "sigreg"), 0.5)
    evaluations = 0
    with metrics_in(tmp_path, total=1400, peak_rate=64.0) as metrics:
        for step in range(1, 1401):
            clock[0] += 3.0
            metrics.count_step(48, waited=1.5)
            if step == 1 or step % 5 == 0:
                metrics.write("train", step, **numbers, memory_gib=1.0)
            evaluations += step % 35 == 0 and metrics.log_is_due("eval", step)
    rows = read_rows(metrics.path)
    assert [(row["step"], row["eta_seconds"]) for row in rows] == [
        (step, 3.0 * (1400 - step)) for step in (1, *range(5, 1401, 5))
    ]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lejepa_fast")]
    assert ("1400/1400" in screen.getvalue()) == terminal
    assert ("loss 0.5000" in screen.getvalue()) == terminal
    if terminal:
        assert (len(lines), evaluations) == (0, 40)
    else:
        assert LOG_LINES - 3 < len(lines) <= LOG_LINES + 1
        assert LOG_LINES - 3 < evaluations <= LOG_LINES + 1
        start = "step 1400/1400 | loss 0.5000 (prediction 0.5000, sigreg 0.500) | 16 images/s | MFU 25.0% | "
        assert lines[-1].startswith(start + "data wait 50% | 1.0 GiB")


def test_lines_that_are_no_rows_are_left_out(tmp_path, caplog):
    """Torn by a power cut, or spoilt by whatever else writes there."""
    path = tmp_path / "metrics.jsonl"
    spoilt = [b'{"kind": "train", "step": 1, "\xff": 2}', b"12", b"null", b"[1]", b"[" * 100_000]
    spoilt += [
        b'{"kind": "train"}',
        b'{"step": 1}',
        b'{"kind": 3, "step": 1}',
        b'{"kind": "train", "step": "1"}',
    ]
    path.write_bytes(b"\n".join([*spoilt, b'{"kind": "train", "step": 1}', b'{"kind": "train", "st']))
    with metrics_in(tmp_path, step=1) as metrics:
        metrics.write("eval", 1, knn=float("nan"))
    rows = [{"kind": "train", "step": 1}, {"kind": "eval", "step": 1, "knn": None}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert "metrics.jsonl: skipped 10 line(s) that are no rows" in caplog.text


def test_a_pipe_in_the_place_of_the_rows_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match=r"metrics\.jsonl: a pipe or device, not a file; move it"):
        metrics_in(tmp_path)


def test_a_run_reports_flops_memory_and_a_profile_of_the_steps_it_names(tiny):
    cfg = tiny(profile=True, max_steps=SKIPPED + WARM_UP + ACTIVE)
    trainer = train_only(cfg)
    (start,) = rows_of(cfg, "run")
    assert start["gflops_per_image"] == pytest.approx(flops.count_flops(cfg).per_image / 1e9, abs=1e-3)
    assert start["compiled"] is False  # on a CPU, where nobody asked for it
    rows = rows_of(cfg)
    assert all("mfu" not in row for row in rows)  # the peak of a CPU is not known
    assert 0.05 < rows[-1]["memory_gib"] <= peak_memory_gib(trainer.world.device)
    stem = f"step-{SKIPPED + WARM_UP + ACTIVE:08d}"
    (trace,) = (trainer.run_dir / "profile").iterdir()
    assert trace.name == f"{stem}.trace.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("Optimizer.step#AdamW.step") == ACTIVE
    assert "[memory]" in names


def test_evaluations_and_saves_do_not_count_as_training(tiny, monkeypatch):
    """Time passes only in a save (5 s), in the evaluation (7 s), in a step (1 s) and for a batch (0.25 s)."""
    clock = [0.0]

    def takes(seconds, work=lambda *args, **options: None):
        def timed(*args, **options):
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


# ---- Weights & Biases --------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """Stands for the package, and draws random numbers as that may; nothing goes over a network."""
    module = Mock()

    def init(**options):
        random.random(), np.random.standard_normal(), torch.rand(())  # noqa: NPY002
        return module.run

    module.init.side_effect = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_numbers_of_all_rows_and_costs_no_random_number(wandb, tiny, monkeypatch):
    cfg = tiny(wandb="birds", max_steps=5, eval={"every": 1, "linear_steps": 5})
    train_only(cfg)
    states = random_state.capture_rng()
    first = wandb.init.call_args.kwargs
    assert (first["project"], first["dir"], first["resume"]) == ("birds", str(cfg.out), "allow")
    assert first["config"]["optim"]["lr"] == 1e-3
    wandb.run.define_metric.assert_called_once_with("*", step_metric="step")
    logged = [call.args[0] for call in wandb.run.log.call_args_list]
    losses = [(row["step"], row["train/loss"]) for row in logged if "train/loss" in row]
    assert losses == [(row["step"], row["loss"]) for row in rows_of(cfg)]
    probes = [(row["step"], row["eval/knn"], row["eval/linear"]) for row in logged if "eval/knn" in row]
    assert probes == [(row["step"], row["knn"], row["linear"]) for row in rows_of(cfg, "eval")]
    assert (len(losses), len(probes)) == (5, 1)
    wandb.run.finish.assert_called_once_with(exit_code=0)

    train_only(tiny(wandb="birds", max_steps=6))
    assert wandb.init.call_args.kwargs["id"] == first["id"]  # the same run there
    monkeypatch.delitem(sys.modules, "wandb")
    train_only(tiny(max_steps=5, out=cfg.out.with_name("without")))
    assert random_state.capture_rng() == states
    assert "wandb" not in sys.modules


def test_wandb_may_refuse_the_start_and_later_only_warn(wandb, tiny, tmp_path, monkeypatch, caplog):
    cfg = tiny(wandb="birds", max_steps=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # as if there were none
        with pytest.raises(UsageError, match=r"^wandb: .*pip install 'lejepa_fast\[wandb\]', or leave out"):
            train_only(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(wandb.init, "side_effect", RuntimeError("api_key not configured (no-tty)\nmore"))
        with pytest.raises(RunError, match=r"^wandb: api_key not configured .*; .*WANDB_MODE=offline"):
            train_only(cfg)
    wandb.run.log.side_effect = ValueError("no room\nthere")
    train_only(cfg)
    assert "wandb: no room" in caplog.text
    assert [row["step"] for row in rows_of(cfg)] == [1, 2]
    opened = Mock()
    with Metrics(tmp_path, enabled=False, tensorboard=False, step=0, total_steps=1, wandb=opened):
        opened.assert_not_called()  # of several ranks only one opens a run


@pytest.mark.parametrize(
    ("error", "exit_code"), [(RunError("no space"), 1), (Interrupted("stopped", signal.SIGTERM), 0)]
)
def test_a_run_that_fails_is_marked_at_wandb_and_an_interrupted_one_is_not(error, exit_code, wandb, tmp_path):
    metrics = metrics_in(tmp_path, wandb=lambda: WandbRun(tmp_path, "birds", {}))
    with pytest.raises(type(error)), metrics:
        raise error
    wandb.run.finish.assert_called_once_with(exit_code=exit_code)
