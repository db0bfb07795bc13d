"""What breaks loaders: a folder with damaged and odd files, and images that would take all memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from loader_backends import NumberedFolder, on
from odd_files import BAD, png_bomb, spoil
from PIL import Image
from torch import Tensor
from view_parity import sample_views

from lejepa_fast.data import MultiCropRecipe, multicrop_loader
from lejepa_fast.data.backends.torchvision_backend import apply_view, to_tensor
from lejepa_fast.data.sampler import EpochSchedule

RECIPE = MultiCropRecipe(
    global_crops=1, global_size=24, local_crops=1, local_size=16, blur_kernel=3, min_image_size=1
)
GOOD = 500


def write_photographs(root: Path, count: int) -> None:
    root.mkdir()
    random = np.random.default_rng(0)
    colors = random.integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    for number, pixels in enumerate(colors):
        image = Image.fromarray(pixels).resize((40, 32), Image.Resampling.BILINEAR)
        image.save(root / f"{number:05d}.jpg", quality=90)


class Corpus(NamedTuple):
    """Good files, bad ones and odd ones. shown: what the odd ones show, upright, by name."""

    source: NumberedFolder
    shown: dict[str, Image.Image]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus") / "images"
    write_photographs(root, GOOD)
    picture = Image.open(root / "00000.jpg").convert("RGB")
    shown = spoil(root, picture)
    huge = picture.resize((8000, 6000))
    huge.save(root / "huge.jpg", quality=85)
    return Corpus(NumberedFolder(root), shown | {"huge.jpg": huge.reduce(8)})


def taken(source: NumberedFolder, batch_size: int, seed: int) -> set[int]:
    """The images of the first epoch, without those that are dropped at its end."""
    return {i for key in EpochSchedule(len(source), batch_size, seed).keys(0) for i in key.indices}


def test_an_epoch_over_damaged_and_odd_files(corpus, backend, tmp_path):
    source = corpus.source
    bad = {i for i in range(len(source)) if source.name_of(i) in BAD}
    odd = {i for i in range(len(source)) if source.name_of(i) in corpus.shown}
    assert (len(bad), len(source)) == (len(BAD), GOOD + len(bad) + len(odd))
    batch_size = 40
    seed = next(seed for seed in range(10_000) if bad | odd <= taken(source, batch_size, seed))
    file = tmp_path / "quarantine.txt"
    options = {**on(backend), "seed": seed, "bad_images": file, "dtype": torch.uint8}
    seen: dict[int, list[Tensor]] = {}
    for views, labels in multicrop_loader(source, RECIPE, batch_size=batch_size, num_workers=2, **options):
        assert all(len(view) == batch_size for view in views)
        seen |= {label: [view[row] for view in views] for row, label in enumerate(labels.tolist())}
    assert taken(source, batch_size, seed) - bad <= seen.keys() <= set(range(len(source))) - bad
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    assert sorted(int(index) for _, index, _ in lines) == sorted(bad)
    for path, index, reason in lines:
        assert path == source.describe(int(index))
        assert re.search(BAD[Path(path).name][1], reason)
    places = {source.name_of(index): index for index in odd}
    assert places.keys() == corpus.shown.keys()
    for name, picture in corpus.shown.items():
        # Of JPEG what compression costs; of DALI's decoders and kernels what rounding does.
        limit = (
            6 if name.endswith(".jpg") or name.startswith("jpeg") else 1 if backend == "torchvision" else 4
        )
        for made, right in zip(seen[places[name]], views_of(picture, places[name], seed), strict=True):
            gap = (made.cpu().int() - right.int()).abs().float().mean()
            assert gap <= limit, name


def views_of(picture: Image.Image, index: int, seed: int) -> list[Tensor]:
    """The views of image `index` in epoch 0, if it shows this picture."""
    draws = sample_views(RECIPE, seed=seed, epoch=0, index=index, width=picture.width, height=picture.height)
    pixels = to_tensor(picture)
    return [
        apply_view(pixels, params, size, RECIPE)
        for params, size in zip(draws, RECIPE.view_sizes(), strict=True)
    ]


# Largest resident memory in KiB before and after images that must not be decoded as a whole. Not from
# `getrusage`: its figure starts from that of the process that started this one.
MEMORY = r"""
import json, re, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from loader_backends import on
from lejepa_fast.data import MultiCropRecipe, multicrop_loader
from lejepa_fast.data.sources import FolderSource

RECIPE = MultiCropRecipe(
    global_crops=1, global_size=24, local_crops=1, local_size=16, blur_kernel=3, min_image_size=1
)
for root in sys.argv[3:]:
    loader = multicrop_loader(
        FolderSource(root), RECIPE, batch_size=4, **on(sys.argv[2]), max_bad_fraction=0.3
    )
    for epoch in range(3):
        seen = sum(len(views[0]) for views, _ in loader)
    status = Path("/proc/self/status").read_text()
    print(re.search(r"VmHWM:\s+(\d+)", status)[1], seen, len(loader.bad_images))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["torchvision", "cpu", "dali"], indirect=True)  # memory of the host
def test_bombs_and_huge_images_take_little_memory(backend, tmp_path):
    folders = ["few", "sixteen", "alpha", "large"]  # by what may be needed: the figure never falls
    for name in folders:
        write_photographs(tmp_path / name, 7)
    picture = Image.open(tmp_path / "few" / "00000.jpg").convert("RGB")
    picture.resize((8000, 6000)).save(tmp_path / "large" / "huge.jpg")
    (tmp_path / "large" / "bomb.png").write_bytes(png_bomb(picture))
    side = 4100
    Image.new("I;16", (side, side), 9000).save(tmp_path / "sixteen" / "huge.png", compress_level=1)
    Image.new("RGBA", (side, side), (1, 2, 3, 99)).save(tmp_path / "alpha" / "huge.png", compress_level=1)
    arguments = [json.dumps(sys.path), backend, *(str(tmp_path / name) for name in folders)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True
    )
    peaks, *seen = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert seen == [(4, 8, 8, 8), (0, 0, 0, 1)]
    before, sixteen, alpha, large = peaks
    pixels = side * side / 1024
    # As Pillow holds them, they have 2 and 4 bytes a pixel.
    assert sixteen - before < 7 * pixels
    assert alpha - before < 9 * pixels
    assert large - before < 9 * pixels  # 48 megapixels, of 3 bytes each
