"""The color kernels against torchvision's uint8 tensor kernels (see `kernel_helpers.py`).

Pictures are few and small, so that the interpreter can do it: odd sides, several programs for a picture,
every order of the kinds of operation.
"""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from kernel_helpers import DEVICE, sanitized
from loader_backends import skip_without
from PIL import Image
from view_parity import (
    CHAIN,
    FACTORS,
    OP_TOLERANCE,
    PHOTOGRAPHS,
    MemorySource,
    changed,
    distance,
    reference,
    rendered,
    sample_views,
)

from lejepa_fast.data import draws, open_source
from lejepa_fast.data.views import TrainViews
from lejepa_fast.kernels.color_jitter import change_colors

# Levels of 255 in the mean of a picture. A sum just below or above a whole number is truncated to another one
# here and there, and grows by what follows; an operation left out or in another place differs by more.
TOLERANCE = 0.1
RECIPE = replace(CHAIN, blur_kernel=7)
SIZE = 33  # odd, and two programs for a picture
PLAIN = changed(np.zeros(draws.COLUMNS), height=SIZE, width=SIZE)
ORDER = (("brightness", 1.4), ("contrast", 1.4), ("saturation", 1.5), ("hue", 0.1))
IN_ORDER, REVERSED = changed(PLAIN, *ORDER), changed(PLAIN, *ORDER[::-1])
EVERYTHING = changed(IN_ORDER, gray=1, sigma=1, solarize=1)
# Each with a neighbor that is wrong enough to be found.
PAIRS = [
    (changed(PLAIN, gray=1), PLAIN),
    (changed(PLAIN, solarize=1), PLAIN),
    (changed(PLAIN, sigma=0.3), changed(PLAIN, sigma=1)),
    (changed(PLAIN, sigma=1), changed(PLAIN, sigma=0.3)),
    (EVERYTHING, changed(EVERYTHING, solarize=0)),
    (IN_ORDER, REVERSED),
    (REVERSED, IN_ORDER),
]
PAIRS += [
    (changed(PLAIN, (name, right)), changed(PLAIN, (name, wrong)))
    for name, pairs in FACTORS.items()
    for right, wrong in pairs
]


def pictures(count, size):
    """(count, size, size, 3) uint8: colors of all hues with soft and hard edges."""
    y, x = np.mgrid[0:size, 0:size] / size
    noise = np.random.default_rng(0).random((count, size, size, 3))
    phases = np.arange(3) + np.arange(count)[:, None, None, None]
    waves = 0.5 + 0.5 * np.sin(7 * (x + 2 * y)[..., None] + phases)
    return torch.from_numpy((255.999 * (0.7 * waves + 0.3 * noise)).astype(np.uint8)).to(DEVICE)


def by_kernels(views, rows, recipe=RECIPE):
    """(3, size, size) for each picture and row of `draws.view_table`."""
    drawn = torch.tensor(np.stack(rows)[:, draws.CODES : draws.SOLARIZE + 1], dtype=torch.float32)
    blurred = any(row[draws.SIGMA] for row in rows)
    options = {"kernel_size": recipe.blur_kernel, "threshold": recipe.solarize_threshold}
    with sanitized():
        made = change_colors(views, drawn.to(DEVICE), blurred=blurred, **options)
    return made.permute(0, 3, 1, 2).cpu()


def by_torchvision(views, rows, recipe=RECIPE):
    images = map(Image.fromarray, views.cpu().numpy())
    pairs = zip(images, rows, strict=True)
    return [reference(image, row, image.width, recipe) for image, row in pairs]


def test_a_batch_of_all_operations_equals_torchvision():
    rows = [right for right, _ in PAIRS]
    rows += [changed(PLAIN, *order, sigma=0.7 * (i % 2)) for i, order in enumerate(permutations(ORDER))]
    views = pictures(len(rows), SIZE)
    made = by_kernels(views, rows)
    gaps = list(map(distance, made, by_torchvision(views, rows)))
    assert [(row, gap) for row, gap in zip(rows, gaps, strict=True) if gap > TOLERANCE] == []
    wrong = by_torchvision(views[: len(PAIRS)], [row for _, row in PAIRS])
    assert min(map(distance, made, wrong)) > 0.7


def test_nothing_drawn_changes_nothing():
    views = pictures(2, SIZE)
    rows = torch.zeros(2, draws.SOLARIZE + 1 - draws.CODES, device=DEVICE)
    made = change_colors(views, rows, kernel_size=7, threshold=100, blurred=False)
    assert torch.equal(made, views)
    assert made.data_ptr() != views.data_ptr()  # the caller uses its memory again


def test_the_largest_blur_of_a_small_crop():
    """Mirrored borders reach the other end."""
    plain, recipe = changed(PLAIN, height=8, width=8), replace(RECIPE, blur_kernel=15)
    rows = [changed(plain, sigma=4), plain, changed(plain, sigma=4)]
    views = pictures(3, 8)
    for made, right in zip(by_kernels(views, rows, recipe), by_torchvision(views, rows, recipe), strict=True):
        assert (made.int() - right.int()).abs().max() <= 1
        assert distance(made, right) < TOLERANCE


def test_from_files_through_the_backend(monkeypatch):
    """What the loader draws. Without a GPU DALI cuts on the CPU, and the interpreter changes colors."""
    backend = pytest.importorskip("lejepa_fast.data.backends.dali_backend", reason="DALI is not installed")
    engine = "gpu" if DEVICE == "cuda" else "dali"
    skip_without(engine)
    monkeypatch.setattr(backend, "change_colors", backend.by_kernels)
    source = open_source("trashnet96", "train")
    images = [source[index][0] for index in PHOTOGRAPHS[:2]]
    views_of = TrainViews(MemorySource(images), CHAIN, seed=3)
    views = rendered(engine, views_of, 2)
    for index, image in enumerate(images):
        drawn = sample_views(CHAIN, index, image.size, seed=3)
        for v, size in enumerate(CHAIN.view_sizes()):
            assert distance(views[v][index], reference(image, drawn[v], size, CHAIN)) < OP_TOLERANCE
            assert distance(views[v][index], reference(image, drawn[v - 1], size, CHAIN)) > OP_TOLERANCE
