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
    value of the wrong type or beyond its bounds.
    """
    what = "Pretrain an encoder with LeJEPA or I-JEPA. The embedded images start from a preset for laptops."
    return parse_as(Config, argv, what=what)


def parse_as(cls: type[C], argv: Sequence[str] | None, *, what: str, laptop: bool = True) -> C:
    """Parse a command line with the options of `cls`; `laptop`: the embedded images have a base of their own.
    The base's arguments of `timm.create_model` are those of its model, and go if the command line names
    another."""
    arguments = checked_arguments(argv)
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--preset")
    scan.add_argument("--config", type=Path)
    rest = scan.parse_known_args(arguments)[1]
    for names in (("--data", "--data.path"), ("--model", "--model.name"), ("--objective",)):
        scan.add_argument(*names, nargs="?")  # errors are left to the full parser
    given = scan.parse_known_args(arguments)[0]
    if given.preset is not None and given.config is not None:
        raise UsageError("--preset and --config both name a base configuration; give one of them")
    small = laptop and given.data in (None, EMBEDDED_DATA)
    if given.objective in (None, "lejepa"):
        default = "laptop" if small else "default"
    else:
        default = "ijepa-laptop" if small else "ijepa-vit-b"
    name = given.preset or default
    if name not in PRESETS:
        raise UsageError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    base = PRESETS[name]
    if given.config is not None:
        base = dataclasses.replace(load_json(given.config), out=None, resume="auto")
    if given.model not in (None, base.model.name):
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, kwargs="{}"))
    if given.data not in (None, base.data.path):  # chosen for other images
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, value_range=None))
    if not isinstance(base, cls):
        base = cls(**{field.name: getattr(base, field.name) for field in dataclasses.fields(Config)})
    description = (
        f"{what} Base of the options below: --preset {'|'.join(PRESETS)} or --config FILE.json, the "
        f"config.json of an earlier run; here {given.config or name}."
    )
    return parse_options(type(base), rest, default=base, description=description)
