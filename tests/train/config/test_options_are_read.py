"""Every option acts: code outside the configuration reads each field in a run of the trainer."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
from training import train_only

import lejepa_fast
from lejepa_fast.train import config, evaluate, export, pretrain, select_runs, sweep
from lejepa_fast.train.config import Config
from lejepa_fast.train.planning.options import PlanOptions

PACKAGE = Path(lejepa_fast.__file__).parent
# These copy, check or print all fields, which is not reading one. Some of their functions read.
OWN = {"config", "recipe.py", "command.py"}
ANSWERS = {"total_steps", "loader_workers", "smallest_image"}
PATCHES = '{"patch_size": 8}'
SECTIONS = [Config, *(type(value) for value in vars(Config()).values() if dataclasses.is_dataclass(value))]


def planted(section):
    """The section, or the configuration and its sections, with one more field, which nothing reads."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    values = {k: planted(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}
    kind, more = type(section), [("nobody_reads_this", int, 0)]
    name = f"Planted{kind.__name__}"
    return dataclasses.make_dataclass(name, more, bases=(kind,), frozen=True)(**values)


@pytest.fixture
def reads(monkeypatch):
    """(section, field) of every read by a module of the package, outside the configuration itself."""
    found: set[tuple[str, str]] = set()

    def noting(self, name):
        code = sys._getframe(1).f_code
        file = Path(code.co_filename)
        reads = code.co_name in ANSWERS or not {file.name, file.parent.name} & OWN
        if PACKAGE in file.parents and reads:
            found.add((type(self).__name__.removeprefix("Planted"), name))
        return object.__getattribute__(self, name)

    for section in SECTIONS:
        monkeypatch.setattr(section, "__getattribute__", noting, raising=False)
    return found


@pytest.mark.usefixtures("white_figures")
def test_a_run_reads_every_option(tiny, monkeypatch, reads):
    """Two epochs with an average, probes, few labels and a report; a step of each masked objective. Planted
    options, one in each section, are found."""
    cfg = tiny(average={"kind": "ema"}, eval={"every": 1, "linear_steps": 2, "few_shot": "1"}, epochs=2)
    masked = {"crops": {"global_crops": 1, "local_crops": 0}, "max_steps": 1, "model": {"kwargs": PATCHES}}
    masked["masked"] = {"min_keep": 1, "predictor_depth": 1, "target_area": (0.1, 0.3)}
    every = {(section.__name__, field.name) for section in SECTIONS for field in dataclasses.fields(section)}
    unread = {(section.__name__, "nobody_reads_this") for section in SECTIONS}
    monkeypatch.setattr(config, "parse", lambda argv: planted(cfg))
    assert pretrain.main([]) == 0
    for name in ("ijepa", "masked-lejepa"):
        train_only(tiny(objective=name, out=cfg.out / name, **masked))
    assert (every | unread) - reads == unread


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        (evaluate.Options, "evaluate.py"),
        (export.Options, "export.py"),
        (PlanOptions, "planning/*.py"),
        (select_runs.Options, "select_runs.py"),
        (sweep.Options, "sweep.py"),
    ],
)
def test_a_command_reads_its_own_options(options, modules):
    text = "".join(file.read_text() for file in (PACKAGE / "train").glob(modules))
    own = [*options.__annotations__, "nobody_reads_this"]
    assert [name for name in own if not re.search(rf"\boptions\.{name}\b", text)] == ["nobody_reads_this"]
