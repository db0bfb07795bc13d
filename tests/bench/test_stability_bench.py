"""The stability benchmark: a row for each run, once, with its untrained twin; the table and C(alpha)."""

import math
import shutil
from pathlib import Path

import stability_bench
from benchlib import read_rows

from lejepa_fast.train import sweep

TRAINER = Path(__file__).parents[1] / "helpers" / "standin_trainer.py"


def test_rows_are_written_once_and_shown_beside_the_paper(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "SCRIPT", TRAINER)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    parts = {
        "knots": ["loss.lambd=0.03"],
        "lambda": ["loss.lambd=0.01,0.5"],
        "alpha": ["loss.lambd=0.1,0.2,0.4", "optim.lr=1e-3"],
    }  # the stand-in fails with a lambda of 0.03
    monkeypatch.setattr(stability_bench, "PARTS", parts)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restored at the end
    common = ["--out", str(tmp_path / "rows"), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    assert stability_bench.main([*common, "--part", "knots"]) == 1
    assert not (tmp_path / "rows" / "stability.png").exists()
    assert stability_bench.main([*common, "--part", "lambda"]) == 0
    shutil.rmtree(tmp_path / "runs")  # the rows are enough to go on
    assert stability_bench.main([*common, "--part", "lambda", "alpha"]) == 0
    rows = read_rows(tmp_path / "rows" / "stability.jsonl")
    assert [(row["part"], row["values"]["loss.lambd"]) for row in rows] == [
        ("lambda", 0.01),
        ("lambda", 0.5),
        ("alpha", 0.1),
        ("alpha", 0.2),
        ("alpha", 0.4),
    ]
    assert len((tmp_path / "calls").read_text().splitlines()) == 1 + 5
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


def test_the_grids_are_valid_and_the_last_has_24_runs(tmp_path):
    for part, grid in stability_bench.PARTS.items():
        axes = [sweep.make_points([axis], stability_bench.OPTIONS, tmp_path) for axis in grid]
        assert math.prod(map(len, axes)) >= (24 if part == "alpha" else 4)
    assert stability_bench.PARTS.keys() == stability_bench.PAPER.keys()
