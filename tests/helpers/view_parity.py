"""Views by a backend against torchvision's tensor kernels: sources, fixed parameters, references."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from odd_files import saved
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lejepa_fast.data import MultiCropRecipe, draws
from lejepa_fast.data.backends.base import Loading
from lejepa_fast.data.backends.choose_backend import make_backend
from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.sources.base import EncodedSource
from lejepa_fast.data.views import TrainViews

OP_TOLERANCE, CROP_TOLERANCE = 2.0, 4.0  # levels of 255, mean absolute difference of a view
SIZE = 64
# Saturated photographs, where a wrong hue shows, and one of ordinary colors.
PHOTOGRAPHS = (280, 623, 42, 1162, 994, 616)


class MemorySource(EncodedSource):
    """Images held as PNG files, which every decoder reads alike."""

    def __init__(self, images: Sequence[Image.Image], repeats: int = 1) -> None:
        self.files = [saved(image, "PNG") for image in images] * repeats
        super().__init__(name="memory", classes=None, targets=range(len(self.files)))

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        return f"image {index}"

    def encoded(self, index: int) -> bytes:
        return self.files[index]


@dataclass(frozen=True)
class FixedViews(TrainViews):
    """The same parameters for every image: row v of `rows` is view v."""

    rows: np.ndarray

    def table(self, epoch, indices, sizes):
        return np.repeat(self.rows[None], len(indices), axis=0)


def rendered(engine: str, views: TrainViews, batch_size: int) -> list[Tensor]:
    """All views (N, 3, S, S) uint8 of the source, in its order, by one of `loader_backends.BACKENDS`."""
    count = len(views.source)
    name, device = ("dali", torch.device("cuda")) if engine == "gpu" else (engine, None)
    backend, _ = make_backend(name, views, Loading(batch_size, 2, device))
    keys = (BatchKey(0, tuple(range(i, i + batch_size))) for i in range(0, count, batch_size))
    batches = [[view.cpu() for view in raw.views] for raw in backend.batches(keys, BadImages(views.source))]
    return [torch.cat(made) for made in zip(*batches, strict=True)]


def reference(image: Image.Image, drawn: np.ndarray, size: int, recipe: MultiCropRecipe) -> Tensor:
    """The view of a row of `draws.view_table`, by torchvision's uint8 tensor kernels alone."""
    box = drawn[: draws.FLIP].astype(int).tolist()
    view = F.resized_crop(F.pil_to_tensor(image), *box, [size, size], antialias=True)
    if drawn[draws.FLIP]:
        view = F.horizontal_flip(view)
    for code, factor in zip(
        drawn[draws.CODES : draws.FACTORS], drawn[draws.FACTORS : draws.GRAY], strict=True
    ):
        if code:
            view = getattr(F, f"adjust_{draws.JITTER_OPS[int(code) - 1]}")(view, factor)
    if drawn[draws.GRAY]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if drawn[draws.SIGMA]:
        view = F.gaussian_blur(view, [recipe.blur_kernel] * 2, [drawn[draws.SIGMA]] * 2)
    return F.solarize(view, recipe.solarize_threshold) if drawn[draws.SOLARIZE] else view


def sample_views(
    recipe: MultiCropRecipe, index: int, size: tuple[int, int], *, seed: int = 0, epoch: int = 0
) -> np.ndarray:
    """What is drawn for all views of an image, globals first: (V, COLUMNS)."""
    return draws.view_table(recipe, seed=seed, epoch=epoch, indices=[index], sizes=[size])[0]


def changed(row: np.ndarray, *jitter: tuple[str, float], **columns: float) -> np.ndarray:
    """The row of `draws.view_table` with these color operations and these columns, such as flip=1."""
    made = row.copy()
    for step, (name, factor) in enumerate(jitter):
        made[draws.CODES + step], made[draws.FACTORS + step] = draws.JITTER_OPS.index(name) + 1, factor
    for name, value in columns.items():
        made[getattr(draws, name.upper())] = value
    return made


def distance(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference in levels of 255."""
    return (one.int() - other.int()).abs().float().mean().item()


PLAIN = changed(np.zeros(draws.COLUMNS), top=10, left=20, height=SIZE, width=SIZE)
# Each with a neighbor that is wrong enough to be caught.
OPERATIONS = {
    "plain": (PLAIN, changed(PLAIN, left=22)),
    "flip": (changed(PLAIN, flip=1), PLAIN),
    "grayscale": (changed(PLAIN, gray=1), PLAIN),
    "solarize": (changed(PLAIN, solarize=1), PLAIN),
    "blur 0.3": (changed(PLAIN, sigma=0.3), changed(PLAIN, sigma=1)),
    "blur 1": (changed(PLAIN, sigma=1), changed(PLAIN, sigma=0.3)),
    "blur 2": (changed(PLAIN, sigma=2), changed(PLAIN, sigma=0.7)),
}
FACTORS = {
    "brightness": [(0.6, 0.65), (1.4, 1.3)],
    "contrast": [(0.6, 0.7), (1.4, 1.3)],
    "saturation": [(0.5, 0.8), (1.5, 1.2)],
    "hue": [(0.1, 0.05), (-0.1, 0.1), (0.4, -0.4)],
}
OPERATIONS |= {
    f"{name} {right}": (changed(PLAIN, (name, right)), changed(PLAIN, (name, wrong)))
    for name, pairs in FACTORS.items()
    for right, wrong in pairs
}
ORDER = (("contrast", 1.4), ("hue", 0.1), ("saturation", 1.5), ("brightness", 1.4))
OPERATIONS["jitter"] = (changed(PLAIN, *ORDER), changed(PLAIN, *ORDER[::-1]))
OPERATIONS["jitter, reversed"] = OPERATIONS["jitter"][::-1]
# Windows as (top, left, height, width) of images of at least 96 x 96 px.
CROPS = {"shrunk": (0, 0, 96, 96), "shrunk, odd": (3, 1, 91, 83), "enlarged": (30, 40, 25, 21)}
CROPS |= {"wide": (11, 5, 30, 90), "tall": (2, 50, 93, 17)}
CROPS |= {"small": (50, 50, 9, 8), "corner": (64, 64, 32, 32)}


def fixed_views(engine: str, images: Sequence[Image.Image], rows: Sequence[np.ndarray]) -> list[Tensor]:
    """The engine's views (images, 3, SIZE, SIZE) for each of these rows of `draws.view_table`."""
    recipe = MultiCropRecipe(global_crops=len(rows), global_size=SIZE, local_crops=0)
    return rendered(engine, FixedViews(MemorySource(images), recipe, 0, np.stack(rows)), len(images))


CHAIN = MultiCropRecipe(
    global_size=56, local_crops=4, local_size=32, blur_kernel=5, solarize_threshold=100, hue=0.2
)
