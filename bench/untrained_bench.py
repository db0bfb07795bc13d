"""kNN and linear probe of UNTRAINED encoders on the embedded images: how strong is the baseline?

    python bench/untrained_bench.py [--models NAME ...] [--sizes PX ...]

Accuracies of a trained encoder mean little without this: random convolutional features do well on small
images, some architectures far better than others. The protocol is that of train/evaluate.py, BatchNorm
statistics calibrated on training images.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from benchlib import RESULTS, append_rows, machine, print_table

from lejepa_fast.train.config import Config, EvalConfig, ModelConfig
from lejepa_fast.train.config.presets import PRESETS
from lejepa_fast.train.evaluation.evaluate import evaluate_untrained, open_splits

MODELS = ("laptop", "resnet10t", "resnet18", "test_resnet", "mobilenetv3_small_050", "lcnet_100")


def configuration(model: str, size: int, seed: int) -> Config:
    laptop = PRESETS["laptop"]
    encoder = (
        laptop.model if model == "laptop" else ModelConfig(name=model, projector_dim=64, projector_hidden=512)
    )
    return dataclasses.replace(laptop, model=encoder, eval=EvalConfig(image_size=size), seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=MODELS, help="timm names; 'laptop' is the preset's encoder"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[48], help="image sizes in pixels")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for untrained.jsonl")
    options = parser.parse_args()
    rows, table = [], []
    for model in options.models:
        for size in options.sizes:
            for seed in options.seeds:
                cfg = configuration(model, size, seed)
                result = evaluate_untrained(cfg, *open_splits(cfg.data), device="cpu", num_workers=1)
                figures = {"knn": result.knn, "linear": result.linear}
                about = {"benchmark": "untrained", "model": model, "image_size": size, "seed": seed}
                rows.append({**about, **figures, **machine()})
                table.append([model, str(size), str(seed), f"{result.knn:.1f}", f"{result.linear:.1f}"])
    print_table(["untrained encoder", "px", "seed", "kNN %", "linear %"], table)
    append_rows(options.out / "untrained.jsonl", rows)
    print(f"rows: {options.out / 'untrained.jsonl'}")


if __name__ == "__main__":
    main()
