"""Segmentation without labels: `python train/segment.py --checkpoint RUN --images PATH`.

Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 Ctrl-C.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from lejepa_fast.errors import UsageError
from lejepa_fast.train.config.settings import AtLeast0, AtLeast1, Config, Pixels
from lejepa_fast.train.runtime.command import run_with_options
from lejepa_fast.train.runtime.files import disk_errors_named, write_json

if TYPE_CHECKING:
    from lejepa_fast.data import ImageSource
    from lejepa_fast.train.evaluation.segmentation import Overlap

ROWS = 8  # of a page
WRITTEN = ("page-[0-9][0-9][0-9]*.png", "sequence.webp", "summary.json")
ANIMATED = (".gif", ".webp", ".png", ".apng", ".tif", ".tiff")


@dataclass(frozen=True)
class Options:
    """Show what the last layer of an encoder tells apart: principal components and attention of its
    patches."""

    checkpoint: Path
    """A run folder (its newest checkpoint is used) or a folder checkpoints/step-*."""
    images: Path
    """A folder of images (also in folders below it), one image, or an animated picture."""
    masks: Path | None = None
    """A folder of masks with the names of the images, but for the suffix. Any value but 0 is foreground;
    alpha does not count. Prints the IoU with them, of the untrained encoder and of constant answers, too."""
    sequence: bool = False
    """The images are frames in the order of their names: write an animation. Animated pictures always are."""
    fps: Annotated[float, Ge(0.01), Le(100)] = 8.0
    """Frames per second of an animation."""
    pca: Literal["joint", "per-image"] = "joint"
    """Principal components of all images together, so that a color means the same in all; or of each
    alone."""
    threshold: Annotated[float, Ge(0.01), Le(0.99)] = 0.6
    """Share of the attention that is drawn as foreground."""
    draw: AtLeast0 = 64
    """Draw the first images, this many; of a sequence all. With masks, all images are measured."""
    image_size: Pixels | None = None
    """Side of the images in pixels; None: as in the evaluation of the run. Larger ones give more patches."""
    batch_size: AtLeast1 = 32
    """Images per forward pass. The results do not depend on it."""
    averaged: bool = True
    """Take the averaged weights if the run keeps them (--average)."""
    out: Path | None = None
    """Folder for pictures and summary.json; None: RUN/segmentation/step-N."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: on a GPU if there is one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_with_options(Options, _segment, argv)


def _segment(options: Options) -> None:
    # Not above: `--help` does not wait for PyTorch.
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from lejepa_fast.data import eval_loader
    from lejepa_fast.train.checkpoint.trained_model import load_trained
    from lejepa_fast.train.evaluation.embeddings import calibrate_batchnorm
    from lejepa_fast.train.evaluation.segmentation import constant_overlap, score_maps, set_maps
    from lejepa_fast.train.model.model import build_model
    from lejepa_fast.train.report.overlays import draw_animation, draw_page, map_pictures, to_pixels
    from lejepa_fast.train.runtime.world import choose_device

    model, cfg, step, path, *_ = load_trained(options.checkpoint, averaged=options.averaged)
    device = choose_device(options.device)
    source, names, animated = _open_images(options.images, cfg)
    masks = None if options.masks is None else _open_masks(options.masks, names, source, animated)
    size = options.image_size or cfg.eval.image_size or cfg.crops.global_size

    def loader(images: "ImageSource", **changes: Any) -> Any:
        given: dict[str, Any] = {"image_size": size, "batch_size": options.batch_size}
        given |= {"max_bad_fraction": 0.0, "mean": cfg.crops.mean, "std": cfg.crops.std}
        given["backend"] = "torchvision" if images.channels == 3 else "cpu"
        return eval_loader(images, **{**given, **changes})

    run_dir = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    out = options.out or run_dir / "segmentation" / path.name
    earlier = _earlier_files(out, options)
    with disk_errors_named(out, "choose another --out"):  # before the work
        out.mkdir(parents=True, exist_ok=True)
    if masks is not None:
        plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "backend": "torchvision"}
        truth = torch.cat([each[:, 0] > 0.5 for each, _ in loader(masks, **plain)])
        used = truth.flatten(1).any(1)
        if not used.any():
            raise UsageError(f"masks: expected foreground in {options.masks}, got none in the centers of all")
        full = sum(int(mask.sum()) > 0.99 * size**2 for mask in truth)
        if full > 0.9 * len(truth):
            print(f"warning: {full} of {len(truth)} masks are foreground nearly everywhere; background is 0")
        truth = truth[used]
        starting = build_model(cfg).to(device)
        if any(isinstance(part, _BatchNorm) for part in starting.encoder.modules()):
            seen = source if len(source) > 1 else source.subset([0, 0])  # one image has no variance
            calibrate_batchnorm(starting, loader(seen, batch_size=max(2, options.batch_size)), device)
    per_image = options.pca == "per-image"
    maps = set_maps(model.encoder.to(device), loader(source), device, per_image=per_image)
    if maps.attention is None:
        print(f"model {cfg.model.name}: its attention cannot be read here; showing PCA only")
    summary: dict[str, Any] = {"images": len(names), "image_size": size, "step": step, "pca": options.pca}
    sequence = options.sequence or animated
    drawn = len(names) if sequence else min(options.draw, len(names))
    with disk_errors_named(out, "choose another --out"):
        for file in earlier:
            file.unlink(missing_ok=True)
        if drawn:
            shown = torch.cat([each for each, _ in loader(source.subset(range(drawn)))])
            pixels = to_pixels(shown, cfg.crops.mean, cfg.crops.std)
            look: dict[str, Any] = {"threshold": options.threshold, "per_image": per_image}
            columns = map_pictures(pixels, maps.part(slice(drawn)), **look, heads=not sequence)
        if sequence:
            draw_animation(out / "sequence.webp", columns, frames_per_second=options.fps)
        for page, first in enumerate(range(0, 0 if sequence else drawn, ROWS)):
            rows = slice(first, min(first + ROWS, drawn))
            cut = {name: each[rows] for name, each in columns.items()}
            draw_page(out / f"page-{page + 1:03d}.png", cut, names[rows])
    if masks is not None:
        untrained = set_maps(starting.encoder, loader(source), device, per_image=per_image)
        scores = {
            "trained": score_maps(maps.part(used), truth),
            "untrained": score_maps(untrained.part(used), truth),
            "constant": constant_overlap(truth),
        }
        summary["measured"] = len(truth)
        summary["iou"] = {
            name: {key: overlap._asdict() for key, overlap in each.items()} for name, each in scores.items()
        }
        print(_table(scores, len(truth), len(names)))
    write_json(out / "summary.json", summary, way_out="choose another --out")
    print(f"pictures: {out}")


