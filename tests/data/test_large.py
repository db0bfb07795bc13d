"""Very large images: by how much they are reduced, and that the views are those of the whole image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_backends import on
from odd_files import saved
from PIL import Image, ImageFilter
from view_parity import sample_views

from lejepa_fast.data import MultiCropRecipe, eval_loader, multicrop_loader, open_source
from lejepa_fast.data.backends.torchvision_backend import apply_view, to_tensor
from lejepa_fast.data.draws import COLUMN_HEIGHT, COLUMN_WIDTH, view_table
from lejepa_fast.data.sources import FolderSource, large
from lejepa_fast.data.sources.decoding import open_encoded, to_rgb

RECIPE = MultiCropRecipe(
    global_size=48,
    local_size=24,
    local_crops=2,
    jitter_prob=0,
    grayscale_prob=0,
    blur_prob=0,
    solarize_prob=0,
)
SIZE = 1600, 1200  # for these crops the counterpart of 48 megapixels


@pytest.fixture
def low_limit(monkeypatch) -> None:
    monkeypatch.setattr(large, "LARGE_IMAGE", SIZE[0] * SIZE[1] - 1)


def photograph(size: tuple[int, int] = SIZE) -> Image.Image:
    """A mosaic of the embedded photographs, with the grain of a camera."""
    source = open_source("trashnet96", "train")
    mosaic = Image.new("RGB", (400, 300))
    for number in range(20):
        mosaic.paste(source[97 * number][0], (number % 5 * 80, number // 5 * 75))
    pixels = np.asarray(mosaic.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    pixels += np.random.default_rng(0).normal(0, 8, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.SHARPEN)


# --- by how much --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "changes", "factor"),
    [
        ((8000, 6000), {}, 4),
        ((6000, 8000), {}, 4),
        ((4096, 4096), {}, 1),  # not large
        ((4097, 4096), {}, 4),
        ((13000, 13000), {}, 8),
        ((8000, 6000), {"local_crops": 0}, 4),
        ((8000, 6000), {"local_crops": 0, "global_scale": (0.9, 1.0)}, 8),
        ((8000, 6000), {"global_size": 900}, 1),
        ((8000, 6000), {"min_image_size": 3000}, 2),  # it is not to become too small
        ((8000, 6000), {"aspect_ratio": (1 / 30, 30.0)}, 1),
        ((100_000, 480), {"global_size": 96, "local_size": 32}, 1),
        ((100_000, 1000), {"global_size": 96, "local_size": 32}, 2),
    ],
)
def test_reduction_for_crops(size, changes, factor):
    recipe = replace(MultiCropRecipe(), **changes)
    assert large.reduction_for_crops(recipe, *size) == factor


@pytest.mark.parametrize(
    ("size", "ratio"), [((8000, 6000), 4 / 3), ((40_000, 900), 4 / 3), ((4100, 4100), 4)]
)
def test_every_crop_keeps_two_pixels_for_one(size, ratio):
    recipe = replace(MultiCropRecipe(), aspect_ratio=(1 / ratio, ratio))
    factor = large.reduction_for_crops(recipe, *size)
    width, height = size[0] // factor, size[1] // factor
    drawn = view_table(recipe, seed=0, epoch=0, indices=range(300), sizes=[(width, height)] * 300)
    smallest = (drawn[..., [COLUMN_HEIGHT, COLUMN_WIDTH]].min(-1) / recipe.view_sizes()).min()
    assert factor == 1 or smallest >= 2 - 1 / 49  # windows are rounded to whole pixels


@pytest.mark.parametrize(("size", "factor"), [((8000, 6000), 8), ((30_000, 900), 2), ((30_000, 895), 1)])
def test_reduction_for_the_centre(size, factor):
    assert large.reduction_for_centre(224, *size) == large.reduction_for_centre(224, *size[::-1]) == factor


# --- the same pixels ----------------------------------------------------------------------------


def test_reduced_images_stay_upright_and_keep_their_colors():
    picture = photograph((204, 152))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "jpeg": saved(picture, "JPEG", quality=95),
        "progressive": saved(picture, "JPEG", quality=95, progressive=True),
        "turned": saved(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=turned),
        "cmyk": saved(picture.convert("CMYK"), "JPEG", quality=95),
        "several": saved(picture, "MPO", quality=95, save_all=True, append_images=[picture.rotate(180)]),
        "png": saved(picture, "PNG"),
        "palette": saved(picture.quantize(255), "PNG"),
        "alpha": saved(picture.convert("RGBA"), "PNG"),
    }
    right = np.asarray(picture.reduce(4)).astype(int)
    for kind, data in files.items():
        made = to_rgb(open_encoded(data), lambda width, height: 4)
        assert made.size == (51, 38), kind
        assert np.abs(np.asarray(made) - right).mean() < 4, kind


def write(root: Path) -> FolderSource:
    root.mkdir()
    picture = photograph()
    picture.save(root / "0.jpg", quality=92)
    picture.save(root / "1.png", compress_level=1)
    picture.resize((800, 600)).save(root / "2.jpg", quality=92)  # not large
    return FolderSource(root)


@pytest.mark.usefixtures("low_limit")
def test_views_are_those_of_the_whole_image(tmp_path, backend):
    source = write(tmp_path / "images")
    factor = large.reduction_for_crops(RECIPE, *SIZE)
    assert factor == 4
    loader = multicrop_loader(source, RECIPE, batch_size=3, shuffle=False, **on(backend), dtype=torch.uint8)
    views, _ = next(iter(loader))
    for index in range(3):
        image = source[index][0]
        scale = factor if index < 2 else 1
        drawn = sample_views(
            RECIPE, seed=0, epoch=0, index=index, width=image.width // scale, height=image.height // scale
        )
        at_full_size = sample_views(
            RECIPE, seed=0, epoch=0, index=index, width=image.width, height=image.height
        )
        for view, params, full, size in zip(views, drawn, at_full_size, RECIPE.view_sizes(), strict=True):
            window = {key: scale * getattr(params, key) for key in ("top", "left", "height", "width")}
            # The same crop, up to the rounding of its place and sides to pixels.
            assert all(abs(window[key] - getattr(full, key)) <= scale for key in window)
            right = apply_view(to_tensor(image), params._replace(**window), size, RECIPE)
            gap = (view[index].cpu().int() - right.int()).abs().float().mean()
            assert gap <= (2 if index < 2 or backend != "torchvision" else 0), (index, gap)


@pytest.mark.usefixtures("low_limit")
def test_evaluation_views_are_those_of_the_whole_image(tmp_path, backend, monkeypatch):
    source = write(tmp_path / "images")
    options = {"image_size": 64, "batch_size": 3, "mean": (0, 0, 0), "std": (1, 1, 1), **on(backend)}
    reduced = next(iter(eval_loader(source, **options)))[0]
    monkeypatch.setattr(large, "LARGE_IMAGE", 1 << 24)
    whole = next(iter(eval_loader(source, **options)))[0]
    gaps = (reduced - whole).abs().mean((1, 2, 3)) * 255
    assert gaps[:2].min() > 0  # it was reduced
    assert gaps[:2].max() <= 2
    assert gaps[2] == 0
