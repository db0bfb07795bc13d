"""The configuration: command line, presets, JSON, validation."""

import dataclasses
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from lejepa_fast.data.validation import validated
from lejepa_fast.errors import UsageError
from lejepa_fast.train import config, evaluate, export, plan, pretrain
from lejepa_fast.train.config import Config
from lejepa_fast.train.config.presets import PRESETS


def test_long_names_and_aliases_are_the_same():
    short = "--data x --model resnet50 --batch-size 64 --lr 0.1 --lambda 0.2"
    long = "--data.path x --model.name resnet50 --data.batch-size 64 --optim.lr 0.1 --loss.lambd 0.2"
    assert config.parse(short.split()) == config.parse(long.split())
    assert config.parse(long.split()).loss.lambd == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus", "1"], "unknown option --bogus; see --help for all options"),
        (["--batchsize", "3"], "unknown option --batchsize; did you mean --batch-size?"),
        (["--weight-decay", "1"], "unknown option --weight-decay; did you mean --optim.weight-decay?"),
        (["--no-tensorbord"], "unknown option --no-tensorbord; did you mean --no-tensorboard?"),
        (["stray"], "unexpected argument 'stray'; see --help"),
        (["--lr", "fast"], "--lr/--optim.lr: could not convert string to float: 'fast'; see --help"),
        (["--preset", "desktop"], "--preset: expected one of default, laptop, ijepa-vit-b, "),
        (["--optim.betas", "2"], "Missing value for argument '--optim.betas'. Expected 2 values"),
        (["--out", ""], "--out: expected a value, got nothing; is a variable of the shell unset?"),
        (["--model=", "x"], "--model: expected a value, got nothing"),
        (["--preset", ""], "--preset: expected a value, got nothing"),
        (
            ["--out", "/runs/\udcff"],
            "--out: expected text in UTF-8, got '/runs/\\udcff'; give it another name",
        ),
        (["--data", "\udcff", "--seed", "1"], "--data: expected text in UTF-8"),
    ],
)
def test_unknown_keys_and_wrong_types_are_one_line(arguments, message, capsys):
    with pytest.raises(UsageError) as refusal:
        config.parse(arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_is_the_identity(name, tmp_path):
    saved = dataclasses.replace(config.resolve(PRESETS[name]), out=tmp_path, resume="/another/run")
    config.write(saved, tmp_path)
    file = tmp_path / "config.json"
    assert config.load_json(file) == saved
    # A new run takes the settings, and must not write into the folder of the old one.
    cfg = dataclasses.replace(saved, out=None, resume="auto", seed=7)
    assert config.parse(["--config", str(file), "--seed", "7"]) == cfg
    # What was chosen by looking at the images is chosen anew for others.
    data = dataclasses.replace(saved.data, value_range=(0.0, 4095.0))
    config.write(dataclasses.replace(saved, data=data), tmp_path)
    assert config.parse(["--config", str(file)]).data.value_range == (0.0, 4095.0)
    assert config.parse(["--config", str(file), "--data", "/others"]).data.value_range is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"learning": 1}}, "optim: unknown key 'learning'; known: lr, "),
        ({"epochz": 1}, "unknown key 'epochz'; did you mean 'epochs'"),
        ({"epochs": "many"}, "epochs: expected a valid integer, got 'many'"),
        ({"epochs": True}, "epochs: expected a valid integer, got True"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"optim": {"betas": [0.9]}}, "optim.betas: expected .*got \\[0.9\\]"),
        ({"optim": {"weight_decay": "x"}}, "optim.weight_decay: expected a valid number or 'auto', got 'x'"),
        ({"data": {"backend": "x"}}, "data.backend: expected 'auto', .*got 'x'"),
        ({"model": []}, "model: expected an object, got \\[\\]"),
        ([], "expected an object, got \\[\\]"),
        ({"foo.bar": 1}, "unknown key 'foo.bar'; known: data, crops"),
        ({"loss": {"a.b": 1}}, "loss: unknown key 'a.b'"),
        ({"optim": {"betas": [0.9, 2.0]}}, r"optim.betas\[1\]: expected below 1, got 2.0"),
        ({"crops": {"global_scale": [0.1, 0.2, 0.3]}}, "crops.global_scale: expected at most 2 items, got"),
        (None, "is not JSON"),
    ],
)
def test_bad_json_is_named(values, message, tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(UsageError, match=rf"cannot read {file}: No such file"):
        config.parse(["--config", str(file)])
    file.write_text("{" if values is None else json.dumps(values))
    with pytest.raises(UsageError, match=rf"{file}:? {message}"):
        config.parse(["--config", str(file)])


@pytest.mark.parametrize(
    ("arguments", "decay", "folder"),
    [
        (["--data", "/a/b c/"], 5e-2, "b-c-vit_small"),
        (["--data", "torchvision:CIFAR10:/d", "--model", "convnextv2_nano"], 5e-2, "CIFAR10-convnextv2_nano"),
        (["--preset", "default", "--model", "resnet50"], 5e-4, "trashnet96-resnet50"),
        (["--data", "x", "--model", "efficientnet_b0"], 5e-4, "x-efficientnet_b0"),
        (["--data", "x", "--optim.weight-decay", "0.3"], 0.3, "x-vit_small"),
    ],
)
def test_decay_goes_by_family_and_the_folder_by_data_and_model(arguments, decay, folder):
    cfg = config.resolve(config.parse(arguments))
    assert (cfg.optim.weight_decay, cfg.out) == (decay, Path("runs") / folder)


@pytest.mark.parametrize(
    ("arguments", "preset"),
    [
        ([], "laptop"),
        (["--data", "trashnet96"], "laptop"),
        (["--data", "x"], "default"),
        (["--data", "x", "--objective", "lejepa"], "default"),
        (["--objective", "ijepa"], "ijepa-laptop"),
        (["--data", "x", "--objective", "ijepa"], "ijepa-vit-b"),
        (["--data", "x", "--objective=masked-lejepa"], "ijepa-vit-b"),
    ],
)
def test_the_base_goes_by_data_and_objective(arguments, preset):
    cfg, expected = config.parse(arguments), PRESETS[preset]
    assert dataclasses.replace(cfg, data=expected.data, objective=expected.objective) == expected


def test_the_default_is_the_papers_recipe():
    cfg = PRESETS["default"]
    assert cfg == Config()
    assert (cfg.optim.lr, cfg.optim.final_lr_fraction) == (5e-4, 1e-3)
    assert (cfg.loss.lambd, cfg.loss.num_slices) == (0.05, 1024)
    crops = cfg.crops
    assert (crops.global_crops, crops.global_size, crops.local_crops, crops.local_size) == (2, 224, 6, 98)


def test_presets_of_ijepa_have_the_numbers_of_the_authors_code():
    for preset, epochs, depth, heads in (("ijepa-vit-b", 600, 6, 12), ("ijepa-vit-h", 300, 12, 16)):
        cfg = PRESETS[preset]
        optim, masked = cfg.optim, cfg.masked
        assert (cfg.epochs, masked.predictor_depth, masked.predictor_heads) == (epochs, depth, heads)
        assert (cfg.data.batch_size, cfg.crops.global_size, cfg.crops.global_scale) == (2048, 224, (0.3, 1.0))
        assert optim.lr * optim.start_lr_fraction == pytest.approx(2e-4)
        assert (optim.lr, optim.lr * optim.final_lr_fraction) == (1e-3, pytest.approx(1e-6))
        assert optim.warmup_fraction * epochs == pytest.approx(40)
        assert (optim.weight_decay, optim.final_weight_decay) == (0.04, 0.4)
        assert (masked.momentum, masked.final_momentum, masked.predictor_width) == (0.996, 1.0, 384)
        assert (masked.targets, masked.min_keep, cfg.loss.distance) == (4, 10, "smooth_l1")
        assert (masked.target_area, masked.target_aspect) == ((0.15, 0.2), (0.75, 1.5))
        assert masked.context_area == (0.85, 1.0)
        crops = cfg.crops
        assert {crops.flip_prob, crops.jitter_prob, crops.grayscale_prob, crops.blur_prob} == {0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--lr", "-1"], "optim.lr: expected at least 0, got -1.0"),
        (["--lr", "nan"], "optim.lr: expected a number, got nan"),
        (["--optim.weight-decay", "-1"], "optim.weight_decay: expected at least 0 or 'auto', got -1.0"),
        (["--seed", str(2**63)], "seed: expected below 9223372036854775808, got 9223372036854775808"),
        (["--eval.temperature", "0"], "eval.temperature: expected above 0, got 0.0"),
        (["--data.hw-decoder-load", "1.5"], "data.hw_decoder_load: expected at most 1, got 1.5"),
        (["--lambda", "1.5"], "loss.lambd: expected a number from 0 to 1 with loss.form convex, got 1.5"),
        (["--preset", "ijepa-laptop", "--objective", "lejepa"], "crops: lejepa predicts .* got 1 view; use"),
        (
            ["--loss.center-from", "average"],
            "loss.center_from: expected views without --average ema or swa, got average",
        ),
        (
            ["--objective", "ijepa", "--average", "ema", "--loss.center-from", "average"],
            "loss.center_from: expected views with --objective ijepa, got average",
        ),
        (
            ["--preset", "laptop", "--objective", "ijepa"],
            "crops: ijepa takes one global view of an image, got 2 global and 2 local; use --preset ",
        ),
        (["--batch-size", "1"], "at least 2; use --batch-size 2"),
        (["--out", "runs/" + "x" * 256], "out: expected names of at most 255 bytes, got 'runs/xx"),
        (["--batch-size", "9" * 3000], r"data.batch_size: expected below 2147483648, got 99+\.\.\.9+$"),
    ],
)
def test_values_that_cannot_work_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        config.validate(config.parse(arguments))


