"""The color kernels against torchvision's uint8 tensor kernels (see `kernel_helpers.py`).

Pictures are few and small, so that the interpreter can do it: odd sides, several programs for a picture,
every order of the kinds of operation.
"""

from collections.abc import Iterator
from itertools import permutations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from kernel_helpers import DEVICE
from loader_backends import skip_without
from torchvision.transforms.v2 import functional as F
from view_parity import (
    CHAIN,
    FACTORS,
    OP_TOLERANCE,
    PHOTOGRAPHS,
    MemorySource,
    distance,
    reference,
    rendered,
    sample_views,
)

from lejepa_fast.data import open_source
from lejepa_fast.data.views import TrainViews
from lejepa_fast.kernels import color_jitter

# Levels of 255 in the mean of a picture. A sum just below or above a whole number is truncated to another one
# here and there, and grows by what follows; an operation left out or in another place differs by more.
TOLERANCE = 0.1
KERNEL_SIZE, THRESHOLD = 7, 100
OPERATIONS = ("brightness", "contrast", "saturation", "hue")  # code 1 to 4


class Drawn(NamedTuple):
    """What is done to a picture."""

    jitter: tuple[tuple[str, float], ...] = ()
    gray: bool = False
    sigma: float = 0.0
    solarize: bool = False

    def row(self) -> list[float]:
        codes = [OPERATIONS.index(name) + 1.0 for name, _ in self.jitter]
        factors = [factor for _, factor in self.jitter]
        rest = [0.0] * (4 - len(codes))
        return [*codes, *rest, *factors, *rest, float(self.gray), self.sigma, float(self.solarize)]


ORDER = (("brightness", 1.4), ("contrast", 1.4), ("saturation", 1.5), ("hue", 0.1))
# Each with a neighbor that is wrong enough to be found.
PAIRS = [
    (Drawn(gray=True), Drawn()),
    (Drawn(solarize=True), Drawn()),
    (Drawn(sigma=0.3), Drawn(sigma=1.0)),
    (Drawn(sigma=1.0), Drawn(sigma=0.3)),
    (Drawn(ORDER, True, 1.0, True), Drawn(ORDER, True, 1.0)),
    (Drawn(ORDER), Drawn(ORDER[::-1])),
    (Drawn(ORDER[::-1]), Drawn(ORDER)),
    *(
        (Drawn(((name, right),)), Drawn(((name, wrong),)))
        for name, pairs in FACTORS.items()
        for right, wrong in pairs
    ),
]


def pictures(count: int, size: int) -> torch.Tensor:
    """(count, size, size, 3) uint8: colors of all hues with soft and hard edges."""
    y, x = np.mgrid[0:size, 0:size] / size
    noise = np.random.default_rng(0).random((count, size, size, 3))
    waves = 0.5 + 0.5 * np.sin(
        7 * (x + 2 * y)[..., None] + np.arange(3) + np.arange(count)[:, None, None, None]
    )
    return torch.from_numpy((255.999 * (0.7 * waves + 0.3 * noise)).astype(np.uint8)).to(DEVICE)


def changed(views: torch.Tensor, drawn: list[Drawn], kernel_size: int = KERNEL_SIZE) -> list[torch.Tensor]:
    """By the kernels: (3, size, size) for each picture."""
    rows = torch.tensor([each.row() for each in drawn], device=views.device)
    made = color_jitter.change_colors(
        views, rows, kernel_size=kernel_size, threshold=THRESHOLD, blurred=any(each.sigma for each in drawn)
    )
    return list(made.permute(0, 3, 1, 2).cpu())


def expected(views: torch.Tensor, drawn: list[Drawn], kernel_size: int = KERNEL_SIZE) -> list[torch.Tensor]:
    """By torchvision."""
    found = []
    for picture, each in zip(views.cpu().permute(0, 3, 1, 2), drawn, strict=True):
        view = picture
        for name, factor in each.jitter:
            view = getattr(F, f"adjust_{name}")(view, factor)
        if each.gray:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        if each.sigma:
            view = F.gaussian_blur(view, [kernel_size] * 2, [each.sigma] * 2)
        found.append(F.solarize(view, THRESHOLD) if each.solarize else view)
    return found


def distances(made: list[torch.Tensor], right: list[torch.Tensor]) -> list[float]:
    """Mean absolute differences in levels of 255."""
    pairs = zip(made, right, strict=True)
    return [(one.cpu().int() - other.int()).abs().float().mean().item() for one, other in pairs]


@pytest.fixture
def guarded(monkeypatch) -> Iterator[None]:
    """Outputs lie in larger buffers, whose rest must stay as it was."""
    buffers = []

    def empty(like, shape, dtype):
        count, margin = torch.Size(shape).numel(), 4096
        buffers.append(torch.full((count + 2 * margin,), 7, dtype=dtype, device=like.device))
        return buffers[-1][margin:-margin].view(shape)

    monkeypatch.setattr(color_jitter, "empty", empty)
    yield
    assert buffers
    assert all((part == 7).all() for buffer in buffers for part in (buffer[:4096], buffer[-4096:]))


def test_a_batch_of_all_operations_equals_torchvision(guarded):
    drawn = [pair[0] for pair in PAIRS]
    drawn += [Drawn(order, sigma=0.7 * (i % 2)) for i, order in enumerate(permutations(ORDER))]
    views = pictures(len(drawn), 33)  # odd, and two programs for a picture
    made = changed(views, drawn)
    found = distances(made, expected(views, drawn))
    assert [(each, gap) for each, gap in zip(drawn, found, strict=True) if gap > TOLERANCE] == []
    wrong = expected(views[: len(PAIRS)], [pair[1] for pair in PAIRS])
    assert min(distances(made[: len(PAIRS)], wrong)) > 0.7


def test_nothing_drawn_changes_nothing():
    views = pictures(2, 33)
    rows = torch.zeros(2, color_jitter.COLUMNS, device=DEVICE)
    made = color_jitter.change_colors(views, rows, kernel_size=7, threshold=THRESHOLD, blurred=False)
    assert torch.equal(made, views)
    assert made.data_ptr() != views.data_ptr()  # the caller uses its memory again


def test_the_largest_blur_of_a_small_crop():
    """Mirrored borders reach the other end."""
    drawn = [Drawn(sigma=4.0), Drawn(), Drawn(sigma=4.0)]
    views = pictures(3, 8)
    made, right = changed(views, drawn, 15), expected(views, drawn, 15)
    assert all((one.int() - other.int()).abs().max() <= 1 for one, other in zip(made, right, strict=True))
    assert max(distances(made, right)) < TOLERANCE


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
        draws = sample_views(CHAIN, index, image.size, seed=3)
        for v, size in enumerate(CHAIN.view_sizes()):
            assert distance(views[v][index], reference(image, draws[v], size, CHAIN)) < OP_TOLERANCE
            assert distance(views[v][index], reference(image, draws[v - 1], size, CHAIN)) > OP_TOLERANCE
