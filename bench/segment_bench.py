"""Foreground without labels: IoU of attention and principal components. python bench/segment_bench.py

Two sets: pictures of bench/shapes.py (trained on 2,000, measured on 300 others), and photos of the embedded
set trashnet96 (trained on its training split, measured on photos of its validation split). Nobody drew the
masks of the photos: they are the difference to the plain background, by `object_mask`, of the photos where
two rules for it agree. So they favor whatever goes by color; the principal component of the mean color of
each patch, "pixels", is the baseline to beat there.

A vision transformer of 0.5 M parameters, patch 8, is trained by LeJEPA on 64-px crops and measured at 96 px
by train/segment.py, beside its own starting weights. Appends a row for each set and encoder to
segment.jsonl. A finished training in --work is not repeated.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from benchlib import Row, Rows, command_line, print_rows
from PIL import Image, ImageDraw, ImageFilter
from shapes import write_labels, write_shapes
from torch import Tensor, nn

from lejepa_fast.data import MultiCropRecipe, open_source
from lejepa_fast.errors import RunError
from lejepa_fast.train import segment
from lejepa_fast.train.config import Config, DataConfig, EvalConfig, LossConfig, ModelConfig, OptimConfig
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.evaluation.segmentation import score_maps, set_maps
from lejepa_fast.train.runtime.world import World

SIZE = 96
PATCH = 8
STEPS = 160


def configuration(data: str, run: Path) -> Config:
    kwargs = json.dumps({"patch_size": PATCH, "embed_dim": 96, "depth": 4, "num_heads": 3})
    local: dict = {"local_crops": 2, "local_size": 32, "local_scale": (0.1, 0.4)}
    return Config(
        data=DataConfig(path=data, batch_size=64, workers=1),
        crops=MultiCropRecipe(global_size=64, **local, blur_kernel=5, solarize_prob=0.0, min_image_size=1),
        model=ModelConfig("vit_tiny_patch16_224", kwargs=kwargs, projector_hidden=512, projector_dim=64),
        loss=LossConfig(lambd=0.1, num_slices=256),
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_fraction=0.1),
        eval=EvalConfig(every=0, image_size=SIZE),
        out=run,
        max_steps=STEPS,
        device="cpu",
        tensorboard=False,
        checkpoint_every=40,
        keep_checkpoints=1,
    )


def object_mask(photo: Image.Image) -> np.ndarray | None:
    """Mask (H, W) bool of an object before a plain background; None where it is not clear.

    The background is a quadratic surface in each channel, fitted to the frame of the photo. Foreground
    differs from it in tint, or is less than half as bright, so that shadows are not; closed, and without
    holes. It is clear if a second rule, any difference, agrees (IoU of 70 % or more), the frame is free, and
    it covers 6 to 60 % of the photo.
    """
    pixels = np.asarray(photo.convert("RGB"), np.float64)
    height, width, _ = pixels.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    basis = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], -1)
    frame = np.maximum(abs(x), abs(y)) > 0.86
    used = frame
    for _ in range(4):  # the object may reach into the frame
        background = basis @ np.linalg.lstsq(basis[used], pixels[used], rcond=None)[0]
        difference = np.linalg.norm(pixels - background, axis=-1)
        used = frame & (difference < max(12.0, 2 * np.median(difference[used])))
    brightness = np.linalg.norm(background, axis=-1)
    along = ((pixels - background) * background).sum(-1) / brightness
    tint = np.linalg.norm(pixels - background - (along / brightness)[..., None] * background, axis=-1)
    mask, other = (_filled(each) for each in ((tint > 22) | (along < -0.5 * brightness), difference > 28))
    agree = (mask & other).sum() >= 0.7 * (mask | other).sum()
    return mask if agree and mask[frame].mean() < 0.02 and 0.06 < mask.mean() < 0.6 else None


def _filled(mask: np.ndarray) -> np.ndarray:
    """Without specks, gaps and holes."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MedianFilter(3))
    image = image.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.MinFilter(5))
    padded = Image.new("L", (image.width + 2, image.height + 2))
    padded.paste(image, (1, 1))
    ImageDraw.floodfill(padded, (0, 0), 128)
    return np.asarray(padded)[1:-1, 1:-1] != 128


