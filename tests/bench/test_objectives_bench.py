"""The benchmark of objectives: each run trains and is scored once, and what its row holds."""

import objectives_bench
import pytest
from benchlib import read_rows

from lejepa_fast.errors import RunError
from lejepa_fast.train import config

NET = ["--model.kwargs", '{"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}']
TINY = """
    --masked.predictor-width 16 --masked.predictor-depth 1 --masked.predictor-heads 2
    --masked.min-keep 1 --masked.target-area 0.1 0.3 --crops.global-size 32 --loss.num-slices 8
    --data.workers 0 --data.batch-size 8 --eval.linear-steps 2 --no-tensorboard
"""


def test_a_row_has_photographs_ranks_and_numbers(tmp_path, image_folder, monkeypatch, white_figures, capsys):
    name = "masked LeJEPA, image"
    monkeypatch.setattr(objectives_bench, "TABLES", ("count",))  # for time
    monkeypatch.setattr(objectives_bench, "PICTURES", (40, 20))
    common = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--runs", name]
    common += ["--extra", "--data.path", str(image_folder), *NET, *TINY.split(), "--max-steps"]
    objectives_bench.main([*common, "2"])
    (row,) = read_rows(tmp_path / "objectives.jsonl")
    assert (row["name"], row["steps"]) == (name, 2)
    assert max(row["count_linear_trained"], row["count_knn_untrained"]) < 1
    assert row["within_rank_trained"] >= 1
    assert row["between_std_untrained"] > 0
    assert 0 <= row["knn_trained"] <= 100
    monkeypatch.setattr(objectives_bench.pretrain, "main", lambda arguments: arguments)
    objectives_bench.main([*common, "2"])  # trains nothing again
    with pytest.raises(RunError, match="--max-steps 3"):  # other options are another run, in another folder
        objectives_bench.main([*common, "3"])
    assert f"{row['count_linear_trained']:.3f}" in capsys.readouterr().out


def test_runs_differ_in_their_objective_alone():
    model = config.parse(["--preset", "ijepa-laptop"]).model
    for name, options in objectives_bench.RUNS.items():
        cfg = config.parse(["--preset", "ijepa-laptop", *options])
        assert cfg.objective == {"I-JEPA": "ijepa", "LeJEPA": "lejepa"}.get(name, "masked-lejepa"), name
        assert cfg.model == model, name
        assert (cfg.loss.lambd == 0) == ("neither" in name), name
        assert cfg.crops.global_crops == (2 if name == "LeJEPA" else 1), name
