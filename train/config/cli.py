"""Command line -> configuration."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lejepa_fast.errors import UsageError
from lejepa_fast.train.config.presets import PRESETS
from lejepa_fast.train.config.settings import EMBEDDED_DATA, Config, load_json
from lejepa_fast.train.runtime.command import checked_arguments, parse_options

C = TypeVar("C", bound=Config)


def parse(argv: Sequence[str] | None) -> Config:
    """Parse the command line of a training run; None: that of this process.

    The base is `--config FILE.json`, else `--preset NAME`, else the preset `laptop` for the embedded images
    and `default` for other data, or with a masked objective those of I-JEPA. `--config` supplies the settings
    of a run, but not its folder and not the checkpoint it resumed from. UsageError for an unknown option or a
    value of the wrong type.
    """
    what = "Pretrain an encoder with LeJEPA or I-JEPA. The embedded images start from a preset for laptops."
    embedded = _given(argv, "--data", "--data.path") in (None, EMBEDDED_DATA)
    return parse_as(Config, argv, preset=preset_for(argv, embedded=embedded), what=what)


def preset_for(argv: Sequence[str] | None, *, embedded: bool) -> str:
    """The base of a command line that names none, by its objective; `embedded`: for the embedded images."""
    if _given(argv, "--objective") in (None, "lejepa"):
        return "laptop" if embedded else "default"
    return "ijepa-laptop" if embedded else "ijepa-vit-b"


def _given(argv: Sequence[str] | None, *names: str) -> str | None:
    """The value of an option on a command line, if it is there; errors are left to the full parser."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument(*names, dest="value", nargs="?")
    return scan.parse_known_args(argv)[0].value


def parse_as(cls: type[C], argv: Sequence[str] | None, *, preset: str, what: str) -> C:
    """Parse a command line with the options of `cls`; `preset` is the base if it names none. The base's
    arguments of `timm.create_model` are those of its model, and go if the command line names another."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(checked_arguments(argv))
    if known.preset is not None and known.config is not None:
        raise UsageError("--preset and --config both name a base configuration; give one of them")
    name = known.preset or preset
    if name not in PRESETS:
        raise UsageError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    base = PRESETS[name]
    if known.config is not None:
        base = dataclasses.replace(load_json(known.config), out=None, resume="auto")
    if _given(argv, "--model", "--model.name") not in (None, base.model.name):
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, kwargs="{}"))
    if _given(argv, "--data", "--data.path") not in (None, base.data.path):  # chosen for other images
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, value_range=None))
    if not isinstance(base, cls):
        base = cls(**{field.name: getattr(base, field.name) for field in dataclasses.fields(Config)})
    description = (
        f"{what} Base of the options below: --preset {'|'.join(PRESETS)} or --config FILE.json, the "
        f"config.json of an earlier run; here {known.config or name}."
    )
    return parse_options(type(base), rest, default=base, description=description)
