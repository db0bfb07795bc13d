"""The Slurm launcher: its batch script, the torchrun line, and saving before the job's time is up."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from lejepa_fast.train import submit
from lejepa_fast.train.submit import TorchrunJob

JOB = TorchrunJob(["--model", "vit_giant"], nodes=4, gpus_per_node=8, port=29500, save_seconds=20)


def test_the_same_torchrun_line_on_every_node() -> None:
    line = " ".join(JOB.command("node7", "123"))
    assert (
        "--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node7:29500 --rdzv-id 123" in line
    )
    assert line.endswith("pretrain.py --model vit_giant")


def test_a_dry_run_prints_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit", reason="needs submitit: pip install 'lejepa_fast[slurm]'")
    monkeypatch.chdir(tmp_path)
    options = ["--nodes", "4", "--hours", "8", "--partition", "gpu", "--account", "me"]
    options += ["--save-seconds", "300", "--dry-run"]
    assert submit.main([*options, "--", "--model", "vit_giant", "--batch-size", "1024"]) == 0
    script = capsys.readouterr().out
    for line in (
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--time=480",
        "--partition=gpu",
        "--account=me",
        "--requeue",
        "--signal=USR2@300",
    ):
        assert f"#SBATCH {line}\n" in script
    assert re.search(r"\nsrun .* -m submitit.core._submit ", script)
    assert "pretrain.py --model vit_giant --batch-size 1024" in script


def test_without_slurm_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit", reason="needs submitit: pip install 'lejepa_fast[slurm]'")
    assert submit.main(["--folder", str(tmp_path), "--", "--batch-size", "64"]) == 2
    assert "see the script with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "nodes: expected at least 1, got 0"),
        (["--hours", "0.01"], "hours: expected more than the 180 s to save"),
        (
            ["--nodes", "2", "--", "--batch-size", "100"],
            "100 images cannot be split evenly over 16 processes",
        ),
        (["--", "--modell", "vit_giant"], "unknown option --modell; did you mean --model?"),
        (["--node", "2"], "did you mean --nodes?"),
    ],
)
def test_wrong_usage_is_found_before_the_job_waits(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# Stands for torchrun: starts a trainer that saves when it is told to stop, and ends with its exit code.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]]).returncode)
"""
TRAINER = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(0.3)
    (folder / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "training").touch()
time.sleep(60)
"""


def test_before_its_time_is_up_the_trainer_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As submitit asks for it: from a signal's handler, in the thread that waits for torchrun meanwhile."""
    helpers: Any = types.ModuleType("submitit.helpers")
    helpers.DelayedSubmission = lambda job: ("again", job)
    monkeypatch.setitem(sys.modules, "submitit", types.ModuleType("submitit"))
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    line = [sys.executable, "-c", LAUNCHER, TRAINER, str(tmp_path)]
    monkeypatch.setattr(TorchrunJob, "command", lambda *given: line)
    job = TorchrunJob(["--data", "images"], 1, 1, 29500, save_seconds=600)
    asked: list[Any] = []

    def ask(*_: Any) -> None:
        asked.append(job.checkpoint())
        asked.append((tmp_path / "saved").exists())

    def too_late(*_: Any) -> None:
        raise AssertionError("checkpoint() waits on, and torchrun has long ended")

    def signal_when_training() -> None:
        while not (tmp_path / "training").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, ask), signal.signal(signal.SIGALRM, too_late)
    signal.alarm(30)
    try:
        threading.Thread(target=signal_when_training, daemon=True).start()
        job()  # torchrun ends by itself, without an error, because the trainer does
        assert asked == [("again", job), True]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGUSR2, before[0])
        signal.signal(signal.SIGALRM, before[1])
        job._process.kill()
