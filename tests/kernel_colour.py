"""The colour kernels against torchvision's tensor kernels (see `kernel_helpers.py`).

The suite of `test_parity.py` holds them on a GPU to photographs, crops and distributions. Here they are
few and small, so that the interpreter can do it: odd sides, several programs for a picture, every order of
kinds of operation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_helpers import DEVICE
from view_parity import (
    CHAIN,
    OP_TOLERANCE,
    OPERATIONS,
    PHOTOGRAPHS,
    FixedViews,
    MemorySource,
    as_row,
    distance,
    reference,
    rendered,
)

from lejepa_fast.data import MultiCropRecipe, open_source
from lejepa_fast.data.backends import gpu_color as colour
from lejepa_fast.data.backends.choose_backend import dali_fault
from lejepa_fast.data.draws import COLUMNS, ViewParams, as_params, sample_views
from lejepa_fast.kernels import colour as kernels

# Levels of 255 in the mean of a picture. A sum just below or above a whole number is cut to another one here
# and there, and grows by what follows; an operation left out or in another place differs by more than 2.
TOLERANCE = 0.1


def pictures(count: int, size: int) -> torch.Tensor:
    """(count, size, size, 3) uint8: colours of all hues with soft and hard edges."""
    y, x = np.mgrid[0:size, 0:size] / size
    noise = np.random.default_rng(0).random((count, size, size, 3))
    waves = 0.5 + 0.5 * np.sin(
        7 * (x + 2 * y)[..., None] + np.arange(3) + np.arange(count)[:, None, None, None]
    )
    return torch.from_numpy((255.999 * (0.7 * waves + 0.3 * noise)).astype(np.uint8)).to(DEVICE)


def changed(views: torch.Tensor, rows: np.ndarray, recipe: MultiCropRecipe) -> list[torch.Tensor]:
    """By the kernels: (3, size, size) for each picture."""
    (made,) = colour._by_kernels([views], rows[:, None], recipe)
    return list(made.permute(0, 3, 1, 2).cpu())


def expected(views: torch.Tensor, rows: np.ndarray, recipe: MultiCropRecipe) -> list[torch.Tensor]:
    found = [as_params(row) for row in rows.tolist()]
    return [
        colour._changed(view.permute(2, 0, 1), params, recipe)
        for view, params in zip(views.cpu(), found, strict=True)
    ]


@pytest.fixture
def guarded(monkeypatch) -> Iterator[None]:
    """Outputs lie in larger buffers, whose rest must stay as it was."""
    buffers = []

    def empty(like, shape, dtype):
        count, margin = torch.Size(shape).numel(), 4096
        buffers.append(torch.full((count + 2 * margin,), 7, dtype=dtype, device=like.device))
        return buffers[-1][margin:-margin].view(shape)

    monkeypatch.setattr(kernels, "empty", empty)
    yield
    assert buffers
    assert all((part == 7).all() for buffer in buffers for part in (buffer[:4096], buffer[-4096:]))


def test_a_batch_of_all_operations_equals_torchvision(guarded):
    recipe = MultiCropRecipe(solarize_threshold=100, hue=0.2, jitter_prob=1.0, min_image_size=1)
    used = [pair[0] for pair in OPERATIONS.values()]
    used += sample_views(recipe, seed=0, epoch=0, index=0, width=40, height=40)
    rows = np.stack([as_row(params) for params in used])
    views = pictures(len(rows), 33)  # odd, and two programs for a picture
    made, right = changed(views, rows, recipe), expected(views, rows, recipe)
    found = {
        params: distance(*pair) for params, pair in zip(used, zip(made, right, strict=True), strict=True)
    }
    assert {params: value for params, value in found.items() if value > TOLERANCE} == {}
    # Neighbours that are a little wrong are told apart.
    wrong = [pair[1] for pair in OPERATIONS.values()]
    off = expected(views[: len(wrong)], np.stack([as_row(params) for params in wrong]), recipe)
    colours = [i for i, params in enumerate(wrong) if params._replace(top=0, left=0, flip=False) != used[i]]
    gaps = [
        distance(made[i], off[i]) for i in colours if as_row(wrong[i])[5:].tolist() != rows[i, 5:].tolist()
    ]
    assert len(gaps) > 12
    assert min(gaps) > 0.7


def test_nothing_drawn_changes_nothing():
    views = pictures(2, 33)
    (made,) = colour._by_kernels([views], np.zeros((2, 1, COLUMNS)), MultiCropRecipe())
    assert torch.equal(made, views)
    assert made.data_ptr() != views.data_ptr()  # DALI uses its memory again


def test_the_largest_blur_of_a_small_crop():
    """Mirrored borders reach the other end."""
    recipe = MultiCropRecipe(blur_kernel=15)
    plain = ViewParams(0, 0, 8, 8, False, (), False, 4.0, False)
    rows = np.stack([as_row(plain), as_row(plain._replace(blur_sigma=None)), as_row(plain)])
    views = pictures(3, 8)
    for made, right in zip(changed(views, rows, recipe), expected(views, rows, recipe), strict=True):
        assert (made.int() - right.int()).abs().max() <= 1
        assert distance(made, right) < TOLERANCE


def test_from_files_through_the_backend(monkeypatch):
    """On the CPU DALI cuts and the interpreter changes colours; on a GPU it is the pipeline of a GPU."""
    on_gpu = DEVICE == "cuda"
    if fault := dali_fault(on_gpu):
        pytest.skip(fault)
    monkeypatch.setattr("lejepa_fast.data.backends.dali_backend.change_colors", colour._by_kernels)
    source = open_source("trashnet96", "train")
    images = [source[index][0] for index in PHOTOGRAPHS[:2]]
    used = [OPERATIONS[name][0] for name in ("jitter", "blur 1", "plain")]
    recipe = MultiCropRecipe(global_crops=3, global_size=40, local_crops=0, blur_kernel=CHAIN.blur_kernel)
    fixed = FixedViews(MemorySource(images), recipe, 0, np.stack([as_row(p) for p in used]))
    views = rendered("gpu" if on_gpu else "dali", fixed, 2)
    for view, params in zip(views, used, strict=True):
        for made, image in zip(view, images, strict=True):
            assert distance(made, reference(image, params, 40, recipe)) < OP_TOLERANCE
