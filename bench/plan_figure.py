"""Memory per GPU against the number of GPUs, planned: python bench/plan_figure.py [--out DIR]

Plans ViT-L, giant and gigantic (2 x 224 + 6 x 98 px, bf16, FSDP2, 16 images per GPU, with and without
activation checkpointing) for 1 to 256 GPUs; no GPU is used. Appends a row for each point to plan.jsonl and
draws plan.png.
"""

from typing import Literal

from benchlib import Row, Rows, command_line
from matplotlib.figure import Figure

from lejepa_fast.train.config import Config, ModelConfig, ParallelConfig
from lejepa_fast.train.planning.memory import plan_memory

MODES: tuple[Literal["none", "full"], ...] = ("none", "full")
MODELS = ("vit_large", "vit_giant", "vit_gigantic")
GPUS = tuple(2**power for power in range(9))
IMAGES = 16


def main(arguments: list[str] | None = None) -> None:
    options = command_line(__doc__).parse_args(arguments)
    writer = Rows(options.out / "plan.jsonl", "plan")
    figure = Figure(figsize=(7.6, 5.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    for number, model in enumerate(MODELS):
        for mode in MODES:
            parallel = ParallelConfig(strategy="fsdp", activation_checkpointing=mode)
            cfg = Config(model=ModelConfig(model), parallel=parallel, precision="bf16", device="cpu")
            found = plan_memory(cfg, shards=8, images=IMAGES)
            gib = [found.peak(gpus, IMAGES) / 2**30 for gpus in GPUS]
            about: Row = {"kind": "memory", "model": model, "activation_checkpointing": mode}
            about["images_per_gpu"] = IMAGES
            writer.write(*({**about, "gpus": n, "peak_gib": peak} for n, peak in zip(GPUS, gib, strict=True)))
            label = f"{model}, {'no' if mode == 'none' else mode} checkpointing"
            print(f"{label}: {', '.join(f'{peak:.1f}' for peak in gib)} GiB on {GPUS} GPUs", flush=True)
            axes.plot(GPUS, gib, "o-" if mode == "none" else "o--", color=f"C{number}", label=label)
    title = f"Planned peak memory, FSDP2, bf16, {IMAGES} images per GPU"
    axes.set(xlabel="GPUs", ylabel="peak GiB per GPU", title=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=len(MODELS), fontsize=8)
    figure.savefig(options.out / "plan.png")


if __name__ == "__main__":
    main()
