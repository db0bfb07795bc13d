"""Every option acts: code outside the configuration reads each field in a run of the trainer."""

import dataclasses
import sys
from pathlib import Path

import pytest

import lejepa_fast
from lejepa_fast.train import config, pretrain
from lejepa_fast.train.config import Config
from lejepa_fast.train.config.presets import PRESETS

PACKAGE = Path(lejepa_fast.__file__).parent
# These copy, check or print all fields, which is not reading one. Some of their functions read.
OWN = {"config", "recipe.py", "command.py"}
ANSWERS = {"total_steps", "loader_workers", "smallest_image"}
SECTIONS = [Config, *(type(value) for value in vars(Config()).values() if dataclasses.is_dataclass(value))]


@dataclasses.dataclass(frozen=True)
class Planted(Config):
    nobody_reads_this: int = 0


@pytest.fixture
def reads(monkeypatch):
    """(section, field) of every read by a module of the package, outside the configuration itself."""
    found: set[tuple[str, str]] = set()

    def noting(self, name):
        code = sys._getframe(1).f_code
        file = Path(code.co_filename)
        reads = code.co_name in ANSWERS or not {file.name, file.parent.name} & OWN
        if PACKAGE in file.parents and reads:
            found.add((type(self).__name__.removeprefix("Planted") or "Config", name))
        return object.__getattribute__(self, name)

    for section in SECTIONS:
        monkeypatch.setattr(section, "__getattribute__", noting, raising=False)
    return found


def test_a_run_reads_every_option(tiny, monkeypatch, reads):
    """Two epochs with an average and both probes. A planted option that nothing reads is found."""
    cfg = tiny(average={"kind": "ema"}, eval={"every": 1, "linear_steps": 2}, epochs=2)
    planted = Planted(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(Config)})
    monkeypatch.setitem(PRESETS, "default", planted)
    every = {(section.__name__, field.name) for section in SECTIONS for field in dataclasses.fields(section)}
    assert pretrain.main(["--data", cfg.data.path]) == 0
    assert (every | {("Config", "nobody_reads_this")}) - reads == {("Config", "nobody_reads_this")}
    assert cfg.data.path != config.EMBEDDED_DATA
