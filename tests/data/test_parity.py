"""The DALI backend against torchvision v2: each operation, the whole chain, and the distributions.

Engines: "compiled" is what a CPU runs, "graph" the operators with which a GPU cuts views, here on the CPU and
with torchvision's colours behind them, "gpu" the same operators on a GPU, with the colour kernels behind
them (also in `kernel_colour.py`). Each is driven through the backend itself, from encoded bytes to uint8
views, and held against torchvision's own tensor kernels. That what is drawn has torchvision's distribution,
the order of the jitter included, is in test_data_ops.py; here it is seen in the pixels.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from plain_torchvision import multicrop_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source
from lejepa_fast.data.backends import dali_backend
from lejepa_fast.data.backends.choose_backend import dali_fault
from lejepa_fast.data.backends.torchvision_backend import TorchvisionBackend
from lejepa_fast.data.bad_images import Omission, Quarantine
from lejepa_fast.data.draws import (
    COLUMN_CODES,
    COLUMN_FACTORS,
    COLUMN_GRAY,
    COLUMN_SIGMA,
    COLUMN_SOLARIZE,
    COLUMNS,
    JITTER_OPS,
    ViewParams,
    sample_views,
)
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.sources.base import EncodedSource
from lejepa_fast.data.sources.shards import ShardSource
from lejepa_fast.data.views import TrainPlan

OP_TOLERANCE, CROP_TOLERANCE = 2.0, 4.0  # levels of 255, mean absolute difference of a view
SIZE = 64
# Saturated photographs, where a wrong hue shows, and one of ordinary colours.
PHOTOGRAPHS = (280, 623, 42, 1162, 994, 616)
PLAIN = ViewParams(10, 20, SIZE, SIZE, False, (), False, None, False)


class MemorySource(EncodedSource):
    """Images held as PNG files, which every decoder reads alike."""

    def __init__(self, images: Sequence[Image.Image], repeats: int = 1) -> None:
        count = len(images) * repeats
        super().__init__(name="memory", kind="folder", classes=None, targets=range(count))
        self.files = []
        for image in images:
            file = io.BytesIO()
            image.save(file, "PNG")
            self.files.append(file.getvalue())
        self.count = count

    def __len__(self) -> int:
        return self.count

    def describe(self, index: int) -> str:
        return f"image {index}"

    def encoded(self, index: int) -> bytes:
        return self.files[index % len(self.files)]


@dataclass(frozen=True)
class FixedPlan(TrainPlan):
    """The same parameters for every image: row v of `rows` is view v."""

    rows: np.ndarray

    def table(self, epoch, indices, sizes):
        return np.repeat(self.rows[None], len(indices), axis=0)


class Engine(NamedTuple):
    """Settings of the DALI backend."""

    device: torch.device | None
    views: str


GRAPH = Engine(None, "operators")


@pytest.fixture(params=["compiled", "graph", "gpu"])
def engine(request) -> Engine:
    fault = dali_fault(request.param == "gpu")
    if fault:
        pytest.skip(fault)
    if request.param == "compiled":
        pytest.importorskip("numba", reason="the compiled CPU kernels need numba")
        return Engine(None, "numba")
    return Engine(torch.device("cuda"), "operators") if request.param == "gpu" else GRAPH


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """128 x 96 px and 96 x 128 px."""
    source = open_source("trashnet96", "train")
    return [source[index][0] for index in PHOTOGRAPHS]


def rendered(engine: Engine, plan: TrainPlan, batch_size: int) -> list[Tensor]:
    """All views (N, 3, S, S) uint8 of the plan's source, in its order."""
    count = len(plan.source)
    backend = dali_backend.DaliBackend(plan, batch_size=batch_size, threads=2, **engine._asdict())
    keys = (BatchKey(0, tuple(range(i, i + batch_size))) for i in range(0, count, batch_size))
    batches = [
        [view.cpu() for view in raw.views] for raw in backend.batches(keys, Omission(Quarantine(plan.source)))
    ]
    return [torch.cat(views) for views in zip(*batches, strict=True)]


