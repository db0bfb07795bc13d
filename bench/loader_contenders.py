"""The loaders that `loader_bench.py` compares, each as a function that makes one epoch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source

PLAIN, PLAIN_TENSORS = "torchvision v2", "torchvision v2, tensors"
OURS, FALLBACK, STABLE = "lejepa_fast", "lejepa_fast, torchvision backend", "stable-pretraining"
BYTES, PILLOW, DECODED = "bytes only", "decode only, Pillow", "decode only, DALI"


class Setting(NamedTuple):
    """What all contenders share."""

    folder: Path
    recipe: MultiCropRecipe
    batch_size: int
    workers: int
    device: torch.device
    """Where the batches end."""
    copies: int = 1
    """How often the fast ones go through the files in a pass, so that it is long enough."""

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


Pass = Callable[[], int]
"""Makes one epoch and returns its number of images."""


class Files(torch.utils.data.Dataset):
    """What `make` makes of each file, and the label 0."""

    def __init__(self, files: list[Path], make: Callable[[Image.Image], Any]):
        self.files, self.make = files, make

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(self.files[index]) as image:
            return self.make(image.convert("RGB")), 0


def stock(setting: Setting, dataset: torch.utils.data.Dataset, images: Callable[[Any], int]) -> Pass:
    """A stock `DataLoader` over `dataset`; `images` counts those of a batch."""
    loader = DataLoader(
        dataset,
        batch_size=setting.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=setting.workers,
        persistent_workers=True,
        pin_memory=setting.on_gpu,
        worker_init_fn=_one_thread,
    )
    return lambda: sum(images(batch) for batch in loader)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def multicrop_transform(
    recipe: MultiCropRecipe, *, tensors: bool, normalised: bool = True
) -> Callable[[Image.Image], list[Tensor]]:
    """All views of a Pillow image in torchvision's own random transforms, globals first.

    Args:
        recipe: what is done with which probability.
        tensors: work on uint8 tensors from the start and not on Pillow images, which v2 takes alike.
        normalised: views are float32 (3, size, size), normalised, or else uint8.
    """

    def view(size: int, scale: tuple[float, float]) -> v2.Compose:
        jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        blur = v2.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma)
        steps: list[torch.nn.Module] = [
            v2.RandomResizedCrop(size, scale, recipe.aspect_ratio, antialias=True),
            v2.RandomHorizontalFlip(recipe.flip_prob),
            v2.RandomApply([jitter], recipe.jitter_prob),
            v2.RandomGrayscale(recipe.grayscale_prob),
            v2.RandomApply([blur], recipe.blur_prob),
            v2.RandomSolarize(recipe.solarize_threshold, recipe.solarize_prob),
        ]
        steps.insert(0 if tensors else len(steps), v2.ToImage())
        if normalised:
            mean, std = list(recipe.mean), list(recipe.std)
            steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        return v2.Compose(steps)

    views = [view(recipe.global_size, recipe.global_scale)] * recipe.global_crops
    views += [view(recipe.local_size, recipe.local_scale)] * recipe.local_crops
    return lambda image: [make(image) for make in views]


def plain(setting: Setting, *, tensors: bool) -> Pass:
    """The recipe as users of torchvision write it: `tensors` as in `multicrop_transform`."""

    def images(batch: Any) -> int:
        for view in batch[0]:
            view.to(setting.device, non_blocking=True)
        return len(batch[1])

    return stock(setting, Files(setting.files, multicrop_transform(setting.recipe, tensors=tensors)), images)


def stable_pretraining(setting: Setting) -> Pass:
    """The recipe in stable-pretraining's own transforms, behind its data set."""
    # See `sigreg_variants.stable_pretraining_peer`.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    from stable_pretraining.data import transforms
    from stable_pretraining.data.datasets import FromTorchDataset

    recipe = setting.recipe
    jitter = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)

    def view(size: int, scale: tuple[float, float]) -> Any:
        return transforms.Compose(
            transforms.RandomResizedCrop(size, scale, recipe.aspect_ratio, antialias=True),
            transforms.RandomHorizontalFlip(recipe.flip_prob),
            transforms.ColorJitter(*jitter, p=recipe.jitter_prob),
            transforms.RandomGrayscale(recipe.grayscale_prob),
            transforms.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma, p=recipe.blur_prob),
            transforms.RandomSolarize(recipe.solarize_threshold, recipe.solarize_prob),
            transforms.ToImage(mean=list(recipe.mean), std=list(recipe.std)),
        )

    views = [view(recipe.global_size, recipe.global_scale)] * recipe.global_crops
    views += [view(recipe.local_size, recipe.local_scale)] * recipe.local_crops
    made = transforms.MultiViewTransform(views)
    dataset = FromTorchDataset(Files(setting.files, lambda image: image), ["image", "label"], made)
    return stock(setting, dataset, lambda batch: len(batch["views"][0]["label"]))


def ours(setting: Setting, backend: str) -> Pass:
    source = open_source(str(setting.folder), "train")
    loader = multicrop_loader(
        source.subset(list(range(len(source))) * setting.copies),
        setting.recipe,
        batch_size=setting.batch_size,
        num_workers=setting.workers,
        backend=backend,
        device=setting.device if setting.on_gpu else None,
    )
    return lambda: sum(len(views[0]) for views, _ in loader)


def bytes_only(setting: Setting) -> Pass:
    pool, files = ThreadPoolExecutor(setting.workers), setting.files
    return lambda: sum(1 for _ in pool.map(Path.read_bytes, files))


def pillow_only(setting: Setting) -> Pass:
    return stock(setting, Files(setting.files, lambda image: image.width), lambda batch: len(batch[1]))


def dali_only(setting: Setting) -> Pass:
    """DALI's reader and decoder alone."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(
        batch_size=setting.batch_size,
        num_threads=setting.workers,
        device_id=(setting.device.index or 0) if setting.on_gpu else None,
    )
    def decode() -> Any:
        encoded, _ = fn.readers.file(files=list(map(str, setting.files)))
        return fn.decoders.image(encoded, device="mixed" if setting.on_gpu else "cpu")

    pipe = decode()
    pipe.build()
    batches = len(setting.files) * setting.copies // setting.batch_size

    def run() -> int:
        for _ in range(batches):
            pipe.run()
        return batches * setting.batch_size

    return run


def contenders(setting: Setting) -> dict[str, Callable[[], Pass]]:
    """Name to maker. On a GPU the fast ones go through more images."""
    fast = setting._replace(copies=16) if setting.on_gpu else setting
    return {
        PLAIN: lambda: plain(setting, tensors=False),
        OURS: lambda: ours(fast, "auto"),
        FALLBACK: lambda: ours(setting, "torchvision"),
        DECODED: lambda: dali_only(fast),
        PLAIN_TENSORS: lambda: plain(setting, tensors=True),
        PILLOW: lambda: pillow_only(setting),
        BYTES: lambda: bytes_only(setting),
    }


def peers(setting: Setting) -> dict[str, Callable[[], Pass]]:
    """Ours against what other packages for LeJEPA load images with."""
    return {
        STABLE: lambda: stable_pretraining(setting),
        FALLBACK: lambda: ours(setting, "torchvision"),
        OURS: lambda: ours(setting, "auto"),
    }
