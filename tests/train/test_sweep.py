"""Grids of runs: points and their checks, failures, resuming, GPUs, job arrays, signals. Most with a trainer
that only writes files."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from training import arguments_of, rows_of, train_only, wait_until

from lejepa_fast.train import sweep
from lejepa_fast.train.report import run_plots

TRAINER = Path(__file__).parents[1] / "helpers" / "standin_trainer.py"


@pytest.fixture
def sweeping(tiny, tmp_path, monkeypatch):
    """Runs the command with a grid in tmp_path/sweep; `calls` are lambda and GPU of each started run.

    The figures are empty files: `test_the_trainer_itself_runs_a_grid` draws them.
    """
    # With a weight decay, for which each stand-in would import timm: the default depends on the model.
    cfg = tiny(out=None, optim={"weight_decay": 0.05})
    (tmp_path / "calls").touch()
    monkeypatch.setattr(sweep, "SCRIPT", TRAINER)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    for plot in ("plot_grid", "plot_loss_plane"):
        monkeypatch.setattr(run_plots, plot, lambda path, *_: path.touch())
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shared = arguments_of(cfg, tmp_path)
    shared = shared[: shared.index("--resume")]

    def run(*arguments, options=()):
        return sweep.main([*arguments, "--out", str(tmp_path / "sweep"), "--", *shared, *options])

    run.calls = lambda: [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    run.shared = shared
    return run


def test_a_failed_run_is_reported_and_the_others_go_on_and_the_next_call_runs_it_alone(
    sweeping, tmp_path, capsys
):
    grid = ("--grid", "loss.lambd=0.01,0.03,0.02")
    assert sweeping(*grid) == 1
    out, err = capsys.readouterr()
    log = tmp_path / "sweep" / "loss.lambd=0.03.log"
    assert err == f"error: 1 of 3 runs failed, the first with: error: the disk is full ({log})\n"
    assert "[1/3] loss.lambd=0.01: loss 0.01, knn 1.0 %" in out
    assert "[2/3] loss.lambd=0.03: failed: error: the disk is full" in out
    assert log.read_text() == "starting\nerror: the disk is full\n"
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert found["grid"] == ["loss.lambd=0.01,0.03,0.02"]
    states = {run["values"]["loss.lambd"]: run["state"] for run in found["runs"]}
    assert states == {0.01: "healthy", 0.03: "failed", 0.02: "healthy"}
    assert (found["runs"][0]["loss"], found["runs"][0]["knn_trained"]) == (0.01, 1.0)
    assert {"sweep.png", "plane.png"} <= {path.name for path in (tmp_path / "sweep").iterdir()}
    assert sweeping(*grid) == 1
    assert [call[0] for call in sweeping.calls()] == ["0.01", "0.03", "0.02", "0.03"]
    assert "2 of 3 runs are finished already" in capsys.readouterr().out


def test_a_run_that_alone_was_stopped_says_so(sweeping, tmp_path, capsys):
    assert sweeping("--grid", "loss.lambd=0.06") == 1
    said = f"stopped by SIGTERM after step 3 ({tmp_path / 'sweep' / 'loss.lambd=0.06.log'})"
    out, err = capsys.readouterr()
    assert err == f"error: 1 of 1 runs failed, the first with: {said}\n"
    assert f"[1/1] loss.lambd=0.06: failed: {said}" in out


def test_runs_take_turns_on_the_gpus(sweeping, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert sweeping("--grid", "loss.lambd=0.01,0.02,0.05") == 0
    first, second, third = (call[1] for call in sweeping.calls())
    assert {first, second} == {"3", "GPU-5"}
    assert third in (first, second)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweeping("--grid", "loss.lambd=0.07", "--jobs", "2") == 0
    assert len(sweeping.calls()) == 4


def test_sigterm_lets_the_runs_save_and_starts_no_more(sweeping, tmp_path, capsys):
    """From another process; 0.05 is never started."""
    folder = tmp_path / "sweep" / "loss.lambd=0.04"
    code = "import sys; from lejepa_fast.train import sweep; sweep.SCRIPT = sys.argv[1]\n"
    code += "sys.exit(sweep.main(sys.argv[2:]))"
    grid = ["--grid", "loss.lambd=0.04,0.05", "--out", str(tmp_path / "sweep"), "--", *sweeping.shared]
    command = [sys.executable, "-c", code, str(TRAINER), *grid]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        wait_until((folder / "ready").exists, alive=lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM; run the same command again" in err
    assert (folder / "saved").exists()
    assert [call[0] for call in sweeping.calls()] == ["0.04"]


def test_a_job_array_runs_one_point(sweeping, monkeypatch, capsys):
    """The process becomes the trainer; a finished point is left out."""
    execv = Mock(side_effect=SystemExit)
    monkeypatch.setattr(os, "execv", execv)
    grid = ("--grid", "loss.lambd=0.01,0.02", "optim.lr=0.1,0.2")
    assert sweeping(*grid, "--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in listed] == [0, 1, 2, 3]
    with pytest.raises(SystemExit):
        sweeping(*grid, "--index", "2")
    program, command = execv.call_args.args
    assert program == sys.executable
    assert listed[2] == f"2 {shlex.join(command)}"
    assert command[command.index("--loss.lambd") + 1] == "0.02"
    assert command[command.index("--optim.lr") + 1] == "0.1"
    assert sweeping(*grid, "--index", "4") == 2
    assert "index: expected 0 to 3" in capsys.readouterr().err
    assert sweeping("--grid", "loss.lambd=0.01") == 0
    capsys.readouterr()
    assert sweeping("--grid", "loss.lambd=0.01", "--index", "0") == 0
    assert "is finished" in capsys.readouterr().out
    execv.assert_called_once()


def test_a_folder_with_other_settings_is_refused(sweeping, capsys):
    assert sweeping("--grid", "loss.lambd=0.01") == 0
    assert sweeping("--grid", "loss.lambd=0.01", options=["--data.workers", "3", "--log-every", "7"]) == 0
    assert sweeping("--grid", "loss.lambd=0.01", options=["--optim.lr", "0.5"]) == 2
    assert "holds a run with optim.lr 0.001, and this sweep has 0.5" in capsys.readouterr().err
    assert len(sweeping.calls()) == 1


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "expected KEY=VALUE,VALUE, got nothing"),
        (["lambda=1"], r"by its name in config\.json, got 'lambda'; did you mean loss\.lambd\?"),
        (["out=a"], r"by its name in config\.json, got 'out'$"),
        (["loss.lambd"], r"expected KEY=VALUE,VALUE, got 'loss\.lambd'"),
        (["loss.lambd=0.1,,0.2"], "expected values between the commas"),
        (["loss.lambd=[0.1"], "is not JSON"),
        (["loss.lambd=0.1,2"], r"loss\.lambd: expected a number from 0 to 1"),
        (["loss.lambd=0.1,x"], "could not convert string to float: 'x'"),
        (["loss.lambd=0.1,0.10"], r"two points have the name loss\.lambd=0\.1"),
        (["loss.lambd=0.1", "loss.lambd=0.2"], r"loss\.lambd is given twice"),
        (["loss.unbiased=yes"], r"loss\.unbiased: expected true or false, got 'yes'"),
        (["model.name=resnet18,resnet_18"], "no model is called 'resnet_18'"),
    ],
)
def test_a_bad_grid_is_an_error_before_the_first_run(sweeping, capsys, grid, message):
    assert sweeping("--grid", *grid) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert sweeping.calls() == []


def test_no_jobs_are_refused(sweeping, capsys):
    assert sweeping("--grid", "loss.lambd=0.01", "--jobs", "0") == 2
    assert capsys.readouterr().err == "error: jobs: expected at least 1, got 0\n"


@pytest.mark.slow
def test_the_trainer_itself_runs_a_grid(tiny, tmp_path, monkeypatch, capsys):
    """Two runs; one has trained already, but has no report, as if it was stopped before its evaluation."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cfg = tiny(out=None, max_steps=3)
    second = replace(cfg, out=tmp_path / "sweep" / "loss.lambd=0.2", loss=replace(cfg.loss, lambd=0.2))
    train_only(second)
    shared = arguments_of(cfg, tmp_path)
    command = ["--grid", "loss.lambd=0.1,0.2", "--out", str(tmp_path / "sweep"), "--", *shared[:2]]
    assert sweep.main(command) == 0
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [run["steps"] for run in found["runs"]] == [3, 3]
    assert all(run["knn_trained"] > 0 and run["rankme"] > 1 for run in found["runs"])
    for point in ("loss.lambd=0.1", "loss.lambd=0.2"):
        assert (tmp_path / "sweep" / point / "report" / "report.html").exists()
    for figure in ("sweep.png", "plane.png"):
        assert (tmp_path / "sweep" / figure).stat().st_size > 10_000
    assert len(rows_of(second, "run")) == 2
    assert [row["step"] for row in rows_of(second)] == [1, 2, 3]