def write_photos(folder: Path) -> None:
    """Photos of the validation split with clear masks, their centers of 96 x 96 px, as write_shapes does;
    labels.csv has the names alone."""
    source = open_source("trashnet96", "val")
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = []
    for index in range(len(source)):
        photo, _ = source[index]
        if (mask := object_mask(photo)) is None:
            continue
        left, top = (photo.width - SIZE) // 2, (photo.height - SIZE) // 2
        box, name = (left, top, left + SIZE, top + SIZE), f"{index:05d}.png"
        photo.crop(box).save(folder / "images" / name)
        Image.fromarray(mask.astype(np.uint8) * 255).crop(box).save(folder / "masks" / name)
        names.append(name)
    write_labels(folder, [("file",), *((name,) for name in names)])


class Pixels(nn.Module):
    """The baseline: the mean color of each patch."""

    def forward_intermediates(self, images: Tensor, **options: object) -> tuple[Tensor, list[Tensor]]:
        return images, [F.avg_pool2d(images, PATCH)]


def measured(name: str, run: Path, folder: Path, out: Path, pca: str) -> list[Row]:
    """Rows of a set: IoU of train/segment.py with --pca, and of the baseline."""
    images, masks = folder / "images", folder / "masks"
    arguments = ["--checkpoint", str(run), "--images", str(images), "--masks", str(masks), "--out", str(out)]
    if segment.main([*arguments, "--device", "cpu", "--draw", "16", "--pca", pca]):
        raise RunError(f"train/segment.py failed on {images}")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    files = sorted(images.iterdir())
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]).astype(np.float32) / 255
    truth = torch.from_numpy(np.stack([np.asarray(Image.open(masks / file.name)) > 0 for file in files]))
    seen, batch = truth.flatten(1).any(1), torch.from_numpy(pixels).permute(0, 3, 1, 2)
    maps = set_maps(Pixels(), [(batch, batch)], "cpu", per_image=pca == "per-image").part(seen)
    found = {**summary["iou"], "pixels": {"pca": score_maps(maps, truth[seen])["pca"]._asdict()}}
    about = {"set": name, "images": summary["measured"], "image_size": SIZE, "step": summary["step"]}
    about |= {"pca": pca, "foreground": truth[seen].float().mean().item()}
    return [{**about, "encoder": encoder, "iou": figures} for encoder, figures in found.items()]


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/segment_bench"), help="pictures and runs")
    options = parser.parse_args(arguments)
    work: Path = options.work
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name, write in {
        "shapes": lambda folder: write_shapes(folder, 2000),
        "shapes-measured": lambda folder: write_shapes(folder, 300, seed=1),
        "trashnet96-measured": write_photos,
    }.items():
        if not (work / name / "labels.csv").exists():
            write(work / name)
    writer = Rows(options.out / "segment.jsonl", "segment", torch.device("cpu"))
    rows = []
    for name, data in (("shapes", str(work / "shapes" / "images")), ("trashnet96", "trashnet96")):
        run = work / f"run-{name}"
        with Trainer(configuration(data, run), World(torch.device("cpu"))) as trainer:
            trainer.train()  # goes on with the training that is there
        for pca in ("joint", "per-image"):
            out = work / f"out-{name}-{pca}"
            rows += writer.write(*measured(name, run, work / f"{name}-measured", out, pca))
    columns = {
        "set, encoder": "{set}, {encoder}, {pca} PCA",
        "map": "{map}",
        "IoU, one threshold": "{iou:.1f}",
        "one for each image": "{oracle:.1f}",
        "random": "{random:.1f}",
    }
    print_rows([{**row, "map": key, **iou} for row in rows for key, iou in row["iou"].items()], columns)


if __name__ == "__main__":
    main()
