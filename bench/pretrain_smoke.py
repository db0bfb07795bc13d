"""A short training, to see that it works on this machine: python bench/pretrain_smoke.py --out DIR

The preset `laptop` on the embedded images, evaluation and report included. Appends a row to
DIR/gpu_check.jsonl; the exit code is 1 if a loss is not finite or a step is missing. tyro is not needed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from pathlib import Path

import loader_files
import no_tyro  # noqa: F401 - before the trainer
import torch
from benchlib import Row, Rows, command_line, read_rows

from lejepa_fast.train.config.presets import PRESETS
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.world import setup_world


def problem_of(trained: list[Row], steps: int) -> str | None:
    """What is wrong with the metrics of a training of so many steps."""
    if not trained or trained[-1]["step"] != steps:
        return f"expected {steps} steps, got {trained[-1]['step'] if trained else 0}"
    if not all(math.isfinite(row["loss"]) for row in trained):
        return "a loss is not finite"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, rehearse="two steps on the CPU, with a few images that are made here")
    options = parser.parse_args(arguments)
    steps, device, impl = (2, "cpu", "torch") if options.rehearse else (50, "cuda", "triton")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU, PyTorch finds none; --rehearse runs on the CPU")
    preset = PRESETS["laptop"]
    with tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(
            preset,
            out=Path(folder, "run"),
            max_steps=steps,
            device=device,  # type: ignore[arg-type]
            loss=dataclasses.replace(preset.loss, impl=impl),  # type: ignore[arg-type]
            eval=dataclasses.replace(preset.eval, every=0),
            tensorboard=False,
        )
        if options.rehearse:
            for name, count in (("train/a", 8), ("train/b", 8), ("val/a", 4), ("val/b", 4)):
                loader_files.make_folder(Path(folder, "images", name), count)
            data = dataclasses.replace(cfg.data, path=str(Path(folder, "images")), batch_size=8)
            cfg = dataclasses.replace(cfg, data=data)
        began = time.perf_counter()
        Trainer(cfg, setup_world(cfg.device)).run()
        row: Row = {"seconds": time.perf_counter() - began}
        rows = read_rows(Path(folder, "run", "metrics.jsonl"))
    facts = next(row for row in rows if row["kind"] == "run")
    trained = [row for row in rows if row["kind"] == "train"]
    row |= {"steps": trained[-1]["step"] if trained else 0, "losses": [row["loss"] for row in trained]}
    row |= {"sigreg_impl": facts["sigreg_impl"], "precision": facts["precision"]}
    row["problem"] = problem_of(trained, steps)
    writer = Rows(options.out / "gpu_check.jsonl", "pretrain_smoke", torch.device(device))
    writer.write(row)
    print(f"{row['steps']} steps, SIGReg {row['sigreg_impl']}: {row['problem'] or 'ok'}")
    return 1 if row["problem"] else 0


if __name__ == "__main__":
    sys.exit(main())
