"""Weights & Biases, by a stand-in that writes down what it is called with; nothing goes over a network."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import Make, install_wandb_stand_in, rows_of, train_only

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.config import Config
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.signals import Interrupted


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Puts the stand-in where the package would be; calling it gives the calls so far."""
    folder = tmp_path / "site"
    install_wandb_stand_in(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    calls = tmp_path / "calls.jsonl"
    calls.touch()
    monkeypatch.setenv("WANDB_CALLS", str(calls))
    yield lambda: [json.loads(line) for line in calls.read_text().splitlines()]
    sys.modules.pop("wandb", None)


def random_states(cfg: Config) -> Any:
    assert cfg.out is not None
    return checkpoint.read_checkpoint(checkpoint.list_checkpoints(cfg.out / "checkpoints")[-1])["rng"]


def test_it_gets_the_numbers_of_all_rows(
    wandb: Callable[[], list[dict[str, Any]]], tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = tiny(wandb="birds", max_steps=5, eval={"every": 1, "linear_steps": 5})
    train_only(cfg)
    assert cfg.out is not None
    init, define, *logged, finish = wandb()
    assert (init["call"], init["project"], init["dir"]) == ("init", "birds", str(cfg.out))
    assert (init["mode"], init["resume"]) == ("offline", "allow")
    assert init["config"]["optim"]["lr"] == 1e-3
    assert (define["call"], define["step_metric"], finish["call"]) == ("define_metric", "step", "finish")
    losses = [(call["step"], call["train/loss"]) for call in logged if "train/loss" in call]
    assert losses == [(row["step"], row["loss"]) for row in rows_of(cfg)]
    assert finish["exit_code"] == 0
    probes = [(call["step"], call["eval/knn"], call["eval/linear"]) for call in logged if "eval/knn" in call]
    assert probes == [(row["step"], row["knn"], row["linear"]) for row in rows_of(cfg, "eval")]
    assert len(losses) == 5
    assert len(probes) == 1

    without = tiny(max_steps=5, out=cfg.out.with_name("without"))
    train_only(without)
    assert random_states(cfg) == random_states(without)

    train_only(tiny(wandb="birds", max_steps=6))
    again = [call for call in wandb() if call["call"] == "init"]
    assert again[0]["id"] == again[1]["id"]  # the same run there


def test_what_it_refuses(
    wandb: Callable[[], list[dict[str, Any]]],
    tiny: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At the start it is an error; later a warning, and metrics.jsonl has the rows."""
    cfg = tiny(wandb="birds", max_steps=2)
    monkeypatch.setenv("WANDB_REFUSES", "init")
    with pytest.raises(RunError, match=r"^wandb: api_key not configured \(no-tty\); .*WANDB_MODE=offline"):
        train_only(cfg)
    monkeypatch.setenv("WANDB_REFUSES", "log")
    monkeypatch.setattr(logging.getLogger("lejepa_fast"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        train_only(cfg)
    assert "wandb: no room" in caplog.text
    assert [row["step"] for row in rows_of(cfg)] == [1, 2]


def test_no_run_is_left_open_where_the_folder_refuses(
    wandb: Callable[[], list[dict[str, Any]]], tiny: Make
) -> None:
    cfg = tiny(wandb="birds", max_steps=1)
    assert cfg.out is not None
    (cfg.out / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        train_only(cfg)
    assert wandb() == []


def test_a_run_that_fails_is_marked_there_from_the_first_row_on(
    wandb: Callable[[], list[dict[str, Any]]], tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if b'"kind"' in data:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunError, match="No space left"):
            train_only(tiny(wandb="birds", max_steps=1))
    assert [(call["call"], call.get("exit_code")) for call in wandb()][2:] == [("finish", 1)]


def test_an_interrupted_run_is_no_failure_there(
    wandb: Callable[[], list[dict[str, Any]]], tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Trainer) -> None:
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train", stopped)
    with pytest.raises(Interrupted):
        train_only(tiny(wandb="birds", max_steps=1))
    assert (wandb()[-1]["call"], wandb()[-1]["exit_code"]) == ("finish", 0)


def test_a_missing_package_is_named(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if there were none
    with pytest.raises(UsageError, match=r"^wandb: .*pip install 'lejepa_fast\[wandb\]', or leave out"):
        train_only(tiny(wandb="birds", max_steps=1))


def test_nothing_is_imported_unless_asked(wandb: Callable[[], list[dict[str, Any]]], tiny: Make) -> None:
    train_only(tiny(max_steps=1))
    assert "wandb" not in sys.modules
    assert wandb() == []
