"""The trained encoder as others take it: `encoder.safetensors` and `encoder.json`.

settings = json.load(open("encoder.json"))
encoder = timm.create_model(**settings["model"])
encoder.load_state_dict(safetensors.torch.load_file("encoder.safetensors"))

The trainer writes both at the end of a run. From a checkpoint, while a run goes on or after it has ended:

    python train/export.py --checkpoint RUN --out encoder.safetensors
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from lejepa_fast.errors import UsageError
from lejepa_fast.train.checkpoint.storage import find_checkpoint, has_average, load_model
from lejepa_fast.train.config import Config, from_dict
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.runtime.command import log_to_stderr, parse_options, run_command
from lejepa_fast.train.runtime.files import write_atomically


@dataclass(frozen=True)
class Options:
    """Write the encoder of a checkpoint to a safetensors file, and beside it how timm builds the model."""

    checkpoint: Path
    """A run folder (its newest checkpoint is taken) or a folder checkpoints/step-*."""
    out: Path = Path("encoder.safetensors")
    """The file to write; the settings go beside it, to the same name with .json."""
    averaged: bool = True
    """Take the averaged weights where the run keeps them (--average)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 the disk refuses, 2 wrong usage."""
    log_to_stderr()
    given = sys.argv[1:] if argv is None else argv
    return run_command(lambda: convert(parse_options(Options, given, description=Options.__doc__ or "")))


def convert(options: Options) -> Path:
    """Write the two files of a checkpoint; returns the path of the weights. Reads the encoder alone."""
    if options.out.suffix != ".safetensors":
        raise UsageError(f"out: expected a file name that ends in .safetensors, got {options.out}")
    path, state = find_checkpoint(options.checkpoint)
    cfg = from_dict(state["config"], where=f"checkpoint {path}")
    averaged = options.averaged and has_average(state)
    weights = load_model(path, "average.encoder" if averaged else "model.encoder")
    encoder = build_model(cfg, meta=True).encoder
    odd = sorted(encoder.state_dict().keys() ^ weights.keys())
    if odd:
        raise UsageError(
            f"checkpoint {path} does not hold the encoder that its configuration describes ({odd[0]}); "
            "it was written by another version: convert it with that one"
        )
    _write(weights, encoder.encoder_args, cfg, state["step"], options.out, way_out="choose another --out")
    print(f"step {state['step']} of {path}{', averaged weights' if averaged else ''}: {options.out}")
    return options.out


def export_encoder(encoder: nn.Module, cfg: Config, step: int, run_dir: Path) -> Path:
    """Write both files into `run_dir`; returns the path of the weights. RunError if the disk refuses.

    `encoder.json`: "model" (arguments of `timm.create_model`), "input" (size, mean and std of the images
    that it was evaluated on, RGB in 0-1 before normalisation) and "step".
    """
    way_out = "free some space and run the same command again: a finished run goes straight to this step"
    path = run_dir / "encoder.safetensors"
    _write(encoder.state_dict(), encoder.encoder_args, cfg, step, path, way_out=way_out)
    return path


def _write(
    weights: Mapping[str, Tensor], encoder_args: Any, cfg: Config, step: int, path: Path, *, way_out: str
) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    settings = {
        "model": encoder_args,
        "input": {
            "size": cfg.eval.image_size or cfg.crops.global_size,
            "mean": list(cfg.crops.mean),
            "std": list(cfg.crops.std),
        },
        "trained_with": "lejepa_fast",
        "step": step,
    }
    write_atomically(path, lambda file: file.write(save(plain)), way_out=way_out)
    text = json.dumps(settings, indent=2) + "\n"
    write_atomically(path.with_suffix(".json"), lambda file: file.write(text.encode()), way_out=way_out)


if __name__ == "__main__":
    sys.exit(main())
