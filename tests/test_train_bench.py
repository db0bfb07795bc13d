"""The trainer's benchmark: a case on a tiny model, what does not fit, and the table of targets."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import gpu_targets
import no_tyro
import pytest
import torch
import train_bench
import train_case
import train_targets

from lejepa_fast.train.engine.optimization import build_scheduler

TINY = dataclasses.replace(train_bench.CPU_CASES[0], steps=4, warm_up=1)


def test_a_case_measures_the_real_trainer() -> None:
    row = train_bench.run_case(dataclasses.replace(TINY, strategy="fsdp"), timeout=300)
    assert "error" not in row, row
    assert row["images_per_second"] == pytest.approx(16 / (row["step_ms"] / 1e3))
    assert row["mfu"] is None or 0 < row["mfu"] < 1
    assert 0 < row["sigreg_share"] < 1
    assert len(set(row["losses"])) == len(row["losses"]) == 1 + 4 + 2 * train_case.AROUND_A_SAVE
    assert row["checkpoint_seconds"] > 0


def test_a_case_that_fails_is_a_row_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "case.py"
    failing.write_text("import sys; sys.exit('Traceback ...\\nlast line')")
    monkeypatch.setattr(train_bench, "CASE", failing)
    assert train_bench.run_case(TINY, timeout=60) == {"error": "last line"}
    failing.write_text("import time; time.sleep(60)")
    assert train_bench.run_case(TINY, timeout=0.5) == {"error": "not done in 0 s"}


def test_out_of_memory_is_a_row_and_half_the_images_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def fits_up_to_32(case: train_case.Case, timeout: float) -> dict[str, Any]:
        tried.append(case.images)
        if case.images > 32:
            return {"error": "out of memory"}
        return {"images_per_second": 1.0, "peak_memory_gib": 2.0}

    monkeypatch.setattr(train_bench, "run_case", fits_up_to_32)
    train_bench.measure([train_case.Case("vit_large", 128)], tmp_path, budget_minutes=5)
    assert tried == [128, 64, 32]
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row.get("error") for row in rows] == ["out of memory", "out of memory", None]
    assert {"device", "torch", "commit", "command"} <= rows[0].keys()
    assert "vit_large x 128: out of memory" in capsys.readouterr().out


def test_views_that_do_not_fit_are_out_of_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_case, "_Views", full)
    assert train_case.measure(TINY)["error"] == "out of memory"


def test_a_case_reaches_the_peak_of_the_learning_rate(tmp_path: Path) -> None:
    cfg = GIGANTIC.config(tmp_path)
    optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
    scheduler = build_scheduler(optimizer, cfg.optim, train_case.SCHEDULE)
    rates = []
    for _ in range(GIGANTIC.warm_up + GIGANTIC.steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] < 0.1
    assert min(rates[len(rates) // 2 + 1 :]) > 0.99


def test_the_budget_ends_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(
        train_bench, "run_case", lambda case, timeout: {"images_per_second": timeout, "peak_memory_gib": 1.0}
    )
    rows = train_bench.measure([TINY, TINY], tmp_path, budget_minutes=2)
    assert [row["images_per_second"] for row in rows] == [120.0]  # 20 s were left for the second


def test_a_rehearsal_runs_every_kind_of_case_and_judges_nothing(tmp_path: Path) -> None:
    train_bench.main(["--rehearse", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(row["rehearsal"] for row in rows)
    cases = [row for row in rows if row["kind"] != "target"]
    assert [row for row in cases if "error" in row] == []
    kinds = {tuple(row[name] for name in train_bench._KINDS) for row in cases}
    assert kinds == {
        tuple(getattr(case, name) for name in train_bench._KINDS) for case in train_bench.GPU_CASES
    }
    targets = [row for row in rows if row["kind"] == "target"]
    assert [row["target"] for row in targets] == [f"training: {t.name}" for t in train_targets.TARGETS]
    assert {row["met"] for row in targets} == {None}


def row_of(case: train_case.Case, **figures: Any) -> dict[str, Any]:
    usual = {"peak_memory_gib": 90.0, "images_per_second": 100.0, "checkpoint_seconds": 5.0}
    return dataclasses.asdict(case) | (figures if "error" in figures else usual | figures)


def verdicts(rows: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    found = gpu_targets.judge(rows, train_targets.TARGETS)
    return {row["target"].removeprefix("training: "): (row["figure"], row["met"]) for row in found}


LARGE, GIGANTIC = train_case.Case("vit_large", 128), train_case.Case("vit_gigantic", 64)
SMALL = train_case.Case("vit_small_patch16_224", 512)


def test_targets_tell_met_from_not_met() -> None:
    recomputed = dataclasses.replace(GIGANTIC, activation_checkpointing="full", strategy="fsdp")
    rows = [
        row_of(LARGE, mfu=0.47, sigreg_share=0.004, checkpoint_stall_steps=1.2),
        row_of(dataclasses.replace(LARGE, strategy="ddp"), mfu=0.46),
        row_of(dataclasses.replace(LARGE, strategy="fsdp"), mfu=0.44, images_per_second=98.0),
        row_of(dataclasses.replace(LARGE, images=64, plan=True), planned_memory_gib=99.1),
        row_of(recomputed, mfu=0.56, losses=[0.41, 0.39, 0.3, 0.2], sigreg_share=0.002),
        row_of(SMALL, images_per_second=5000.0),
        row_of(dataclasses.replace(SMALL, loader=True), images_per_second=4800.0, data_wait=0.03),
    ]
    found = verdicts(rows)
    assert found["ViT-L/14 MFU"] == (pytest.approx(47), True)
    assert found["ViT-L/14 MFU, goal"] == (pytest.approx(47), False)
    assert found["ViT-giant MFU"] == (None, None)
    assert found["ViT-gigantic MFU, goal"] == (pytest.approx(56), True)
    assert found["ViT-gigantic on one GPU, loss after / before"] == (pytest.approx(0.625), True)
    assert found["FSDP2 against DDP, one GPU"] == (pytest.approx(98), False)
    assert found["ViT-S/16 from files against synthetic views"] == (pytest.approx(96), False)
    assert found["checkpoint stall"] == (pytest.approx(1.2), False)
    assert found["SIGReg's share of the step"] == (pytest.approx(0.4), True)
    assert found["planned memory, off by"] == (pytest.approx(100 * 9.1 / 90), False)


def test_what_did_not_run_is_no_figure() -> None:
    recomputed = dataclasses.replace(GIGANTIC, activation_checkpointing="full")
    lost = [row_of(recomputed, error="out of memory")]
    (said,) = (r for r in gpu_targets.judge(lost, train_targets.TARGETS) if "one GPU, loss" in r["target"])
    assert (said["met"], said["reason"]) == (None, "out of memory")
    nan = [row_of(recomputed, losses=[0.4, math.nan, 0.2])]
    assert verdicts(nan)["ViT-gigantic on one GPU, loss after / before"] == (None, None)
    whole = [row_of(GIGANTIC, losses=[0.4, 0.3, 0.2])]  # without activation checkpointing it is not the claim
    assert verdicts(whole)["ViT-gigantic on one GPU, loss after / before"] == (None, None)


def test_the_stand_in_for_tyro_leaves_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("tyro")  # another stub: it has no spec, which find_spec refuses
    monkeypatch.setitem(sys.modules, "tyro", other)
    runpy.run_path(str(no_tyro.__file__))
    assert sys.modules["tyro"] is other
