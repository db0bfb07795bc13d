"""The command `lejepa-data`: verify, pack and index data sets. Also `python -m lejepa_fast.data`."""

from __future__ import annotations

import argparse
import sys

from lejepa_fast.data.commands import index, pack, verify
from lejepa_fast.errors import RunError, UsageError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failed run, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="lejepa-data", description="Prepare image data for training.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (verify, pack, index):
        name, about = module.__name__.rpartition(".")[2], module.__doc__
        command = commands.add_parser(name, description=about, help=(about or "").partition("\n")[0])
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