def bounded(kind):
    parts = typing.get_args(kind)
    return any(type(part).__module__ == "annotated_types" or bounded(part) for part in parts)


def test_values_that_are_not_json_are_refused(tmp_path):
    """A path is not taken for its text, nor anything else."""
    with pytest.raises(UsageError, match=r"^config: expected values that fit JSON, got PosixPath"):
        config.from_dict({"out": tmp_path})


def test_every_number_has_a_declared_bound():
    """But the end of the knots, which the loss checks by itself. No whole number may be huge."""
    free = []
    for section in (Config, *(type(value) for value in vars(Config()).values())):
        if not dataclasses.is_dataclass(section):
            continue
        for name, kind in typing.get_type_hints(section, include_extras=True).items():
            if re.search(r"\b(int|float)\b", str(kind)) and not bounded(kind):
                free.append(name)
            if re.search(r"\bint\b", str(kind)):
                with pytest.raises(UsageError, match=rf"{name}: expected .*(at most|below)"):
                    validated(section, config.to_dict(section(**{name: 10**30})))
    assert free == ["t_max"]


def test_batch_is_split_over_the_ranks():
    cfg = config.parse(["--batch-size", "10"])
    config.validate(cfg, world_size=5)
    with pytest.raises(UsageError, match=r"10 images cannot be split evenly over 4 .*--batch-size 12"):
        config.validate(cfg, world_size=4)
    with pytest.raises(UsageError, match=r"leaves 1 image.*--batch-size 20"):
        config.validate(cfg, world_size=10)


