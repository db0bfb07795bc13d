"""What breaks loaders: a folder with damaged and odd files, and images that would take all memory."""

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
from odd_files import BAD, BOMBS, png_bomb, spoil
from PIL import Image
from torch import Tensor
from view_parity import sample_views

from lejepa_fast.data import MultiCropRecipe, multicrop_loader
from lejepa_fast.data.backends.threaded import to_tensor
from lejepa_fast.data.backends.torchvision_backend import apply_view
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
    return {i for key in EpochSchedule(len(source), batch_size, seed).keys(0, 0) for i in key.indices}


def test_an_epoch_over_damaged_and_odd_files(corpus, backend, tmp_path):
    source = corpus.source
    bad = {i for i in range(len(source)) if source.name_of(i) in BAD}
    odd = {i for i in range(len(source)) if source.name_of(i) in corpus.shown}
    assert (len(bad), len(source)) == (len(BAD), GOOD + len(bad) + len(odd))
    batch_size = 40
    seed = next(seed for seed in range(10_000) if bad | odd <= taken(source, batch_size, seed))
    file = tmp_path / "bad_images.txt"
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
        # Of JPEG what compression costs; else what rounding does in DALI, kernels and Pillow's blending.
        limit = 1 if name == "alpha.png" else 0
        if name.endswith(".jpg") or name.startswith("jpeg"):
            limit = 6
        elif backend != "torchvision":
            limit = 4
        for made, right in zip(seen[places[name]], views_of(picture, places[name], seed), strict=True):
            gap = (made.cpu().int() - right.int()).abs().float().mean()
            assert gap <= limit, name


def views_of(picture: Image.Image, index: int, seed: int) -> list[Tensor]:
    """The views of image `index` in epoch 0, if it shows this picture."""
    rows = sample_views(RECIPE, index, picture.size, seed=seed)
    drawn = zip(rows, RECIPE.view_sizes(), strict=True)
    return [apply_view(to_tensor(picture), row, size, RECIPE) for row, size in drawn]


# Largest resident memory in KiB after each folder, over all backends; images that each backend has seen, and
# how many it found bad. Ends after 180 s of work.
MEMORY = r"""
import json, resource, sys
sys.path[:0] = json.loads(sys.argv[1])
from loader_backends import peak_memory, without_gpu
from lejepa_fast.data import MultiCropRecipe, multicrop_loader
from lejepa_fast.data.sources import FolderSource

RECIPE = MultiCropRecipe(
    global_crops=1, global_size=24, local_crops=1, local_size=16, blur_kernel=3, min_image_size=1
)
resource.setrlimit(resource.RLIMIT_CPU, (180, 180))
for root in sys.argv[2:]:
    found = set()
    for backend in without_gpu():
        source = FolderSource(root)
        loader = multicrop_loader(source, RECIPE, batch_size=4, backend=backend, max_bad_fraction=0.3)
        seen = sum(len(views[0]) for views, _ in loader)
        found.add((seen, len(loader.bad_images)))
    ((seen, bad),) = found
    print(peak_memory(), seen, bad)
"""


SIDE = 4100  # px


@pytest.fixture(scope="module")
def large_images(tmp_path_factory) -> Path:
    """Folders of a few photographs, and in four of them what must not be decoded as a whole."""
    root = tmp_path_factory.mktemp("large")
    counts = {"few": 8, "sixteen": 7, "alpha": 7, "large": 6, "bombs": 3 * len(BOMBS)}
    for name, count in counts.items():  # with what is added, whole batches of 4: an epoch takes all
        write_photographs(root / name, count)
    picture = Image.open(root / "few" / "00000.jpg").convert("RGB")
    for name, (make, _) in BOMBS.items():
        (root / "bombs" / f"{name}.jpg").write_bytes(make(picture))
    picture.resize((8000, 6000)).save(root / "large" / "huge.jpg")
    (root / "large" / "bomb.png").write_bytes(png_bomb(picture))
    Image.new("I;16", (SIDE, SIDE), 9000).save(root / "sixteen" / "huge.png", compress_level=1)
    Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 99)).save(root / "alpha" / "huge.png", compress_level=1)
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_and_huge_images_take_little_memory(large_images):
    # By what may be needed: the peak never falls.
    folders = [str(large_images / name) for name in ("few", "sixteen", "alpha", "large", "bombs")]
    script = [sys.executable, "-c", MEMORY, json.dumps(sys.path), *folders]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    peaks, *seen = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert seen == [(8, 8, 8, 8, 4 * len(BOMBS)), (0, 0, 0, 1, len(BOMBS))]
    before, sixteen, alpha, large, bombs = peaks
    pixels = SIDE * SIDE / 1024
    # As Pillow holds them, they have 2 and 4 bytes a pixel.
    assert sixteen - before < 7 * pixels
    assert alpha - before < 9 * pixels
    assert large - before < 9 * pixels  # 48 megapixels, of 3 bytes each
    assert bombs - before < 200 << 10  # decoded, the WebP alone takes gigabytes
