"""The stability benchmark: a row for each run, once, with its untrained twin; the table and C(alpha)."""

import math
import shutil
from pathlib import Path

import pytest
import stability_bench
from benchlib import read_rows

from lejepa_fast.train import sweep

TRAINER = Path(__file__).parents[1] / "helpers" / "standin_trainer.py"


def test_rows_are_written_once_and_shown_beside_the_paper(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "SCRIPT", TRAINER)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    parts = {"lambda": ["loss.lambd=0.01,0.5"], "alpha": ["loss.lambd=0.1,0.2,0.4", "optim.lr=1e-3"]}
    monkeypatch.setattr(stability_bench, "PARTS", parts)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restored at the end
    common = ["--out", str(tmp_path / "rows"), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    stability_bench.main([*common, "--part", "lambda"])
    shutil.rmtree(tmp_path / "runs")  # the rows are enough to go on
    stability_bench.main([*common, "--part", "lambda", "alpha"])
    rows = read_rows(tmp_path / "rows" / "stability.jsonl")
    assert [(row["part"], row["values"]["loss.lambd"]) for row in rows] == [
        ("lambda", 0.01),
        ("lambda", 0.5),
        ("alpha", 0.1),
        ("alpha", 0.2),
        ("alpha", 0.4),
    ]
    assert len((tmp_path / "calls").read_text().splitlines()) == 5
    assert {row["knn_untrained"] for row in rows} == {1.0}
    assert rows[1]["settings"]["loss.lambd"] == 0.5
    assert rows[1]["threads"] == 7  # of the run
    assert {"device", "torch", "commit", "command"} <= rows[0].keys()
    printed = capsys.readouterr().out
    assert "50.0 (1.0)" in printed
    # The stand-in's loss is lambda, and its accuracy, too: alpha cannot turn the ranking below 1.
    assert "linear, 3 runs: C(0) = -1.00, C(0.4) = -1.00" in printed
    assert f"paper: {stability_bench.PAPER['alpha']}" in printed
    assert (tmp_path / "rows" / "stability.png").stat().st_size > 10_000


def test_failed_runs_are_an_exit_code_without_a_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "SCRIPT", tmp_path / "no_such_trainer.py")
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    where = ["--out", str(tmp_path / "rows"), "--runs", str(tmp_path / "runs")]
    assert stability_bench.main(["--part", "knots", *where]) == 1
    assert not (tmp_path / "rows" / "stability.png").exists()


def test_the_grids_are_valid_and_the_last_has_24_runs(tmp_path):
    for part, grid in stability_bench.PARTS.items():
        axes = [sweep.make_points([axis], stability_bench.OPTIONS, tmp_path) for axis in grid]
        assert math.prod(map(len, axes)) >= (24 if part == "alpha" else 4)
    assert stability_bench.PARTS.keys() == stability_bench.PAPER.keys()


@pytest.mark.slow
def test_a_run_trains_and_its_row_has_its_figures(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(stability_bench, "PARTS", {"lambda": ["loss.lambd=0.05"]})
    few = ["--batch-size", "16", "--crops.min-image-size", "1"]  # 32 images of 40 px
    monkeypatch.setattr(stability_bench, "OPTIONS", [*stability_bench.OPTIONS, *few])
    rows, runs = str(tmp_path / "rows"), str(tmp_path / "runs")
    stability_bench.main(["--epochs", "1", "--data", str(image_folder), "--out", rows, "--runs", runs])
    (row,) = read_rows(tmp_path / "rows" / "stability.jsonl")
    assert row["steps"] == 2
    assert row["knn_trained"] > 0
