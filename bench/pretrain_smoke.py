"""A short run of train/pretrain.py, to see that it works here: python bench/pretrain_smoke.py --out DIR

The preset `laptop` on the embedded images with the SIGReg implementation of --impl, evaluation and report
included. Appends a row to DIR/gpu_check.jsonl; exit code 1 if a loss is not finite or a step is missing. The
command line of the trainer needs tyro: without it the same steps run through `Trainer`, and the row says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchlib import append_rows, machine, read_rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.jsonl")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--impl", choices=["auto", "triton", "torch"], default="triton")
    parser.add_argument("--rehearse", action="store_true", help="with a few tiny images that are made here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU for cuda, PyTorch finds none; use --device cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        changes: dict[str, Any] = {"out": run, "max_steps": options.steps, "device": options.device}
        data = {"path": make_images(Path(folder, "images")), "batch_size": 8} if options.rehearse else {}
        began = time.perf_counter()
        if importlib.util.find_spec("tyro"):
            through, code = "command line", run_command(changes, options.impl, data)
        else:
            through, code = "Trainer: tyro is not installed", run_trainer(changes, options.impl, data)
        seconds = time.perf_counter() - began
        rows = read_rows(run / "metrics.jsonl")
    facts: dict[str, Any] = next((row for row in rows if row["kind"] == "run"), {})
    trained = [row for row in rows if row["kind"] == "train"]
    problem = problem_of(code, trained, options.steps)
    row = {
        "benchmark": "pretrain_smoke",
        "steps": trained[-1]["step"] if trained else 0,
        "losses": [row["loss"] for row in trained],
        "seconds": seconds,
        "sigreg_impl": facts.get("sigreg_impl"),
        "precision": facts.get("precision"),
        "through": through,
        "problem": problem,
    }
    append_rows(options.out / "gpu_check.jsonl", [row | machine(torch.device(options.device))])
    print(f"{row['steps']} steps through the {through}, SIGReg {row['sigreg_impl']}: {problem or 'ok'}")
    return 1 if problem else 0


def problem_of(code: int, trained: list[dict[str, Any]], steps: int) -> str | None:
    if code:
        return f"the training ended with exit code {code}"
    if not trained or trained[-1]["step"] != steps:
        return f"expected {steps} steps, got {trained[-1]['step'] if trained else 0}"
    if not all(math.isfinite(row["loss"]) for row in trained):
        return "a loss is not finite"
    return None


def run_command(changes: dict[str, Any], impl: str, data: dict[str, Any]) -> int:
    from lejepa_fast.train import pretrain

    arguments = ["--preset", "laptop", "--loss.impl", impl, "--eval.every", "0", "--no-tensorboard"]
    for name, value in {**changes, **data}.items():
        option = {"path": "data"}.get(name, name).replace("_", "-")
        arguments += [f"--{option}", str(value)]
    return pretrain.main(arguments)


def run_trainer(changes: dict[str, Any], impl: str, data: dict[str, Any]) -> int:
    import no_tyro  # noqa: F401, I001 - before the trainer
    from lejepa_fast.train.runtime.command import log_to_stderr
    from lejepa_fast.train.pretrain import pretrain
    from lejepa_fast.train.config.presets import PRESETS
    from lejepa_fast.train.runtime.world import setup_world

    log_to_stderr()
    preset = PRESETS["laptop"]
    cfg = dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, **data),
        loss=dataclasses.replace(preset.loss, impl=impl),
        eval=dataclasses.replace(preset.eval, every=0),
        tensorboard=False,
        **changes,
    )
    pretrain(cfg, setup_world(cfg.device))
    return 0


def make_images(folder: Path) -> str:
    """Two classes of noise, 64 x 64 px, for the training and for the evaluation."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f"{i}.png")
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
