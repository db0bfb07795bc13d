"""Rows of finished runs: the whole summary, or what recipes are compared by."""

import json

import pretrain_rows
import pytest
from benchlib import read_rows

SUMMARY = {"seed": 1, "steps": 9, "state": "healthy", "images_per_second": 5.0, "evaluation_seconds": 2.5}
SUMMARY |= {"machine": {"torch_threads": 2}, "majority_class": 20.0, "config": {}}
SUMMARY |= {f"{probe}_{which}": 50.0 for probe in ("knn", "linear") for which in ("trained", "untrained")}
SUMMARY["backbones"] = {"resnet14t:untrained": {"knn": 40.0, "linear": 45.0, "parameters": 7}}


def test_rows_hold_the_summary_or_a_short_form_of_it(tmp_path, capsys):
    (tmp_path / "run" / "report").mkdir(parents=True)
    (tmp_path / "run" / "report" / "summary.json").write_text(json.dumps(SUMMARY))
    command = ["--out", str(tmp_path), str(tmp_path / "run")]
    pretrain_rows.main(command)
    (row,) = read_rows(tmp_path / "pretrain.jsonl")
    assert row.items() >= SUMMARY.items()
    assert (tmp_path / "pretrain.png").is_file()
    pretrain_rows.main([*command, "--recipe", "wider", "--seconds", "7", "--command", "make pretrain"])
    (row,) = read_rows(tmp_path / "laptop_recipes.jsonl")
    assert (row["what"], row["run_threads"], row["command_seconds"], row["seed"]) == ("wider", 2, 7, 1)
    assert row["command"] == "make pretrain"
    assert row["backbones"] == {"resnet14t:untrained": {"knn": 40.0, "linear": 45.0}}
    for wrong, message in (
        ([str(tmp_path / "none")], "runs: expected a finished run, got one without"),
        (["--recipe", "wider"], "recipe: expected one run, --command and --seconds"),
    ):
        with pytest.raises(SystemExit):
            pretrain_rows.main(wrong)
        assert message in capsys.readouterr().err
