"""The trainer's benchmark: a case on a tiny model, and what does not fit."""

import dataclasses
import itertools

import benchlib
import pytest
import timing
import torch
import train_bench
from train_bench import Case

from lejepa_fast.train.model.crop_sizes import fitting_sizes

TINY = dataclasses.replace(train_bench.TINY, checkpoint=True)


@pytest.mark.parametrize("model", [train_bench.SMOKE.model, train_bench.LARGE.model])
def test_the_models_of_a_gpu_take_their_crops(tmp_path, model):
    cfg = Case(model, 1).config(tmp_path)
    assert fitting_sizes(cfg, 224) == {"global": cfg.crops.global_size, "local": cfg.crops.local_size}


def test_a_case_that_fails_is_a_row(monkeypatch):
    monkeypatch.setattr(timing, "in_fresh_process", lambda function, *arguments: function(*arguments))
    failed = train_bench.run_case(dataclasses.replace(TINY, model="no_such_model"))
    assert "no_such_model" in failed["error"]


def test_out_of_memory_is_a_row_and_half_the_images_are_tried(tmp_path, monkeypatch, capsys):
    def fits_up_to_32(case):
        return {"error": "out of memory"} if case.images > 32 else {"images_per_second": 1.0}

    monkeypatch.setattr(train_bench, "run_case", fits_up_to_32)
    train_bench.measure_all([Case("vit_large", 128)], tmp_path, budget_minutes=5)
    rows = benchlib.read_rows(tmp_path / "train.jsonl")
    tried = [(128, "out of memory"), (64, "out of memory"), (32, None)]
    assert [(row["images"], row.get("error")) for row in rows] == tried
    assert {"device", "torch", "triton", "commit", "command"} <= rows[0].keys()
    assert "images=128" in capsys.readouterr().out.splitlines()[0]


def test_views_that_do_not_fit_are_out_of_memory_too(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_bench, "SyntheticViews", full)
    assert train_bench.measure(TINY)["error"] == "out of memory"


def test_the_budget_ends_the_cases(tmp_path, monkeypatch):
    clock = iter([0.0, 119.0, 121.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(train_bench, "run_case", lambda case: {"images_per_second": 1.0})
    assert len(train_bench.measure_all([TINY, TINY], tmp_path, budget_minutes=2)) == 1


@pytest.mark.parametrize(
    ("smoke", "working", "error", "code"),
    [
        (False, 0, "out of memory", 1),
        (False, 1, "out of memory", 0),
        (False, 1, "broken", 1),
        (True, 0, "broken", 1),
        (True, 1, "broken", 0),
    ],
)
def test_it_fails_where_a_case_is_broken_or_none_fits(tmp_path, monkeypatch, smoke, working, error, code):
    figures = itertools.chain(working * [{"images_per_second": 1.0}], itertools.repeat({"error": error}))
    monkeypatch.setattr(train_bench, "run_case", lambda case: next(figures))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_bench.main(["--out", str(tmp_path), *["--smoke"] * smoke]) == code
    rows = benchlib.read_rows(tmp_path / "train.jsonl")
    assert (len(rows) > 1) != smoke
    assert sum("error" not in row for row in rows) == working


@pytest.mark.slow
def test_a_rehearsal_measures_the_real_trainer_and_judges_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_bench, "DISTINCT", 16)
    monkeypatch.setattr(train_bench, "WINDOW", 2)
    cases = [
        Case("vit_large", 128, strategy="ddp", checkpoint=True),
        Case("vit_gigantic", 64, strategy="fsdp", activation_checkpointing="full", plan=True),
        Case("vit_small", 512, activation_checkpointing="selective", loader=True),
    ]
    for name in train_bench.KINDS:  # the values of those that a GPU measures
        assert {getattr(case, name) for case in cases} >= {getattr(c, name) for c in train_bench.GPU_CASES}
    monkeypatch.setattr(train_bench, "GPU_CASES", cases)
    assert train_bench.main(["--rehearse", "--out", str(tmp_path)]) == 0
    rows = benchlib.read_rows(tmp_path / "train.jsonl")
    assert len(rows) == len(cases)
    for row in rows:
        assert row["rehearsal"]
        assert "error" not in row
        assert row["images_per_second"] == pytest.approx(row["images"] / (row["step_ms"] / 1e3))
        assert row["sigreg_share"] > 0
    saved, planned, _ = rows
    assert planned["planned_memory_gib"] > 0
    windows = 1 + saved["steps"] // train_bench.WINDOW
    assert len(set(saved["losses"])) == len(saved["losses"]) == windows + 1
    assert saved["save_seconds"] > 0
    assert saved["checkpoint_stall_steps"] > -train_bench.WINDOW
    assert "not measured: this was a rehearsal" in capsys.readouterr().out
