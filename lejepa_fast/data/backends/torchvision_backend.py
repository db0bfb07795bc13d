"""The torchvision backend: workers make batches of uint8 views, the caller's process normalises them.

Each image is decoded once and all its views are cut from the decoded pixels. Every pixel operation
is a function of `torchvision.transforms.v2.functional`; of its two implementations the faster one is
used per operation. On crops of 32-224 px its Pillow kernels do colour jitter faster than its tensor
kernels, while resizing, blur and solarize are faster on uint8 tensors. Both are what the authors' own
pipeline may run, as v2 transforms take either. Views stay uint8 until they have left the worker: a
quarter of the bytes to move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as F

from lejepa_fast.data.backends.base import ANOTHER_PASS, LISTED, Fault, FaultHandler, RawBatch
from lejepa_fast.data.backends.memory import give_memory_back
from lejepa_fast.data.backends.workers import init_function, is_death, starting, without_sigchld_handler
from lejepa_fast.data.draws import ViewParams, sample_views
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.sources.base import size_fault
from lejepa_fast.data.sources.decoding import UnreadableImageError
from lejepa_fast.data.views import LONGEST_RATIO, EvalPlan, TrainPlan
from lejepa_fast.errors import RunError, UsageError

JITTER = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


class _Failure(NamedTuple):
    """An error on its way from a worker: DataLoader would turn it into a page of traceback."""

    usage: bool
    message: str


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 tensor with the memory layout of the image (channels last), which resizes fastest."""
    # Not pil_to_tensor: it copies into channels-first order.
    height, width = image.height, image.width
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).permute(2, 0, 1)


def apply_view(image: Tensor, params: ViewParams, size: int, recipe: MultiCropRecipe) -> Tensor:
    """One view, (3, size, size) uint8, of a decoded image (3, H, W) uint8."""
    box = (params.top, params.left, params.height, params.width)
    view = F.resized_crop(image, *box, [size, size], antialias=True)
    if params.flip:
        view = F.horizontal_flip(view)
    if params.jitter or params.grayscale:
        view = to_tensor(_colour(view, params))
    return finish_view(view, params, recipe)


def finish_view(view: Tensor, params: ViewParams, recipe: MultiCropRecipe) -> Tensor:
    """What follows the colours: blur and solarize, of a view (3, size, size) uint8."""
    if params.blur_sigma is not None:
        kernel, sigma = recipe.blur_kernel, params.blur_sigma
        view = F.gaussian_blur(view, [kernel, kernel], [sigma, sigma])
    if params.solarize:
        view = F.solarize(view, recipe.solarize_threshold)
    return view


def _colour(view: Tensor, params: ViewParams) -> Image.Image:
    """Colour jitter and grayscale, through Pillow."""
    image = Image.fromarray(view.permute(1, 2, 0).numpy())
    for name, factor in params.jitter:
        image = JITTER[name](image, factor)
    return F.rgb_to_grayscale(image, num_output_channels=3) if params.grayscale else image


class _Batches(Dataset):
    """Maps a `BatchKey` to a finished batch, so that a worker returns few large tensors."""

    def __init__(self, plan: TrainPlan | EvalPlan) -> None:
        self.plan = plan
        self._epoch: int | None = None

    def __getitem__(self, key: BatchKey) -> RawBatch | _Failure:
        if key.epoch != self._epoch:  # of this worker, for which nothing else marks the end of an epoch
            self._epoch = key.epoch
            give_memory_back()
        try:
            with one_thread():
                return self.make(key)
        except UsageError as error:
            return _Failure(True, str(error))
        except RunError as error:
            return _Failure(False, str(error))

    def make(self, key: BatchKey) -> RawBatch:
        plan, count = self.plan, len(key.indices)
        # Allocated outside inference mode: the caller may use the tensors in autograd.
        views = [torch.empty((count, 3, size, size), dtype=torch.uint8) for size in plan.sizes]
        targets = torch.empty(count, dtype=torch.int64)
        faults = []
        for row, index in enumerate(key.indices):
            if index in key.bad:
                faults.append(Fault(row, index, LISTED))
                continue
            try:
                image = plan.source.load(index, plan.reduction)
                targets[row] = plan.source.target(index)
            except UnreadableImageError as error:
                faults.append(Fault(row, index, error.reason))
                continue
            fault = size_fault(*image.size, plan.smallest_image)
            if fault:
                faults.append(Fault(row, index, fault))
                continue
            with torch.inference_mode():  # small operations cost less without autograd
                self.fill([view[row] for view in views], image, key.epoch, index)
        return RawBatch(views, targets, key.epoch, tuple(faults))

    def fill(self, rows: list[Tensor], image: Image.Image, epoch: int, index: int) -> None:
        """Write the views (3, S, S) uint8 of one image to `rows`."""
        raise NotImplementedError


class TrainBatches(_Batches):
    plan: TrainPlan

    def fill(self, rows: list[Tensor], image: Image.Image, epoch: int, index: int) -> None:
        recipe = self.plan.recipe
        params = sample_views(
            recipe, seed=self.plan.seed, epoch=epoch, index=index, width=image.width, height=image.height
        )
        pixels = to_tensor(image)
        for row, size, param in zip(rows, self.plan.sizes, params, strict=True):
            row.copy_(apply_view(pixels, param, size, recipe))


