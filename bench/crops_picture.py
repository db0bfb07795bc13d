"""Picture of the same crops from both backends: python bench/crops_picture.py [--out FILE] [--device cuda]

Both draw the same random numbers, so what differs is rounding; the picture is there to be looked at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from benchlib import RESULTS

from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source

PHOTOGRAPHS = (280, 623, 42, 1162)
RECIPE = MultiCropRecipe(global_size=96, local_crops=4, local_size=48, blur_kernel=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "crops.png")
    parser.add_argument("--device", help="a GPU, for its operator graph (default: the CPU)")
    options = parser.parse_args()
    source = open_source("trashnet96", "train").subset(PHOTOGRAPHS)
    made = {}
    for backend in ("torchvision", "dali"):
        loader = multicrop_loader(
            source,
            RECIPE,
            batch_size=len(source),
            seed=3,
            backend=backend,
            device=options.device if backend == "dali" else None,
            shuffle=False,
            dtype=torch.uint8,
        )
        made[backend] = [view.cpu().permute(0, 2, 3, 1).numpy() for view in next(iter(loader))[0]]
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 1 + 2 * RECIPE.num_views
    widths = [1.0] + 2 * [1.0 if size == RECIPE.global_size else 0.6 for size in RECIPE.view_sizes()]
    figure, axes = plt.subplots(
        len(source), columns, figsize=(sum(widths), 1.08 * len(source)), width_ratios=widths,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    for row in range(len(source)):
        axes[row, 0].imshow(source[row][0])
        for number, backend in enumerate(made):
            for v, views in enumerate(made[backend]):
                axes[row, 1 + number * RECIPE.num_views + v].imshow(views[row])
    axes[0, 0].set_title("image", fontsize=8)
    for number, backend in enumerate(made):
        axes[0, 1 + number * RECIPE.num_views].set_title(f"backend {backend}", fontsize=8, loc="left")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)
    print(options.out)


if __name__ == "__main__":
    main()
