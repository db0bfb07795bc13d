"""The trainer's benchmark: a case on a tiny model, what does not fit, and the table of targets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import train_bench
import train_case

TINY = dataclasses.replace(train_bench.CPU_CASES[0], steps=4, warm_up=1)


def test_a_case_measures_the_real_trainer() -> None:
    row = train_bench.run_case(dataclasses.replace(TINY, strategy="fsdp"), timeout=300)
    assert "error" not in row, row
    assert row["images_per_second"] == pytest.approx(16 / (row["step_ms"] / 1e3))
    assert row["mfu"] is None or 0 < row["mfu"] < 1
    assert 0 < row["sigreg_share"] < 1
    assert len(set(row["losses"])) == len(row["losses"]) == 1 + 4 + 12
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


def test_the_budget_ends_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(
        train_bench, "run_case", lambda case, timeout: {"images_per_second": timeout, "peak_memory_gib": 1.0}
    )
    rows = train_bench.measure([TINY, TINY], tmp_path, budget_minutes=2)
    assert [row["images_per_second"] for row in rows] == [120.0]  # 20 s were left for the second


def test_targets_tell_met_from_not_met() -> None:
    def row(case: train_case.Case, **figures: Any) -> dict[str, Any]:
        return dataclasses.asdict(case) | figures

    large, gigantic = train_case.Case("vit_large", 128), train_case.Case("vit_gigantic", 64)
    rows = [
        row(large, mfu=0.47, sigreg_share=0.004, checkpoint_stall_steps=1.2, images_per_second=100.0),
        row(dataclasses.replace(large, strategy="ddp"), mfu=0.46, images_per_second=100.0),
        row(dataclasses.replace(large, strategy="fsdp"), mfu=0.44, images_per_second=98.0),
        row(dataclasses.replace(gigantic, activation_checkpointing="full"), error="out of memory"),
    ]
    verdicts = {line[0]: line[2:] for line in train_bench.targets(rows)}
    assert verdicts["ViT-L/14 MFU"] == ["47.0%", "met"]
    assert verdicts["ViT-giant MFU"] == ["-", "not measured"]
    assert verdicts["ViT-gigantic trains on one GPU"] == ["-", "not measured"]
    assert verdicts["FSDP2 / DDP images/s, one GPU"] == ["98.0%", "NOT met"]
    assert verdicts["checkpoint stall, steps"] == ["1.20", "NOT met"]
    assert verdicts["SIGReg's share of the step"] == ["0.40%", "met"]