def _open_images(path: Path, cfg: Config) -> "tuple[ImageSource, list[str], bool]":
    """Images in natural order (frame-2 before frame-10), their names, and whether they are an animation."""
    from lejepa_fast.data.sources.folder import FileSource, is_image, walk_files
    from lejepa_fast.data.sources.scientific import as_trained

    if not path.exists():
        raise UsageError(f"images: expected a folder or a picture, got {path}, which does not exist")
    single = path.is_file()
    root, names = (path.parent, [path.name]) if single else (path, walk_files(path)[0])
    if not names or (single and not is_image(path.name)):
        raise UsageError(f"images: expected images, got {path}, which holds none")
    names.sort(key=_natural)
    about = {"name": path.name, "classes": None, "targets": None}
    files = FileSource(root, names, **about)
    slices = "all" if single and path.suffix.lower() in ANIMATED and cfg.data.channels in (1, 3) else "first"
    source = as_trained(files, slices, cfg.data.channels)  # type: ignore[arg-type]
    source.value_range = cfg.data.value_range
    if len(source) > 1 and single:
        names = [f"{path.stem} {i + 1}" for i in range(len(source))]
    return source, names, single and len(source) > 1


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _earlier_files(out: Path, options: Options) -> list[Path]:
    """What an earlier call wrote to `out`; UsageError if that is among the images or masks of this one."""
    earlier = [file for name in WRITTEN for file in sorted(out.glob(name))]
    for argument in ("images", "masks"):
        path = getattr(options, argument)
        if path and (read := [file for file in earlier if file.resolve().is_relative_to(path.resolve())]):
            got = f"{read[0]}, which would be removed as written by an earlier call; choose another --out"
            raise UsageError(f"{argument}: expected files outside {out}, got {got}")
    return earlier


def _open_masks(folder: Path, names: Sequence[str], images: "ImageSource", animated: bool) -> "ImageSource":
    from lejepa_fast.data.sources.folder import walk_files
    from lejepa_fast.train.evaluation.segmentation import MaskSource

    if not folder.is_dir():
        raise UsageError(f"masks: expected a folder, got {folder}")
    found = walk_files(folder)[0]
    stems = list(names) if animated else [os.path.splitext(name)[0] for name in names]
    _by_stem("images", names, stems)
    masks = _by_stem("masks", found, [os.path.splitext(name)[0] for name in found])
    if missing := [stem for stem in stems if stem not in masks]:
        got = f"none for {len(missing)} of {len(stems)} images, such as {missing[0]}"
        raise UsageError(f"masks: expected one of the name of each image in {folder}, got {got}")
    return MaskSource([folder / masks[stem] for stem in stems], images)


def _by_stem(argument: str, names: Sequence[str], stems: Sequence[str]) -> dict[str, str]:
    """Names by their stems; UsageError for two with the same one."""
    by_stem: dict[str, str] = {}
    for name, stem in zip(names, stems, strict=True):
        if (first := by_stem.setdefault(stem, name)) is not name:
            got = f"{first} and {name}"
            raise UsageError(f"{argument}: expected names that differ before the suffix, got {got}")
    return by_stem


def _table(scores: "dict[str, dict[str, Overlap]]", measured: int, images: int) -> str:
    """IoU in percent: one threshold for all images, and in brackets the best of each image."""
    left_out = "" if measured == images else f" ({images - measured} without foreground left out)"
    lines = [
        f"IoU in % with {measured} masks{left_out}, one threshold for all; [of each image]; (random pixels)"
    ]
    maps = {"attention": "attention", "best_head": "best head", "low_attention": "low att.", "pca": "PCA 1"}
    for key, title in maps.items():
        for encoder in ("trained", "untrained"):
            if found := scores[encoder].get(key):
                figures = f"{found.iou:5.1f}  [{found.oracle:5.1f}]  ({found.random:5.1f})"
                lines.append(f"{title:<10} {encoder:<10} {figures}")
    for key, title in (("all_foreground", "all foreground"), ("centered", "centered disc")):
        found = scores["constant"][key]
        lines.append(f"{title:<21} {found.iou:5.1f}  [{found.oracle:5.1f}]  ({found.random:5.1f})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