class EvalBatches(_Batches):
    plan: EvalPlan

    def fill(self, rows: list[Tensor], image: Image.Image, epoch: int, index: int) -> None:
        size = self.plan.image_size
        pixels = F.resize(_without_far_ends(to_tensor(image)), [size], antialias=True)
        rows[0].copy_(F.center_crop(pixels, [size, size]))


def _without_far_ends(pixels: Tensor) -> Tensor:
    """The middle of a very long image (1 x 10,000 px): resized as a whole it would need gigabytes.

    What is kept exceeds the centre by more than the resizing filter reaches; images of up to 4:1 stay whole.
    """
    height, width = pixels.shape[-2:]
    longest = LONGEST_RATIO * min(height, width)
    if max(height, width) <= longest:
        return pixels
    return F.center_crop(pixels, [min(height, longest), min(width, longest)])


class _Feed(Sampler):
    """The keys of the next pass; replaced before each, while the workers live on."""

    def __init__(self) -> None:
        self.keys: Iterable[BatchKey] = ()

    def __iter__(self) -> Iterator[BatchKey]:
        return iter(self.keys)


class TorchvisionBackend:
    """Makes batches in `num_workers` processes (0: in this one). See `loader.Backend` for the contract."""

    name = "torchvision"

    def __init__(
        self,
        plan: TrainPlan | EvalPlan,
        *,
        num_workers: int,
        pin_memory: bool,
        start_method: str | None,
        prefetch: int = 2,
    ) -> None:
        self._dataset = TrainBatches(plan) if isinstance(plan, TrainPlan) else EvalBatches(plan)
        self._num_workers = num_workers
        self._pin_memory, self._start_method, self._prefetch = pin_memory, start_method, prefetch
        self._feed = _Feed()
        self._loader: DataLoader | None = None
        self._pass: object | None = None  # the one that has begun last

    def _make_loader(self) -> DataLoader:
        workers: dict[str, Any] = {}
        if self._num_workers:
            workers = {
                "persistent_workers": True,
                "prefetch_factor": self._prefetch,
                "worker_init_fn": init_function(self._start_method),
                "multiprocessing_context": self._start_method,
            }
        return DataLoader(
            self._dataset,
            batch_size=None,  # a key already is a whole batch
            sampler=self._feed,
            num_workers=self._num_workers,
            collate_fn=_unchanged,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # else every pass would draw from the global generator
            **workers,
        )

    def _start_pass(self) -> Iterator[RawBatch | _Failure]:
        with without_sigchld_handler():
            if self._loader is not None:
                return iter(self._loader)
            loader = self._make_loader()
            with starting(self._start_method) if self._num_workers else nullcontext():
                iterator = iter(loader)
            self._loader = loader
            return iterator

    def batches(self, keys: Iterable[BatchKey], faults: FaultHandler) -> Iterator[RawBatch]:
        """Batches in the order of `keys`. Raises the worker's own UsageError or RunError, in one line."""
        # Marked here: the workers live on from pass to pass, with what was known when they started.
        self._feed.keys = (
            replace(key, bad=tuple(index for index in key.indices if index in faults.known)) for key in keys
        )
        current = self._pass = object()
        try:
            iterator = self._start_pass()
            while (batch := next(iterator, None)) is not None:
                yield self._mended(_checked(batch), faults)
                if self._pass is not current:  # its batches, or its workers, are the other one's now
                    raise RunError(ANOTHER_PASS)
        except (RuntimeError, EOFError, ConnectionError) as error:
            if not self._num_workers or not is_death(error):
                raise
            self._loader = None  # the next pass starts new workers
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise RunError(
                f"a data-loading worker died ({reason}); if its own output above does not say why, "
                "memory or /dev/shm ran out: use fewer workers, or 0"
            ) from error

    def _mended(self, batch: RawBatch, faults: FaultHandler) -> RawBatch:
        """Bad rows replaced or, where nothing takes their place, left out. Made here: they are few."""
        omitted = []
        for fault in batch.faults:
            row, index, reason = fault.row, fault.index, fault.reason
            while True:
                substitute = faults.replace(index, reason)
                if substitute is None:
                    omitted.append(row)
                    break
                one = _checked(self._dataset[BatchKey(batch.epoch, (substitute,))])
                if not one.faults:
                    for view, made in zip(batch.views, one.views, strict=True):
                        view[row] = made[0]
                    batch.targets[row] = one.targets[0]
                    break
                index, reason = one.faults[0].index, one.faults[0].reason
        if not omitted:
            return batch
        kept = [row for row in range(len(batch.targets)) if row not in set(omitted)]
        return batch._replace(views=[view[kept] for view in batch.views], targets=batch.targets[kept])


def _checked(batch: RawBatch | _Failure) -> RawBatch:
    if isinstance(batch, _Failure):
        raise (UsageError if batch.usage else RunError)(batch.message)
    return batch


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread while making a batch, in a worker and without workers alike.

    A team of threads costs more than a crop of 10,000 pixels is worth, most of all on busy cores, and
    OpenMP teams do not survive a fork.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _unchanged(batch: Any) -> Any:
    return batch