def reference(image: Image.Image, params: ViewParams, size: int, recipe: MultiCropRecipe) -> Tensor:
    """The view by torchvision's uint8 tensor kernels alone."""
    box = (params.top, params.left, params.height, params.width)
    view = F.resized_crop(F.pil_to_tensor(image), *box, [size, size], antialias=True)
    if params.flip:
        view = F.horizontal_flip(view)
    for name, factor in params.jitter:
        view = getattr(F, f"adjust_{name}")(view, factor)
    if params.grayscale:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if params.blur_sigma is not None:
        view = F.gaussian_blur(view, [recipe.blur_kernel] * 2, [params.blur_sigma] * 2)
    return F.solarize(view, recipe.solarize_threshold) if params.solarize else view


def as_row(params: ViewParams) -> np.ndarray:
    """The parameters as a row of `draws.view_table`."""
    row = np.zeros(COLUMNS)
    row[:5] = params.top, params.left, params.height, params.width, params.flip
    for step, (name, factor) in enumerate(params.jitter):
        row[COLUMN_CODES + step], row[COLUMN_FACTORS + step] = JITTER_OPS.index(name) + 1, factor
    row[COLUMN_GRAY], row[COLUMN_SIGMA] = params.grayscale, params.blur_sigma or 0.0
    row[COLUMN_SOLARIZE] = params.solarize
    return row