def test_workers_share_the_cpus(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    cfg = PRESETS["default"]
    assert [config.loader_workers(cfg, share, on_gpu=True) for share in (1, 8, 32)] == [16, 2, 1]
    assert config.loader_workers(cfg, 1, on_gpu=False) == 8
    assert config.loader_workers(config.parse(["--data.workers", "0"]), 1, on_gpu=True) == 0


def test_a_small_batch_is_warned_of():
    assert config.small_batch_warning(256) is None
    assert "use 256 or more" in str(config.small_batch_warning(255))


def test_help_needs_no_pytorch():
    """Nor timm and others: they take seconds."""
    code = """
import contextlib, sys
from lejepa_fast.data import commands
from lejepa_fast.train import evaluate, export, plan, pretrain
for command in (commands, evaluate, export, plan, pretrain):
    with contextlib.suppress(SystemExit):
        command.main(["--help"])
        raise AssertionError
assert not {"torch", "timm", "torchvision", "pydantic", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("arguments", [[], ["--data", "x"], ["--preset", "laptop", "--data", "x"]])
def test_help_shows_the_defaults_that_apply(arguments, capsys):
    with pytest.raises(SystemExit):
        config.parse([*arguments, "--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    cfg = config.parse(arguments)
    for option, value in (("epochs INT", cfg.epochs), ("loss.lambd FLOAT", cfg.loss.lambd)):
        assert re.search(rf"--{option} [^()]*\(default: {value}\)", shown), option
    assert f"here {'default' if arguments == ['--data', 'x'] else 'laptop'}." in shown


@pytest.mark.parametrize("command", [evaluate, export, plan, pretrain])
def test_every_option_has_a_sentence(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    before = re.findall(r"(--\S[^()]*\S) \((?:default|required)", shown)
    assert before
    assert not [option for option in before if not option.endswith(".")]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--preset", "laptop"], True),
        (["--preset", "laptop", f"--model={PRESETS['laptop'].model.name}"], True),
        (["--preset", "laptop", "--model=resnet50"], False),
        (["--model.name", "vit_tiny"], False),
        (["--model", "resnet50", "--model.kwargs", PRESETS["laptop"].model.kwargs], True),
    ],
)
def test_arguments_of_the_presets_model_go_with_it(arguments, kept):
    cfg = config.parse(arguments)
    assert (cfg.model.kwargs == PRESETS["laptop"].model.kwargs) is kept
    assert kept or cfg.model.kwargs == "{}"
    assert cfg.model.projector_dim == PRESETS["laptop"].model.projector_dim
