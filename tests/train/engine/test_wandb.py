"""Weights & Biases, by a stand-in that writes down what it is called with; nothing goes over a network."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from training import SCRIPT, Make, arguments_of, rows_of, torchrun, train_only

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.signals import Interrupted

Calls = Callable[[], list[dict[str, Any]]]

STAND_IN = """
import json, os, random
import numpy, torch

def note(call, **values):
    with open(os.environ["WANDB_CALLS"], "a") as file:
        file.write(json.dumps({"call": call, **values}) + "\\n")

class Run:
    def define_metric(self, name, *, step_metric):
        note("define_metric", name=name, step_metric=step_metric)

    def log(self, values):
        if os.environ.get("WANDB_REFUSES") == "log":
            raise ValueError("no room\\nthere")
        note("log", **values)

    def finish(self, exit_code=None):
        note("finish", exit_code=exit_code)

def init(**options):
    if os.environ.get("WANDB_REFUSES") == "init":
        raise RuntimeError("api_key not configured (no-tty)\\nmore")
    random.random(), numpy.random.rand(), torch.rand(())
    note("init", **options)
    return Run()
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put the stand-in where the package would be; calling the fixture returns the calls so far."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    calls = tmp_path / "calls.jsonl"
    calls.touch()
    monkeypatch.setenv("WANDB_CALLS", str(calls))
    yield lambda: [json.loads(line) for line in calls.read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_it_gets_the_numbers_of_all_rows_and_costs_no_random_number(wandb: Calls, tiny: Make) -> None:
    cfg = tiny(wandb="birds", max_steps=5, eval={"every": 1, "linear_steps": 5})
    train_only(cfg)
    states = random_state.capture_rng()
    init, define, *logged, finish = wandb()
    assert (init["project"], init["dir"], init["resume"]) == ("birds", str(cfg.out), "allow")
    assert init["config"]["optim"]["lr"] == 1e-3
    assert (define["call"], define["step_metric"]) == ("define_metric", "step")
    losses = [(call["step"], call["train/loss"]) for call in logged if "train/loss" in call]
    assert losses == [(row["step"], row["loss"]) for row in rows_of(cfg)]
    probes = [(call["step"], call["eval/knn"], call["eval/linear"]) for call in logged if "eval/knn" in call]
    assert probes == [(row["step"], row["knn"], row["linear"]) for row in rows_of(cfg, "eval")]
    assert (len(losses), len(probes), finish["exit_code"]) == (5, 1, 0)

    assert cfg.out is not None
    sys.modules.pop("wandb")
    train_only(tiny(max_steps=5, out=cfg.out.with_name("without")))
    assert random_state.capture_rng() == states
    assert "wandb" not in sys.modules

    train_only(tiny(wandb="birds", max_steps=6))
    again = [call for call in wandb() if call["call"] == "init"]
    assert again[0]["id"] == again[1]["id"]  # the same run there


def test_a_refusal_at_the_start_is_an_error_and_later_a_warning(
    wandb: Calls, tiny: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny(wandb="birds", max_steps=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # as if there were none
        with pytest.raises(UsageError, match=r"^wandb: .*pip install 'lejepa_fast\[wandb\]', or leave out"):
            train_only(cfg)
    monkeypatch.setenv("WANDB_REFUSES", "init")
    with pytest.raises(RunError, match=r"^wandb: api_key not configured \(no-tty\); .*WANDB_MODE=offline"):
        train_only(cfg)
    monkeypatch.setenv("WANDB_REFUSES", "log")
    train_only(cfg)
    assert "wandb: no room" in caplog.text
    assert [row["step"] for row in rows_of(cfg)] == [1, 2]


@pytest.mark.parametrize(
    ("error", "exit_code"), [(RunError("no space"), 1), (Interrupted("stopped", signal.SIGTERM), 0)]
)
def test_a_run_that_fails_is_marked_there_and_an_interrupted_one_is_not(
    error: BaseException, exit_code: int, wandb: Calls, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", Mock(side_effect=error))
    with pytest.raises(type(error)):
        train_only(tiny(wandb="birds", max_steps=1))
    assert (wandb()[-1]["call"], wandb()[-1]["exit_code"]) == ("finish", exit_code)


@pytest.mark.slow
def test_of_two_ranks_one_opens_a_run(
    wandb: Calls, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    cfg = tiny(wandb="birds", max_steps=2)
    result = torchrun(SCRIPT, *arguments_of(cfg, tmp_path / "configs"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("report: ") == 1
    calls = [call["call"] for call in wandb()]
    assert calls == ["init", "define_metric", "log", "log", "log", "log", "finish"]