def distance(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference in levels of 255."""
    return (one.int() - other.int()).abs().float().mean().item()


# --- fixed parameters ---------------------------------------------------------------------------

# Each with a neighbour that is wrong enough to be caught.
OPERATIONS = {
    "plain": (PLAIN, PLAIN._replace(left=22)),
    "flip": (PLAIN._replace(flip=True), PLAIN),
    "grayscale": (PLAIN._replace(grayscale=True), PLAIN),
    "solarize": (PLAIN._replace(solarize=True), PLAIN),
    "blur 0.3": (PLAIN._replace(blur_sigma=0.3), PLAIN._replace(blur_sigma=1.0)),
    "blur 1": (PLAIN._replace(blur_sigma=1.0), PLAIN._replace(blur_sigma=0.3)),
    "blur 2": (PLAIN._replace(blur_sigma=2.0), PLAIN._replace(blur_sigma=0.7)),
}
for name, right, wrong in (
    ("brightness", 0.6, 0.65),
    ("brightness", 1.4, 1.3),
    ("contrast", 0.6, 0.7),
    ("contrast", 1.4, 1.3),
    ("saturation", 0.5, 0.8),
    ("saturation", 1.5, 1.2),
    ("hue", 0.1, 0.05),
    ("hue", -0.1, 0.1),
    ("hue", 0.4, -0.4),
):
    pair = [PLAIN._replace(jitter=((name, factor),)) for factor in (right, wrong)]
    OPERATIONS[f"{name} {right}"] = (pair[0], pair[1])
ORDER = (("contrast", 1.4), ("hue", 0.1), ("saturation", 1.5), ("brightness", 1.4))
OPERATIONS["jitter"] = (PLAIN._replace(jitter=ORDER), PLAIN._replace(jitter=ORDER[::-1]))
OPERATIONS["jitter, reversed"] = (PLAIN._replace(jitter=ORDER[::-1]), PLAIN._replace(jitter=ORDER))
# Windows as (top, left, height, width) of images of at least 96 x 96 px.
CROPS = {
    "shrunk": (0, 0, 96, 96),
    "shrunk, odd": (3, 1, 91, 83),
    "enlarged": (30, 40, 25, 21),
    "wide": (11, 5, 30, 90),
    "tall": (2, 50, 93, 17),
    "small": (50, 50, 9, 8),
    "corner": (64, 64, 32, 32),
}


def fixed_views(engine: Engine, images: Sequence[Image.Image], used: Sequence[ViewParams]) -> list[Tensor]:
    """The engine's views (images, 3, SIZE, SIZE) for each of the parameters."""
    recipe = MultiCropRecipe(global_crops=len(used), global_size=SIZE, local_crops=0)
    plan = FixedPlan(MemorySource(images), recipe, 0, np.stack([as_row(params) for params in used]))
    return rendered(engine, plan, len(images))


def error(view: Tensor, images: Sequence[Image.Image], params: ViewParams) -> float:
    """Mean absolute difference from torchvision's view, of the worst image."""
    expected = [reference(image, params, SIZE, MultiCropRecipe()) for image in images]
    return max(distance(made, right) for made, right in zip(view, expected, strict=True))


def test_operations_and_crops_equal_torchvision(engine, photographs):
    crops = {name: PLAIN._replace(top=t, left=x, height=h, width=w) for name, (t, x, h, w) in CROPS.items()}
    crops |= {f"{name}, flipped": crop._replace(flip=True) for name, crop in crops.items()}
    moved = {
        name: crop._replace(top=max(0, crop.top - 4), height=crop.height + 4) for name, crop in crops.items()
    }
    right = {name: pair[0] for name, pair in OPERATIONS.items()} | crops
    wrong = {name: pair[1] for name, pair in OPERATIONS.items()} | moved
    limits = {name: CROP_TOLERANCE if name in crops else OP_TOLERANCE for name in right}
    views = dict(zip(right, fixed_views(engine, photographs, list(right.values())), strict=True))
    found = {name: error(view, photographs, right[name]) for name, view in views.items()}
    assert {name: value for name, value in found.items() if value > limits[name]} == {}
    # The comparison tells them from neighbours that are a little wrong.
    missed = {name: error(view, photographs, wrong[name]) for name, view in views.items()}
    assert {name: value for name, value in missed.items() if value <= limits[name]} == {}


def test_a_hue_of_another_meaning_is_caught(photographs, monkeypatch):
    """DALI's own hue operator turns colours about the gray axis, which is not torchvision's shift in HSV."""
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")

    @dali.pipeline_def(batch_size=len(photographs), num_threads=1, device_id=None)
    def turned():
        return dali.fn.hue(dali.fn.external_source(name="views"), hue=36.0)

    shift = PLAIN._replace(jitter=(("hue", 0.1),))
    (plain, right) = fixed_views(GRAPH, photographs, [PLAIN, shift])
    assert error(right, photographs, shift) <= OP_TOLERANCE
    pipe = turned()
    pipe.feed_input("views", plain.permute(0, 2, 3, 1).contiguous().numpy())
    (made,) = pipe.run()
    assert error(torch.from_numpy(made.as_array()).permute(0, 3, 1, 2), photographs, shift) > OP_TOLERANCE


# --- the whole chain ----------------------------------------------------------------------------

CHAIN = MultiCropRecipe(
    global_size=56, local_crops=4, local_size=32, blur_kernel=5, solarize_threshold=100, hue=0.2
)


def test_chain_equals_torchvision_image_by_image(engine, photographs):
    plan = TrainPlan(MemorySource(photographs, 4), CHAIN, seed=3)
    count = len(plan.source)
    ours = TorchvisionBackend(plan, num_workers=0, pin_memory=False, start_method=None)
    batches = ours.batches([BatchKey(0, tuple(range(count)))], Omission(Quarantine(plan.source)))
    through_pillow = next(iter(batches)).views
    views = rendered(engine, plan, count)
    to_tensors, to_pillow, to_another = [], [], []
    for index in range(count):
        image = photographs[index % len(photographs)]
        draws = sample_views(CHAIN, seed=3, epoch=0, index=index, width=image.width, height=image.height)
        for v, size in enumerate(CHAIN.view_sizes()):
            made = views[v][index]
            to_tensors.append(distance(made, reference(image, draws[v], size, CHAIN)))
            to_another.append(distance(made, reference(image, draws[v - 1], size, CHAIN)))
            to_pillow.append(distance(made, through_pillow[v][index]))
    assert max(to_tensors) < OP_TOLERANCE
    # Pillow's hue kernel keeps hue in 8 bits, which is the larger part of this.
    assert max(to_pillow) < CROP_TOLERANCE
    assert np.mean(to_pillow) < 1
    assert min(to_another) > CROP_TOLERANCE  # so these limits mean something


def test_the_operators_on_a_cpu_are_chosen_from_shards_to_a_resumed_epoch(tmp_path, photographs, caplog):
    """End to end: the same crops as the compiled code's, around a bad header and one that only DALI finds."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    pytest.importorskip("numba", reason="the compiled CPU kernels need numba")
    files = MemorySource(photographs).files
    corrupt = files[5][:200] + b"\xff" * 8 + files[5][208:]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(26):
            data = {3: b"no image", 11: corrupt}.get(number, files[number % len(files)])
            for suffix, content in (("png", data), ("cls", str(number).encode())):
                info = tarfile.TarInfo(f"{number:02d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = ShardSource([tmp_path / "a.tar"])

    def make(views: str):
        options = {"dali_views": views, "quarantine": tmp_path / f"{views}.txt", "max_bad_fraction": 0.5}
        return multicrop_loader(
            source, CHAIN, batch_size=4, num_workers=2, backend="dali", dtype=torch.uint8, **options
        )

    made = {views: list(make(views)) for views in ("operators", "numba")}
    assert "DALI failed" in caplog.text
    bad = {views: sorted((tmp_path / f"{views}.txt").read_text().splitlines()) for views in made}
    assert [line.split("\t")[1] for line in bad["numba"]] == ["3", "11"]
    assert bad["operators"] == bad["numba"]
    gaps, others = [], []
    for (ours, labels), (theirs, same_labels) in zip(made["operators"], made["numba"], strict=True):
        assert torch.equal(labels, same_labels)
        for one, other in zip(ours, theirs, strict=True):
            gaps += [distance(one[row], other[row]) for row in range(4)]
            others += [distance(one[row], other[row - 1]) for row in range(4)]
    assert 0 < max(gaps) < CROP_TOLERANCE < min(others)  # 0: it would be the same engine twice
    begun = make("operators")
    states = [begun.state_dict() for _, _ in zip(range(3), begun, strict=False)]
    resumed = make("operators")
    resumed.load_state_dict(states[-1])
    rest = list(resumed)
    assert len(rest) == 3
    for (views, labels), (expected, same_labels) in zip(rest, made["operators"][3:], strict=True):
        assert torch.equal(labels, same_labels)
        assert all(torch.equal(one, other) for one, other in zip(views, expected, strict=True))


def test_loader_normalises_as_torchvision(engine, photographs):
    def first(**options):
        common = {"batch_size": 4, "backend": "dali", "device": engine.device, "dali_views": engine.views}
        return next(iter(multicrop_loader(MemorySource(photographs), CHAIN, **common, **options)))

    (pixels, labels), (values, same_labels) = first(dtype=torch.uint8), first()
    assert torch.equal(labels, same_labels)
    normalised = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(CHAIN.mean, CHAIN.std)])
    for view, value in zip(pixels, values, strict=True):
        torch.testing.assert_close(value, normalised(view), rtol=1e-5, atol=1e-5)


def test_jpeg_files_decode_alike(engine):
    source = open_source("trashnet96", "train").subset(PHOTOGRAPHS)
    recipe = MultiCropRecipe(global_crops=1, global_size=SIZE, local_crops=0)
    plan = FixedPlan(source, recipe, 0, as_row(PLAIN)[None])
    (views,) = rendered(engine, plan, len(source))
    # The same library on a CPU; nvJPEG rounds in its own way.
    limit = 0 if engine.device is None else OP_TOLERANCE
    for view, (image, _) in zip(views, (source[i] for i in range(len(source))), strict=True):
        assert distance(view, reference(image, PLAIN, SIZE, recipe)) <= limit


# --- distributions, seen in the pixels ----------------------------------------------------------

DRAWS = 10_000


def binomial_bounds(n: int, p: float, confidence: float = 0.999) -> tuple[int, int]:
    """The smallest and the largest count that a fair source gives, the tails left out."""
    k = np.arange(n + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_choose = log_factorials[n] - log_factorials - log_factorials[::-1]
    below = np.cumsum(np.exp(log_choose + k * np.log(p) + (n - k) * np.log(1 - p)))
    tail = (1 - confidence) / 2
    return int(np.searchsorted(below, tail)), int(np.searchsorted(below, 1 - tail))


def test_binomial_bounds():
    assert binomial_bounds(10, 0.5, 0.95) == (2, 8)  # as in any table
    low, high = binomial_bounds(DRAWS, 0.2)
    assert (low, high) == pytest.approx((2000 - 3.29 * 40, 2000 + 3.29 * 40), abs=2)


def test_operation_frequencies(engine):
    """Which operations were applied is read off each view: the nearest of all combinations of them."""
    whole = {"global_crops": 8, "global_scale": (1.0, 1.0), "aspect_ratio": (1.0, 1.0), "local_crops": 0}
    recipe = MultiCropRecipe(
        **whole, global_size=8, jitter_prob=0.0, blur_sigma=(1.5, 1.5), blur_kernel=3, solarize_prob=0.3
    )
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    source = MemorySource([image], DRAWS // 8)
    (*views,) = rendered(engine, TrainPlan(source, recipe, seed=5), 625)
    combinations = list(product([False, True], repeat=4))
    known = torch.stack(
        [
            reference(image, ViewParams(0, 0, 8, 8, flip, (), gray, 1.5 if blur else None, solar), 8, recipe)
            for flip, gray, blur, solar in combinations
        ]
    )
    gaps = (torch.cat(views)[:, None].float() - known.float()).abs().mean(dim=(2, 3, 4))
    assert gaps.min(dim=1).values.max() < OP_TOLERANCE
    applied = np.array(combinations)[gaps.argmin(dim=1).numpy()]
    assert len(applied) == DRAWS
    for name, column in zip(("flip", "grayscale", "blur", "solarize"), applied.T, strict=True):
        low, high = binomial_bounds(DRAWS, getattr(recipe, f"{name}_prob"))
        assert low <= column.sum() <= high, name
    jittered = MultiCropRecipe(
        **whole, global_size=8, flip_prob=0, grayscale_prob=0, blur_prob=0, solarize_prob=0
    )
    (*views,) = rendered(engine, TrainPlan(source, jittered, seed=5), 625)
    changed = (torch.cat(views) != known[0]).flatten(1).any(dim=1).sum().item()
    low, high = binomial_bounds(DRAWS, jittered.jitter_prob)
    assert low <= changed <= high


def crop_histograms(views: Tensor, size: int) -> dict[str, np.ndarray]:
    """Counts of area, log aspect ratio and place, read off crops of `coordinates(size)`."""
    pixels = views.double().numpy()
    scale = size / 255.0
    # Without the first and the last row and column: there a filter may see beyond the window, or not.
    inner = (views.shape[-1] - 3) / views.shape[-1]
    width = (pixels[:, 0, :, -2] - pixels[:, 0, :, 1]).mean(axis=1) * scale / inner
    height = (pixels[:, 1, -2] - pixels[:, 1, 1]).mean(axis=1) * scale / inner
    middle = pixels[:, 0].mean(axis=(1, 2)) * scale
    features = {
        "area": (width * height / size**2, 0.05, 0.3),
        "aspect": (np.log(width / height), -0.3, 0.3),
        "place": ((middle - width / 2) / (size - width), 0.0, 1.0),
    }
    return {
        name: np.histogram(np.clip(value, low, high - 1e-9), np.linspace(low, high, 11))[0]
        for name, (value, low, high) in features.items()
    }


def coordinates(size: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[0:size, 0:size]
    pixels = np.stack([columns, rows, columns * 0], axis=-1) * 255.0 / (size - 1)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def chi_square(one: np.ndarray, other: np.ndarray) -> float:
    """Two-sample statistic of equally large histograms, 9 degrees of freedom with 10 bins."""
    return float(((one - other) ** 2 / np.maximum(one + other, 1)).sum())


CHI_SQUARE_9 = 27.88  # its 99.9 % point


def test_crop_histograms_equal_torchvisions(engine):
    size, count = 200, 3000
    image = coordinates(size)
    recipe = MultiCropRecipe(
        global_crops=6, global_size=16, global_scale=(0.05, 0.3), local_crops=0, flip_prob=0, jitter_prob=0,
        grayscale_prob=0, blur_prob=0, solarize_prob=0,
    )  # fmt: skip
    (*views,) = rendered(engine, TrainPlan(MemorySource([image], count // 6), recipe, seed=2), 50)
    ours = crop_histograms(torch.cat(views), size)

    def theirs(scale: tuple[float, float]) -> dict[str, np.ndarray]:
        crop = v2.RandomResizedCrop(16, scale, recipe.aspect_ratio, antialias=True)
        pixels = F.pil_to_tensor(image)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return crop_histograms(torch.stack([crop(pixels) for _ in range(count)]), size)

    same, other = theirs((0.05, 0.3)), theirs((0.08, 0.3))
    for name, counts in ours.items():
        assert counts.min() > 0, name
        assert chi_square(counts, same[name]) < CHI_SQUARE_9, name
    assert chi_square(ours["area"], other["area"]) > CHI_SQUARE_9


def channel_statistics(views: Sequence[Tensor]) -> np.ndarray:
    """Per image (first dimension of each view): mean and mean square of each channel over all its views."""
    scaled = [view.double() / 255 for view in views]
    moments = [torch.cat([view.mean(dim=(2, 3)), view.square().mean(dim=(2, 3))], dim=1) for view in scaled]
    return torch.stack(moments).mean(dim=0).numpy()


def worst_t_value(one: np.ndarray, other: np.ndarray) -> float:
    """Largest paired t value over the columns."""
    gap = one - other
    return float(np.abs(gap.mean(axis=0) / (gap.std(axis=0, ddof=1) / np.sqrt(len(gap)))).max())


STATISTICS = MultiCropRecipe(global_size=32, local_size=24, blur_kernel=3, global_crops=4, local_crops=4)


@pytest.fixture(scope="module")
def spread_source() -> EncodedSource:
    source = open_source("trashnet96", "train")
    return source.subset(range(0, len(source), len(source) // 240)[:240])


@pytest.fixture(scope="module")
def plain_statistics(spread_source) -> list[np.ndarray]:
    """Of torchvision's own random transforms with the same recipe, and with one that is a little wrong."""
    found = []
    for recipe in (STATISTICS, dataclasses.replace(STATISTICS, solarize_prob=0.3)):
        transform = multicrop_transform(recipe, tensors=False, normalised=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            views = [transform(spread_source[index][0]) for index in range(len(spread_source))]
        found.append(channel_statistics([torch.stack(view) for view in zip(*views, strict=True)]))
    return found


def test_channel_statistics_equal_plain_torchvisions(engine, spread_source, plain_statistics):
    """The same images: means and variances by channel."""
    ours = channel_statistics(rendered(engine, TrainPlan(spread_source, STATISTICS, seed=1), 48))
    same, other = plain_statistics
    assert worst_t_value(ours, same) < 3.9  # 6 columns, together 99.9 %
    assert worst_t_value(ours, other) > 3.9
