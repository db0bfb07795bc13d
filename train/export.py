"""Write the encoder of a checkpoint: `python train/export.py --checkpoint RUN --out encoder.safetensors`.

A finished run has these files already; checkpoint/trained_model.py says what is in them. Exit codes: 0 done,
1 the disk refuses, 2 wrong usage, 130 Ctrl-C.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lejepa_fast.errors import UsageError
from lejepa_fast.train.runtime.command import run_with_options


@dataclass(frozen=True)
class Options:
    """Write the encoder of a checkpoint to a safetensors file, and beside it how timm builds the model."""

    checkpoint: Path
    """A run folder (its newest checkpoint is used) or a folder checkpoints/step-*."""
    out: Path = Path("encoder.safetensors")
    """File to write; the settings go beside it, to the same name with .json, and for timm to config.json."""
    averaged: bool = True
    """Take the averaged weights if the run keeps them (--average)."""
    encoder: Literal["target", "context"] = "target"
    """Of I-JEPA: the target encoder, which is evaluated, or the context encoder. Other runs have one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_with_options(Options, _export, argv)


def _export(options: Options) -> None:
    from lejepa_fast.train.checkpoint.trained_model import export_encoder, load_trained  # after --help

    out = options.out
    if out.suffix != ".safetensors":
        raise UsageError(f"out: expected a file name that ends in .safetensors, got {out}")
    if out.name == "config.safetensors":
        raise UsageError(f"out: {out} would put its settings where those for timm go; use another name")
    found = load_trained(options.checkpoint, averaged=options.averaged, which=options.encoder)
    if options.encoder == "context" and found.cfg.objective != "ijepa":
        raise UsageError(f"encoder: {options.checkpoint} is a run of {found.cfg.objective}, with one encoder")
    export_encoder(
        found.model.encoder,
        found.cfg,
        found.step,
        out.parent,
        out.name,
        which=options.encoder,
        way_out="choose another --out",
    )
    print(f"step {found.step} of {found.path}{', averaged weights' if found.averaged else ''}: {out}")


if __name__ == "__main__":
    sys.exit(main())
