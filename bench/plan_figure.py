"""Memory per GPU against the number of GPUs, planned: python bench/plan_figure.py [--out DIR]

Plans ViT-L, giant and gigantic (2 x 224 + 6 x 98 px, bf16, FSDP2, 16 images per GPU, with and without
activation checkpointing) for 1 to 256 GPUs; no GPU is used. Appends a row for each point to plan.jsonl and
draws plan.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from benchlib import Rows, command_line
from matplotlib.figure import Figure

from lejepa_fast.train.config import Config, ModelConfig, ParallelConfig
from lejepa_fast.train.planning.memory import plan_memory

MODES: tuple[Literal["none", "full"], ...] = ("none", "full")
MODELS = ("vit_large", "vit_giant", "vit_gigantic")
GPUS = tuple(2**power for power in range(9))
IMAGES = 16


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="any timm names or short names")
    options = parser.parse_args(arguments)
    writer = Rows(options.out / "plan.jsonl", "plan")
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for model in options.models:
        for mode in MODES:
            parallel = ParallelConfig(strategy="fsdp", activation_checkpointing=mode)
            cfg = Config(model=ModelConfig(model), parallel=parallel, precision="bf16", device="cpu")
            found = plan_memory(cfg, shards=8, images=IMAGES)
            points = [(gpus, found.peak(gpus, IMAGES) / 2**30) for gpus in GPUS]
            about = {"kind": "memory", "model": model, "activation_checkpointing": mode}
            about["images_per_gpu"] = IMAGES
            writer.write(*({**about, "gpus": gpus, "peak_gib": gib} for gpus, gib in points))
            curves[model, f"{'no' if mode == 'none' else mode} checkpointing"] = points
            said = ", ".join(f"{gib:.1f} GiB on {gpus}" for gpus, gib in points)
            print(f"{model}, activation checkpointing {mode}: {said}", flush=True)
    title = f"Planned peak memory, FSDP2, bf16, {IMAGES} images per GPU"
    plot_memory(options.out / "plan.png", curves, title=title)


def plot_memory(path: Path, curves: dict[tuple[str, str], list[tuple[int, float]]], title: str) -> None:
    """Draw peak GiB per GPU against GPUs: one color per model, one line style per variant."""
    models = list(dict.fromkeys(model for model, _ in curves))
    variants = list(dict.fromkeys(variant for _, variant in curves))
    figure = Figure(figsize=(7.6, 5.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (model, variant), points in curves.items():
        color, line = f"C{models.index(model)}", ("-", "--", ":")[variants.index(variant) % 3]
        gpus, gib = zip(*points, strict=True)
        axes.plot(gpus, gib, color=color, linestyle=line, marker="o", label=f"{model}, {variant}")
    axes.set(xlabel="GPUs", ylabel="peak GiB per GPU", title=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=max(1, len(models)), fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
