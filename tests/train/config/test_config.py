"""The configuration: command line, presets, JSON, validation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from training import CPU, Make

from lejepa_fast.data.backends.choose_backend import make_backend
from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.config import Config
from lejepa_fast.train.config.presets import PRESETS
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.evaluation.evaluate import evaluate_untrained
from lejepa_fast.train.runtime.command import _message_of


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus", "1"], "unknown option --bogus; see --help for all options"),
        (["--batchsize", "3"], "unknown option --batchsize; did you mean --batch-size?"),
        (["--optim.lrr", "1"], "unknown option --optim.lrr; did you mean --optim.lr?"),
        (["--weight-decay=1"], "unknown option --weight-decay; did you mean --optim.weight-decay?"),
        (["--no-tensorbord"], "unknown option --no-tensorbord; did you mean --no-tensorboard?"),
        (["stray"], "unexpected argument 'stray'; see --help"),
        (["--lr", "fast"], "--lr/--optim.lr: could not convert string to float: 'fast'; see --help"),
        (["--lr"], "Missing value for argument '--lr/--optim.lr'"),
        (["--optim.betas", "2"], "Missing value for argument '--optim.betas'. Expected 2 values"),
        (["--data.backend", "x"], "invalid choice 'x' for argument '--data.backend'"),
    ],
)
def test_unknown_keys_and_wrong_types_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as refusal:
        config.parse(arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert capsys.readouterr() == ("", "")


def test_boxes_of_a_terminal_are_read_as_well() -> None:
    box = (
        "\x1b[31m╭─ Value error ────╮\x1b[0m\n│ Error parsing --lr: no \x1b[1mfloat\x1b[0m │\n"
        "│ of two lines      │\n│ ───────────────── │\n│ Argument helptext: │\n╰───────────╯\n"
    )
    assert _message_of(box) == "Error parsing --lr: no float of two lines; see --help"


def test_help_still_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        config.parse(["--help"])
    assert stop.value.code == 0
    assert "--optim.weight-decay" in capsys.readouterr().out


def test_unknown_preset_is_named() -> None:
    with pytest.raises(UsageError, match=r"default, laptop.*'desktop'"):
        config.parse(["--preset", "desktop"])


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_is_the_identity(name: str, tmp_path: Path) -> None:
    resolved = config.resolve(PRESETS[name])
    saved = dataclasses.replace(resolved, resume="/another/run")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict(saved)))
    assert config.load_json(file) == saved
    # A new run takes the settings, and must not write into the folder of the old one.
    cfg = dataclasses.replace(resolved, out=None, resume="auto")
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
        (["--lr", "inf"], "optim.lr: expected at least 0, got inf"),
        (["--optim.weight-decay", "-1"], "optim.weight_decay: expected at least 0, got -1.0"),
        (["--optim.betas", "2", "2"], "optim.betas: expected numbers from 0 to below 1, got 2.0"),
        (["--optim.betas", "0.9", "1"], "optim.betas: expected numbers from 0 to below 1, got 1.0"),
        (["--model.drop-path", "2"], "model.drop_path: expected numbers from 0 to below 1, got 2.0"),
        (["--average.decay", "1"], "average.decay: expected numbers from 0 to below 1, got 1.0"),
        (["--average.start", "1.5"], "average.start: expected numbers from 0 to below 1, got 1.5"),
        (["--eval.linear-steps", "-1"], "eval.linear_steps: expected at least 0, got -1"),
        (["--model.register-tokens", "-1"], "model.register_tokens: expected at least 0, got -1"),
        (["--seed", str(10**25)], r"seed: expected a number below 2\*\*63"),
        (["--eval.temperature", "0"], "eval.temperature: expected a number above 0, got 0.0"),
        (["--eval.temperature", "-1"], "eval.temperature: expected a number above 0, got -1.0"),
        (["--lambda", "1.5"], "loss.lambd: expected a number from 0 to 1, got 1.5"),
        (["--data.prefetch", "0"], "prefetch must be at least 1 batch; got 0"),
        (["--data.hw-decoder-load", "1.5"], r"hw_decoder_load must lie in \[0, 1\]; got 1.5"),
        (["--data.hw-decoder-load", "nan"], r"hw_decoder_load must lie in \[0, 1\]; got nan"),
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


def test_settings_of_the_loading_reach_both_loaders(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        given.append(options)
        return make_backend(*arguments, **options)

    monkeypatch.setattr("lejepa_fast.data.loader.make_backend", recorded)
    trainer = Trainer(tiny(data={"prefetch": 3, "hw_decoder_load": 0.25, "dali_views": "operators"}), CPU)
    sources = trainer.train_source, trainer.val_source
    evaluate_untrained(trainer.cfg, *sources, device="cpu", linear=False)
    assert len(given) == 4  # calibration and two splits, too
    names = ("prefetch", "hw_decoder_load", "dali_views")
    assert {tuple(options[name] for name in names) for options in given} == {(3, 0.25, "operators")}


def test_workers_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    cfg = PRESETS["default"]
    assert config.loader_workers(cfg, 1, on_gpu=True) == 16
    assert config.loader_workers(cfg, 8, on_gpu=True) == 2
    assert config.loader_workers(cfg, 1, on_gpu=False) == 8
    assert config.loader_workers(cfg, 32, on_gpu=True) == 1
    fixed = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, workers=0))
    assert config.loader_workers(fixed, 1, on_gpu=True) == 0
