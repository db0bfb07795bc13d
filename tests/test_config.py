"""The configuration: command line, presets, JSON, validation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.config import Config
from lejepa_fast.train.presets import PRESETS


def test_no_arguments_run_the_laptop_preset() -> None:
    assert config.parse([]) == PRESETS["laptop"]
    assert config.parse(["--data", "trashnet96"]) == PRESETS["laptop"]


def test_other_data_starts_from_the_general_defaults() -> None:
    cfg = config.parse(["--data", "/some/where", "--model", "vit_giant"])
    expected = dataclasses.replace(
        PRESETS["default"],
        data=dataclasses.replace(Config().data, path="/some/where"),
        model=dataclasses.replace(Config().model, name="vit_giant"),
    )
    assert cfg == expected


def test_general_defaults_are_those_of_the_paper() -> None:
    cfg = Config()
    assert (cfg.optim.lr, cfg.loss.lambd, cfg.loss.num_slices) == (5e-4, 0.05, 1024)
    assert cfg.optim.final_lr_fraction == pytest.approx(1 / 1000)
    assert (cfg.crops.global_crops, cfg.crops.global_size, cfg.crops.local_crops, cfg.crops.local_size) == (
        2,
        224,
        6,
        98,
    )


def test_long_names_and_aliases_are_the_same() -> None:
    short = ["--data", "x", "--model", "resnet50", "--batch-size", "64", "--lr", "0.1", "--lambda", "0.2"]
    long = [
        *("--data.path", "x", "--model.name", "resnet50", "--data.batch-size", "64"),
        *("--optim.lr", "0.1", "--loss.lambd", "0.2"),
    ]
    assert config.parse(short) == config.parse(long)
    assert config.parse(short).loss.lambd == 0.2


@pytest.mark.parametrize("arguments", [["--bogus", "1"], ["--optim.lrr", "1"], ["--lr", "fast"]])
def test_unknown_keys_and_wrong_types_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        config.parse(arguments)
    assert stop.value.code == 2
    assert arguments[0].lstrip("-") in capsys.readouterr().err


def test_unknown_preset_is_named() -> None:
    with pytest.raises(UsageError, match=r"default, laptop.*'desktop'"):
        config.parse(["--preset", "desktop"])


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_is_the_identity(name: str, tmp_path: Path) -> None:
    cfg = config.resolve(PRESETS[name])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict(cfg)))
    assert config.parse(["--config", str(file)]) == cfg
    assert config.parse(["--config", str(file), "--seed", "7"]) == dataclasses.replace(cfg, seed=7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"learning": 1}}, "optim: unknown key 'learning'"),
        ({"epochz": 1}, "unknown key 'epochz'; did you mean 'epochs'"),
        ({"epochs": "many"}, "epochs: expected int, got 'many'"),
        ({"epochs": True}, "epochs: expected int, got True"),
        ({"tensorboard": 1}, "tensorboard: expected bool, got 1"),
        ({"optim": {"betas": [0.9]}}, "betas: expected .*got \\[0.9\\]"),
        ({"optim": {"weight_decay": "much"}}, "weight_decay: expected .*got 'much'"),
        ({"model": []}, "model: expected an object"),
    ],
)
def test_bad_json_is_named(values: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=message):
        config.parse(["--config", str(file)])


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(UsageError, match=r"cannot read .*config\.json: No such file"):
        config.load_json(file)
    file.write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        config.load_json(file)


@pytest.mark.parametrize(
    ("model", "decay"),
    [("vit_small", 5e-2), ("convnextv2_nano", 5e-2), ("resnet50", 5e-4), ("efficientnet_b0", 5e-4)],
)
def test_weight_decay_goes_by_family(model: str, decay: float) -> None:
    cfg = config.parse(["--data", "x", "--model", model])
    assert cfg.optim.weight_decay == "auto"
    assert config.resolve(cfg).optim.weight_decay == decay
    assert (
        config.resolve(config.parse(["--model", model, "--optim.weight-decay", "0.3"])).optim.weight_decay
        == 0.3
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("trashnet96", "trashnet96-resnet50"),
        ("/a/b c/", "b-c-resnet50"),
        ("torchvision:CIFAR10:/d", "CIFAR10-resnet50"),
    ],
)
def test_run_folder_is_named_after_data_and_model(path: str, name: str) -> None:
    cfg = config.parse(["--data", path, "--model", "resnet50"])
    assert config.resolve(cfg).out == Path("runs") / name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--lr", "-1"], "optim.lr: expected at least 0, got -1.0"),
        (["--lr", "nan"], "optim.lr: expected at least 0, got nan"),
        (["--lambda", "1.5"], "loss.lambd: expected a number from 0 to 1, got 1.5"),
        (["--crops.global-crops", "0"], "global_crops must be at least 1"),
        (["--batch-size", "1"], "at least 2; use --batch-size 2"),
    ],
)
def test_values_that_cannot_work_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.validate(config.parse(arguments))


def test_batch_is_split_over_the_ranks() -> None:
    cfg = config.parse(["--batch-size", "10"])
    config.validate(cfg, world_size=5)
    with pytest.raises(UsageError, match=r"10 images cannot be split evenly over 4 .*--batch-size 12"):
        config.validate(cfg, world_size=4)
    with pytest.raises(UsageError, match=r"leaves 1 image.*--batch-size 20"):
        config.validate(cfg, world_size=10)


def test_workers_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    cfg = PRESETS["default"]
    assert config.loader_workers(cfg, 1, on_gpu=True) == 16
    assert config.loader_workers(cfg, 8, on_gpu=True) == 2
    assert config.loader_workers(cfg, 1, on_gpu=False) == 8
    assert config.loader_workers(cfg, 32, on_gpu=True) == 1
    fixed = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, workers=0))
    assert config.loader_workers(fixed, 1, on_gpu=True) == 0
