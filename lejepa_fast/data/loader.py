"""The two loaders: what a trainer sees, whichever backend makes the pixels."""

import logging
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from lejepa_fast.data.backends.base import Loading, RawBatch, give_memory_back
from lejepa_fast.data.backends.choose_backend import make_backend
from lejepa_fast.data.bad_images import DEFAULT_MAX_BAD_FRACTION, BadImages
from lejepa_fast.data.recipe import IMAGENET_MEAN, IMAGENET_STD, MultiCropRecipe
from lejepa_fast.data.sampler import BatchKey, EpochSchedule
from lejepa_fast.data.sources.base import ImageSource, check_sizes, names_digest
from lejepa_fast.data.validation import validated
from lejepa_fast.data.views import EvalViews, TrainViews
from lejepa_fast.errors import RunError, UsageError

log = logging.getLogger("lejepa_fast.data")

Count = Annotated[int, Ge(0)]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


class Normalize:
    """Moves a batch to its device and computes (x / 255 - mean) / std per channel in float32.

    `mean` and `std` are on the scale 0-1. The dtype torch.uint8 leaves the pixels as they are. compiled: on a
    CPU by a Numba kernel in one pass over memory, which torch needs three for.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        self._device, self._dtype = device or torch.device("cpu"), dtype
        self._compiled = compiled and self._device.type == "cpu" and dtype is not torch.uint8
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        # Once: on a GPU, making them from Python numbers waits for the GPU.
        scaled = [[255 * value for value in values] for values in (mean, std)]
        made = torch.tensor(scaled, dtype=torch.float32, device=self._device)
        self._mean, self._std = made.view(2, -1, 1, 1)

    def __call__(self, raw: RawBatch) -> tuple[list[Tensor], Tensor]:
        """Views (B, C, S, S) and targets (B,)."""
        return [self._view(view) for view in raw.views], raw.targets.to(self._device, non_blocking=True)

    def _view(self, pixels: Tensor) -> Tensor:
        if self._compiled:
            from lejepa_fast.data.backends.cpu_kernels import normalize

            out = np.empty(pixels.shape, np.float32)  # NumPy asks for large pages, which torch does not
            normalize(pixels.numpy(), self._mean.numpy().ravel(), self._std.numpy().ravel(), out)
            pixels = torch.from_numpy(out)
        else:
            pixels = pixels.to(self._device, non_blocking=True)
            if self._dtype is not torch.uint8:
                pixels = pixels.to(torch.float32).sub_(self._mean).div_(self._std)
        return pixels.to(self._dtype).contiguous(memory_format=self._layout)


@dataclass(frozen=True)
class _State:
    """A saved state. Only the epoch and the position in it must be there."""

    epoch: Count
    images_seen: Count
    seed: int | None = None
    num_images: Count | None = None
    names_sha256: str | None = None
    bad: tuple[tuple[Count, str], ...] = ()


class _Loader:
    """What both loaders share: passes over a backend's batches."""

    def __init__(
        self,
        views: TrainViews | EvalViews,
        loading: Loading,
        backend: str,
        bad: BadImages,
        mean: Sequence[float],
        std: Sequence[float],
        **made: Any,
    ) -> None:
        self._backend, self._reason = make_backend(backend, views, loading)
        self._bad = bad
        self._normalize = Normalize(mean, std, loading.device, **made, compiled=self.backend == "cpu")
        self._batches: Generator[RawBatch] | None = None

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    def close(self) -> None:
        """End the pass under way, with the batches that are made ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _pass(self, keys: Iterable[BatchKey]) -> Iterator[tuple[list[Tensor], Tensor]]:
        if self._batches is not None:
            self._batches.close()
        self._bad.begin_epoch()
        current = self._batches = self._backend.batches(keys, self._bad)
        try:
            for raw in current:
                yield self._normalize(raw)
                if self._batches is not current:
                    raise RunError(
                        "this pass has ended: another pass over the same loader has begun or the loader is "
                        "closed; make a loader for each pass"
                    )
        finally:
            current.close()


class MultiCropLoader(_Loader):
    """Iterable over multi-crop batches (views, targets) of one rank; each pass over it is one epoch.

    `views` is a list of V_g + V_l tensors (batch_size, C, S, S), globals first, normalized by mean and std of
    the recipe. `targets` is (batch_size,) int64, or None when the source has no labels.

    After a complete pass the loader stands at the next epoch, so a trainer that never calls `set_epoch` still
    gets new crops each time. A pass that is broken off starts over.

    The crops and colors of an image are a function of (seed, epoch, number of the image), whatever the
    backend, the number of workers and ranks and the batch size. The images of step s are the same for every
    `world_size` with the same `batch_size * world_size`. Global random generators are not touched.

    Args:
        source: the images, from `open_source`.
        recipe: number, sizes and augmentation of the views.
        batch_size: images per rank and step. The last incomplete batch of an epoch is dropped.
        seed: seed of order, crops and colors.
        rank: this rank, in 0 .. world_size - 1.
        world_size: number of ranks.
        num_workers: threads that read, decode and augment, at least 1. With "torchvision" also 0: the thread
            that iterates does it.
        backend: "dali", "cpu", "torchvision", or "auto": dali on a GPU where it is installed, else cpu where
            Numba is installed, else torchvision.
        device: where the batches go; None: they stay in the CPU's memory.
        dtype: float32, bfloat16 or float16 of normalized views; uint8 for raw pixels.
        channels_last: memory format of the views.
        shuffle: False takes the images in the order of the source.
        prefetch: batches that are made ahead of the trainer.
        hw_decoder_load: share of JPEGs for a GPU's hardware decoder (dali).
        bad_images: file that lists bad images, one for all ranks; see `BadImages`. A bad image is replaced by
            another one.
        max_bad_fraction: share of bad images that stops the run.

    Raises:
        TypeError: `source` has not been opened.
        UsageError: settings or data cannot work.
        RunError: while iterating, when too many images are bad.
    """

    def __init__(
        self,
        source: ImageSource,
        recipe: MultiCropRecipe,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        shuffle: bool = True,
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
        bad_images: str | os.PathLike[str] | None = None,
        max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION,
    ) -> None:
        _check_opened(source)
        recipe.validate()
        recipe.check_channels(source.channels)
        if not isinstance(seed, int | Integral):  # mypy takes int for no Integral
            raise UsageError(f"seed: expected a whole number, got {seed!r}")
        seed = int(seed)
        if dtype not in _DTYPES:
            raise UsageError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        loading = Loading(batch_size, num_workers, _usable(device), prefetch, hw_decoder_load)
        self._schedule = EpochSchedule(len(source), loading.batch_size, seed, rank, world_size, shuffle)
        bad = BadImages(source, bad_images, max_bad_fraction=max_bad_fraction)
        check_sizes(source, recipe.smallest_image, max_bad_fraction, set(dict(bad.items())))
        options: dict[str, Any] = {"dtype": dtype, "channels_last": channels_last}
        views = TrainViews(source, recipe, seed)
        super().__init__(views, loading, backend, bad, recipe.mean, recipe.std, **options)
        if rank == 0:
            bad.warn_of_other_numbers()
            choice = f"{self.backend} backend ({self._reason}), {num_workers} workers"
            log.info("multi-crop loader: %s, %s", choice, source.name)
        self._labeled = source.labeled
        self._names = names_digest({"images": source})
        self._epoch = self._batch = 0  # _batch: batches of this epoch that the trainer has taken
        self._resuming = False

    @property
    def epoch(self) -> int:
        """The epoch of the current or next pass."""
        return self._epoch

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, batches taken of it). After the last batch, also within the loop body: (next epoch, 0)."""
        return (self._epoch + 1, 0) if self._batch == len(self) else (self._epoch, self._batch)

    @property
    def bad_images(self) -> list[int]:
        """Numbers of the images that are known to be bad, ascending."""
        return [index for index, _ in self._bad.items()]

    def __len__(self) -> int:
        """Batches per epoch, the same on all ranks."""
        return len(self._schedule)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. A restored position within that same epoch is kept."""
        if epoch < 0:
            raise UsageError(f"epoch: expected 0 or more, got {epoch}")
        if not (self._resuming and epoch == self._epoch):
            self._epoch, self._batch, self._resuming = int(epoch), 0, False

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        if not self._resuming:
            self._batch = 0
        self._resuming = False
        epoch = self._epoch
        for views, targets in self._pass(self._schedule.keys(epoch, self._batch)):
            self._batch += 1
            yield views, targets if self._labeled else None
        self._epoch, self._batch = epoch + 1, 0
        give_memory_back()

    def state_dict(self) -> dict[str, Any]:
        """The position of the batches handed out, and which images are bad. Fit for JSON.

        It is valid inside the loop body and between epochs. The state of one rank serves all ranks.
        """
        epoch, batch = self.position
        return {
            "epoch": epoch,
            "images_seen": batch * self._schedule.global_batch,
            "seed": self._schedule.seed,
            "num_images": self._schedule.num_images,
            "names_sha256": self._names,
            "bad": [list(pair) for pair in self._bad.items(lasting=True)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken, on any number of ranks.

        With the same global batch (batch size x ranks) the rest of the epoch is as it would have been. With
        another one the epoch goes on at the next whole batch, which leaves out less than one batch. Of a
        state of other images (their number or names tell) only the epoch is taken over, with a warning.

        Args:
            state: what `state_dict` returned.

        Raises:
            UsageError: a field is wrong, or the state was taken in mid-epoch with another seed or other
                images: some images would be repeated and others left out. The loader stays as it was.
        """
        saved = validated(_State, state, "loader state: ", strict=True)
        own, epoch, seen = self._schedule, saved.epoch, saved.images_seen
        mine = {"seed": own.seed, "num_images": own.num_images, "names_sha256": self._names}
        differing = [key for key, value in mine.items() if getattr(saved, key) not in (None, value)]
        if seen and differing:
            key = differing[0]
            raise UsageError(
                f"the loader state was saved in mid-epoch with {key} {state[key]}, now it is {mine[key]}; "
                "resume with the same seed and images, or from the end of an epoch"
            )
        same_images = {"num_images", "names_sha256"}.isdisjoint(differing)
        numbers = [seen - 1, *(index for index, _ in saved.bad if same_images)]
        if max(numbers) >= own.num_images:
            raise UsageError(f"loader state: names image {max(numbers)} of only {own.num_images} images")
        if same_images:
            self._bad.learn(saved.bad, write=own.rank == 0)
        elif own.rank == 0:
            log.warning(
                "the loader state is of other images: only its epoch is used, not its list of bad images"
            )
        batch = -(-seen // own.global_batch)
        self._epoch, self._batch = (epoch + 1, 0) if batch >= len(self) else (epoch, batch)
        self._resuming = True


class EvalLoader(_Loader):
    """Iterable over every image once, in the order of the source, without randomness.

    It yields (images (B, C, image_size, image_size) float32 normalized, targets (B,) int64, -1 where
    unlabeled).

    Args:
        source: the images.
        image_size: each image's short side is resized to so many pixels (bilinear, antialiased; small images
            are enlarged), and the center is cut out.
        batch_size: images per batch. The last batch may be shorter, and so is one with bad images, which are
            left out.
        mean: subtracted from each channel (scale 0-1).
        std: divides each channel (scale 0-1).
        num_workers, backend, device, prefetch, hw_decoder_load, bad_images, max_bad_fraction: as for
            `MultiCropLoader`.

    Raises:
        TypeError: `source` has not been opened.
        UsageError: a setting cannot work.
        RunError: while iterating, when too many images are bad.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        image_size: int,
        batch_size: int,
        num_workers: int = 0,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        backend: str = "auto",
        device: torch.device | str | None = None,
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
        bad_images: str | os.PathLike[str] | None = None,
        max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION,
    ) -> None:
        _check_opened(source)
        if not isinstance(image_size, int | Integral) or image_size < 1:
            raise UsageError(f"image_size: expected a whole number of pixels, at least 1, got {image_size!r}")
        if not len(mean) == len(std) == source.channels:
            raise UsageError(f"mean, std: expected {source.channels} numbers each, got {mean!r} and {std!r}")
        loading = Loading(batch_size, num_workers, _usable(device), prefetch, hw_decoder_load)
        bad = BadImages(source, bad_images, max_bad_fraction=max_bad_fraction)
        super().__init__(EvalViews(source, image_size), loading, backend, bad, mean, std)
        self._num_images, self._batch_size = len(source), loading.batch_size

    def __len__(self) -> int:
        """Batches, the last one possibly shorter."""
        return -(-self._num_images // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        starts = range(0, self._num_images, self._batch_size)
        keys = (BatchKey(0, tuple(range(s, min(s + self._batch_size, self._num_images)))) for s in starts)
        for (images,), targets in self._pass(keys):
            if len(targets):
                yield images, targets


multicrop_loader = MultiCropLoader
eval_loader = EvalLoader


def _check_opened(source: object) -> None:
    if not isinstance(source, ImageSource):
        raise TypeError(
            f"source: expected what open_source(path) returns, got {type(source).__name__}; the path is a "
            "folder, a .tar or 'torchvision:NAME:/dir'; for other images subclass ImageSource"
        )


def _usable(device: torch.device | str | None) -> torch.device | None:
    """The device that batches go to; None: they stay in the CPU's memory."""
    if device is None:
        return None
    try:
        made = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device: expected such as 'cpu', 'cuda' or 'cuda:1', got {device!r}") from error
    if made.type == "cuda" and (made.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {str(device)!r}: there are {torch.cuda.device_count()} CUDA devices; "
            "use another one, or 'cpu'"
        )
    return made
