"""The torchvision backend: the reference for all others, and the fallback. Worker processes make the batches.

Each image is decoded once and all its views are cut from the decoded pixels. Every pixel operation is a
function of `torchvision.transforms.v2.functional`. Of its two implementations the faster one is used for each
operation: on crops of 32-224 px the Pillow kernels are faster for color jitter, and the uint8 tensor kernels
for resizing, blur and solarize. v2 transforms accept both. Views leave the worker as uint8, a quarter of the
bytes of float32.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as F

from lejepa_fast.data import draws
from lejepa_fast.data.backends.base import Loading, RawBatch, give_memory_back
from lejepa_fast.data.backends.workers import is_death, start_worker, starting
from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.sources.decoding import UnreadableImageError
from lejepa_fast.data.views import LONGEST_RATIO, EvalViews, TrainViews, Views
from lejepa_fast.errors import RunError, UsageError


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) uint8 tensor in channels-last order, which resizes fastest."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def apply_view(image: Tensor, drawn: Sequence[float], size: int, recipe: MultiCropRecipe) -> Tensor:
    """One view (3, size, size) uint8 of a decoded image (3, H, W) uint8. drawn: a row of `view_table`."""
    box = [int(side) for side in drawn[draws.TOP : draws.WIDTH + 1]]
    view = F.resized_crop(image, *box, [size, size], antialias=True)
    if drawn[draws.FLIP]:
        view = F.horizontal_flip(view)
    return change_color(view, drawn, recipe)


def change_color(view: Tensor, drawn: Sequence[float], recipe: MultiCropRecipe) -> Tensor:
    """Color jitter and grayscale by the Pillow kernels, blur and solarize, of a view (3, S, S) uint8."""
    codes, factors = drawn[draws.CODES : draws.FACTORS], drawn[draws.FACTORS : draws.GRAY]
    if any(codes) or drawn[draws.GRAY]:
        image = Image.fromarray(view.permute(1, 2, 0).numpy())
        for code, factor in zip(codes, factors, strict=True):
            if code != draws.SKIP:
                image = getattr(F, f"adjust_{draws.JITTER_OPS[int(code) - 1]}")(image, factor)
        view = to_tensor(F.rgb_to_grayscale(image, num_output_channels=3) if drawn[draws.GRAY] else image)
    if drawn[draws.SIGMA]:
        view = F.gaussian_blur(view, [recipe.blur_kernel] * 2, [drawn[draws.SIGMA]] * 2)
    return F.solarize(view, recipe.solarize_threshold) if drawn[draws.SOLARIZE] else view


def center_view(image: Image.Image, size: int) -> Tensor:
    """The view of an evaluation: the short side resized to `size` px, the center (C, size, size) cut out.

    Of an image longer than 4:1 the middle alone is resized: as a whole, 1 x 10,000 px would need gigabytes.
    The resizing filter reaches no further.
    """
    pixels = to_tensor(image)
    longest = LONGEST_RATIO * min(image.size)
    if max(image.size) > longest:
        pixels = F.center_crop(pixels, [min(image.height, longest), min(image.width, longest)])
    return F.center_crop(F.resize(pixels, [size], antialias=True), [size, size])


_Fault = tuple[int, int, int, str, bool]
"""A bad image: (epoch, row of the batch, number of the image, reason, lasting)."""


class Batches(Dataset):
    """Maps a `BatchKey` to a batch and its faults, so that a worker returns few large tensors."""

    def __init__(self, views: TrainViews | EvalViews) -> None:
        self.views = views
        self._epoch: int | None = None

    def __getitem__(self, key: BatchKey) -> tuple[RawBatch, list[_Fault]] | Exception:
        if key.epoch != self._epoch:  # nothing else tells a worker that an epoch ended
            self._epoch = key.epoch
            give_memory_back()
        count = len(key.indices)
        views = [torch.empty((count, 3, size, size), dtype=torch.uint8) for size in self.views.sizes]
        batch = RawBatch(views, torch.empty(count, dtype=torch.int64))
        faults: list[_Fault] = []
        try:
            for row, index in enumerate(key.indices):
                try:
                    self.fill(batch, row, key.epoch, index)
                except UnreadableImageError as error:
                    faults.append((key.epoch, row, index, error.reason, error.lasting))
        except (UsageError, RunError) as error:  # raised here, DataLoader would add a page of traceback
            return (UsageError if isinstance(error, UsageError) else RunError)(str(error))
        return batch, faults

    def fill(self, batch: RawBatch, row: int, epoch: int, index: int) -> bool:
        """Write the views and the label of an image to a row of the batch; True."""
        # The batch itself is made outside inference mode, as the caller may use it in autograd.
        with one_thread(), torch.inference_mode():
            image = self.views.load(epoch, index)
            batch.targets[row] = self.views.source.target(index)
            if isinstance(self.views, EvalViews):
                batch.views[0][row] = center_view(image, self.views.image_size)
                return True
            pixels = to_tensor(image)
            (table,) = self.views.table(epoch, [index], [image.size]).tolist()
            for view, drawn in zip(batch.views, table, strict=True):
                view[row] = apply_view(pixels, drawn, view.shape[-1], self.views.recipe)
        return True


def _without_known(views: Views, key: BatchKey, bad: BadImages) -> BatchKey:
    """The key with what is known to be bad replaced, before a worker sees it."""
    found = [bad.first_usable(views, key.epoch, index, int) for index in key.indices]
    return BatchKey(key.epoch, tuple(index for index in found if index is not None))


class _Feed(Sampler):
    """The keys of the next pass, replaced before each: the workers live on."""

    def __init__(self) -> None:
        self.keys: Iterable[BatchKey] = ()

    def __iter__(self) -> Iterator[BatchKey]:
        return iter(self.keys)


class TorchvisionBackend:
    """Makes batches in `num_workers` processes, 0: in this one. See `base.Backend`.

    Each worker makes `prefetch` batches ahead of the trainer.
    """

    name = "torchvision"

    def __init__(self, views: TrainViews | EvalViews, loading: Loading) -> None:
        self._dataset, self._loading = Batches(views), loading
        self._feed = _Feed()
        self._loader: DataLoader | None = None

    def _start_pass(self) -> Iterator[tuple[RawBatch, list[_Fault]] | Exception]:
        """The batches of the keys in the feed. The first pass starts the workers."""
        if self._loader is not None:
            return iter(self._loader)
        workers = self._loading.num_workers
        loader = DataLoader(
            self._dataset,
            batch_size=None,  # a key already is a whole batch
            sampler=self._feed,
            num_workers=workers,
            pin_memory=self._loading.on_gpu,
            persistent_workers=workers > 0,
            prefetch_factor=self._loading.prefetch if workers else None,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else every pass would draw from the global generator
        )
        with starting() if workers else nullcontext():
            iterator = iter(loader)
        self._loader = loader
        return iterator

    def batches(self, keys: Iterable[BatchKey], bad: BadImages) -> Generator[RawBatch]:
        # The generator must not refer to this backend: such a circle would keep the workers of a dropped one.
        views = self._dataset.views
        self._feed.keys = (_without_known(views, key, bad) for key in keys)
        try:
            for made in self._start_pass():
                if isinstance(made, Exception):
                    raise made
                yield self._mended(*made, bad)
        except (RuntimeError, EOFError, ConnectionError) as error:
            if not self._loading.num_workers or not is_death(error):
                raise
            self._loader = None  # the next pass starts new workers
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise RunError(
                f"a data-loading worker died ({reason}); if its own output above does not say why, "
                "memory or /dev/shm ran out: use fewer workers, or 0"
            ) from error

    def close(self) -> None:
        self._loader = None

    def _mended(self, batch: RawBatch, faults: list[_Fault], bad: BadImages) -> RawBatch:
        """Replace bad rows, or leave them out. They are few, so this process makes their substitutes."""
        kept = set(range(len(batch.targets)))
        for epoch, row, index, reason, lasting in faults:
            bad.add(index, reason, lasting=lasting)
            fill = partial(self._dataset.fill, batch, row, epoch)
            if not bad.first_usable(self._dataset.views, epoch, index, fill):
                kept.remove(row)
        return batch.rows(sorted(kept))


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one intra-op thread, in a worker and without workers alike.

    A team of threads costs more than a crop of 10,000 pixels is worth, most of all on busy cores, and OpenMP
    teams do not survive a fork.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
