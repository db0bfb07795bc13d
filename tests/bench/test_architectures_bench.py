"""The benchmark of architectures: six of different kinds train, and a model that cannot says why."""

from unittest.mock import Mock

import architectures_bench
import timm
import torch
from benchlib import RESULTS, read_rows

from lejepa_fast.errors import UsageError

# The smallest of their kinds: a plain, a configured and a depthwise convolutional network, a transformer with
# patches, one in stages that mixes both, and a gated convolutional network.
SIX = ["test_resnet", "test_byobnet", "test_efficientnet", "test_vit", "test_coatnet", "test_mambaout"]


def test_six_architectures_train_with_the_same_settings(image_folder, tmp_path, capsys):
    command = ["--data", str(image_folder), "--steps", "4", "--out", str(tmp_path)]
    architectures_bench.main([*command, "--models", *SIX, "no_such_model"])
    *rows, refused = read_rows(tmp_path / "architectures.jsonl")
    assert [row["model"] for row in rows] == SIX
    assert len({row["family"] for row in rows}) == len(SIX)
    for row in rows:
        assert row["finite"]
        assert row["loss_last"] < row["loss_first"]
        assert row["embedding_std_trained"] > 0
        assert None not in (row["knn_trained"], row["linear_untrained"])
    assert "no model is called 'no_such_model'" in refused["error"]
    assert "trained: 6, families: 6" in capsys.readouterr().out
    architectures_bench.main([*command, "--models", SIX[0], "no_such_model"])
    assert len(read_rows(tmp_path / "architectures.jsonl")) == len(SIX) + 1  # nothing is trained again


def test_a_failure_that_may_pass_is_tried_again(tmp_path, monkeypatch):
    for failure, count in ((OSError("disk full"), 1), (UsageError("no model is called 'x'"), 2), (None, 2)):
        monkeypatch.setattr(architectures_bench, "train", Mock(side_effect=failure))
        architectures_bench.main(["--out", str(tmp_path), "--models", "x"])
        assert len(read_rows(tmp_path / "architectures.jsonl")) == count


def test_the_models_are_small_and_of_many_families():
    assert len(architectures_bench.MODELS) == len({*architectures_bench.MODELS}) >= 60
    measured = {row["model"]: row for row in read_rows(RESULTS / "architectures.jsonl") if "family" in row}
    families = set()
    for name in architectures_bench.MODELS:
        if not (row := measured.get(name)):
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=0)
            row = {"family": type(model).__module__.rpartition(".")[2]}
            row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        assert row["parameters"] < 20e6, name
        families.add(row["family"])
    assert len(families) >= 20
