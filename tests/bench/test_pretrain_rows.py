"""Rows of finished runs, and their figure."""

import json

import pretrain_rows
import pytest
from benchlib import read_rows

SUMMARY = {"seed": 1, "steps": 9, "state": "healthy", "majority_class": 20.0, "config": {}}
SUMMARY |= {f"{probe}_{which}": 50.0 for probe in ("knn", "linear") for which in ("trained", "untrained")}


def test_a_row_holds_the_summary_and_an_unfinished_run_is_refused(tmp_path, capsys):
    (tmp_path / "run" / "report").mkdir(parents=True)
    (tmp_path / "run" / "report" / "summary.json").write_text(json.dumps(SUMMARY))
    pretrain_rows.main(["--out", str(tmp_path), str(tmp_path / "run")])
    (row,) = read_rows(tmp_path / "pretrain.jsonl")
    assert row.items() >= SUMMARY.items()
    assert (tmp_path / "pretrain.png").is_file()
    with pytest.raises(SystemExit):
        pretrain_rows.main([str(tmp_path / "none")])
    assert "runs: expected a finished run, got one without" in capsys.readouterr().err
