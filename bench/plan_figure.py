"""Memory per GPU against the number of GPUs, planned: python bench/plan_figure.py [--out DIR]

Plans ViT-L, giant and gigantic (2 x 224 + 6 x 98 px, bf16, FSDP2, 16 images per GPU, with and without
activation checkpointing) for 1 to 256 GPUs by train/plan.py's means; no GPU is used. Appends a row for each
point to plan.jsonl and draws plan.png; and a row of kind `time`, how long the plan of ViT-gigantic on 64 GPUs
takes to print, which is to be under a minute on two cores.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchlib import RESULTS, append_rows, machine
from matplotlib.figure import Figure

from lejepa_fast.train.config import Config, ModelConfig, ParallelConfig
from lejepa_fast.train.planning.memory import plan_memory

MODELS = ("vit_large", "vit_giant", "vit_gigantic")
GPUS = tuple(2**power for power in range(9))
IMAGES = 16
PLAN = ["train/plan.py", "--model", "vit_gigantic", "--gpus", "64", "--gpu", "h200", "--batch", "4096"]
MOST_SECONDS = 60.0


def rows_of(model: str, mode: str) -> list[dict[str, Any]]:
    parallel = ParallelConfig(strategy="fsdp", activation_checkpointing=mode)  # type: ignore[arg-type]
    cfg = Config(model=ModelConfig(model), parallel=parallel, precision="bf16", device="cpu")
    found = plan_memory(cfg, shards=8, images=IMAGES)
    return [
        {
            "benchmark": "plan",
            "kind": "memory",
            "model": model,
            "activation_checkpointing": mode,
            "images_per_gpu": IMAGES,
            "gpus": gpus,
            "peak_gib": found.peak(gpus, IMAGES) / 2**30,
            "sent_gb": sum(found.traced.traffic.sent(gpus, 1)) / 1e9,
            **machine(),
        }
        for gpus in GPUS
    ]


def time_row() -> dict[str, Any]:
    """The plan's command from its start to its last line, imports included."""
    before, began = _cpu_seconds_of_children(), time.perf_counter()
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, *PLAN], cwd=root, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    return {
        "benchmark": "plan",
        "kind": "time",
        "planned": shlex.join(["python", *PLAN]),
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds_of_children() - before,
        "target_seconds": MOST_SECONDS,
        "met": seconds < MOST_SECONDS,
        **machine(),
    }


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plot_memory(path: Path, curves: dict[tuple[str, str], list[tuple[int, float]]], title: str) -> None:
    """Draw peak GiB per GPU against GPUs: one colour per model, one line style per variant."""
    models = list(dict.fromkeys(model for model, _ in curves))
    variants = list(dict.fromkeys(variant for _, variant in curves))
    figure = Figure(figsize=(7.6, 5.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (model, variant), points in curves.items():
        colour, line = f"C{models.index(model)}", ("-", "--", ":")[variants.index(variant) % 3]
        gpus, gib = zip(*points, strict=True)
        axes.plot(gpus, gib, color=colour, linestyle=line, marker="o", label=f"{model}, {variant}")
    axes.set(xlabel="GPUs", ylabel="peak GiB per GPU", title=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=max(1, len(models)), fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for plan.jsonl and plan.png")
    parser.add_argument("--models", nargs="+", default=MODELS, help="any timm names or short names")
    options = parser.parse_args()
    timed = time_row()
    append_rows(options.out / "plan.jsonl", [timed])
    print(f"{timed['planned']}: {timed['seconds']:.1f} s, {timed['cpu_seconds']:.1f} s of CPU time")
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for model in options.models:
        for mode in ("none", "full"):
            rows = rows_of(model, mode)
            append_rows(options.out / "plan.jsonl", rows)
            points = [(row["gpus"], row["peak_gib"]) for row in rows]
            curves[model, f"{'no' if mode == 'none' else mode} checkpointing"] = points
            said = ", ".join(f"{gib:.1f} GiB on {gpus}" for gpus, gib in points)
            print(f"{model}, activation checkpointing {mode}: {said}")
    title = f"Planned peak memory, FSDP2, bf16, {IMAGES} images per GPU"
    plot_memory(options.out / "plan.png", curves, title)
    print(f"figure: {options.out / 'plan.png'}")


if __name__ == "__main__":
    main()
