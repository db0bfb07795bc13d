"""What the backends "cpu" and "torchvision" share: threads of this process make the batches.

Decoders, torch and Numba kernels release the interpreter's lock, so that several cores work at once. NumPy
does not, nor do many small operators, as torchvision's colors are: more than about four threads do not help
there.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lejepa_fast.data.backends.base import Loading, RawBatch
from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.views import LONGEST_RATIO, EvalViews, TrainViews

_leaving = threading.Event()
# Set before the interpreter waits for the threads of all pools; public hooks of its exit run after that.
threading._register_atexit(_leaving.set)  # type: ignore[attr-defined]

_IMAGES_PER_TASK = 4  # drawing the parameters of several images takes little longer than those of one


_Pending = tuple[RawBatch, list[Future[list[int]]]]
"""A batch in the making, and the rows for which an image was found, in parts."""


class ThreadedBackend:
    """Makes batches in `num_workers` threads of this process. See `base.Backend`.

    A subclass has a `name` and makes the views of one image in `render`.
    """

    name: str
    fewest_threads = 1
    """With 0, `num_workers` may be 0: batches are then made by the thread that asks for them."""

    def __init__(self, views: TrainViews | EvalViews, loading: Loading) -> None:
        self._views, self._loading = views, loading
        self._threads = max(self.fewest_threads, loading.num_workers)
        self._pool: ThreadPoolExecutor | None = None
        self._process: int | None = None

    def render(
        self, image: Image.Image, drawn: np.ndarray, recipe: MultiCropRecipe, out: list[np.ndarray]
    ) -> None:
        """Write all training views of an image, each (C, S, S) uint8, to `out`.

        drawn: their rows of `draws.view_table`, (V, COLUMNS) float64.
        """
        raise NotImplementedError

    def batches(self, keys: Iterable[BatchKey], bad: BadImages) -> Generator[RawBatch]:
        keys, pending = iter(keys), deque[_Pending]()

        def fill() -> None:
            while len(pending) < self._loading.prefetch and (key := next(keys, None)) is not None:
                pending.append(self._start(key, bad))

        try:
            fill()
            while pending:
                batch, parts = pending[0]
                kept = [row for part in parts for row in part.result()]
                pending.popleft()  # after an error, those of its parts that wait are given up
                fill()
                yield batch.rows(kept)
        finally:
            for _, parts in pending:
                for part in parts:
                    part.cancel()

    def _start(self, key: BatchKey, bad: BadImages) -> _Pending:
        count, channels = len(key.indices), self._views.source.channels
        views = [
            torch.empty((count, channels, size, size), dtype=torch.uint8, pin_memory=self._loading.on_gpu)
            for size in self._views.sizes
        ]
        batch = RawBatch(views, torch.empty(count, dtype=torch.int64))
        arrays, targets = [view.numpy() for view in views], batch.targets.numpy()

        def read(index: int) -> tuple[int, Image.Image]:
            return index, self._views.load(key.epoch, index)

        def fill(rows: Sequence[int]) -> list[int]:
            if _leaving.is_set():
                return []
            made = [bad.first_usable(self._views, key.epoch, key.indices[row], read) for row in rows]
            found = [(row, *image) for row, image in zip(rows, made, strict=True) if image is not None]
            if not found:
                return []
            kept, indices, images = zip(*found, strict=True)
            table = self._views.table(key.epoch, indices, [image.size for image in images])
            for row, index, image, drawn in zip(kept, indices, images, table, strict=True):
                out = [view[row] for view in arrays]
                if isinstance(self._views, EvalViews):
                    out[0][:] = center_view(image, self._views.image_size).numpy()
                else:
                    self.render(image, drawn, self._views.recipe, out)
                targets[row] = self._views.source.target(index)
            return list(kept)

        parts = [
            range(count)[first : first + _IMAGES_PER_TASK] for first in range(0, count, _IMAGES_PER_TASK)
        ]
        submit = self._own_pool().submit if self._threads else _Later
        return batch, [submit(fill, rows) for rows in parts]

    def _own_pool(self) -> ThreadPoolExecutor:
        """The threads of this process: those of its parent do not follow into a forked one."""
        if self._pool is None or self._process != os.getpid():
            prefix = f"lejepa-{self.name}"
            self._pool = ThreadPoolExecutor(self._threads, prefix, initializer=_use_no_further_threads)
            self._process = os.getpid()
        return self._pool


class _Later(Future[list[int]]):
    """What `submit` returns without a pool: the work is done when its result is asked for."""

    def __init__(self, work: Callable[[Sequence[int]], list[int]], rows: Sequence[int]) -> None:
        super().__init__()
        self._work = partial(work, rows)

    def result(self, timeout: float | None = None) -> list[int]:
        with one_thread():
            return self._work()


def _use_no_further_threads() -> None:
    """Let torch's operators work in this thread alone, as `one_thread` says.

    `torch.set_num_threads` would also hold for every thread that starts later, wherever it comes from.
    """
    torch.get_num_threads()  # in each thread, the first call sets the number
    if set_number := getattr(ctypes.CDLL(torch._C.__file__), "omp_set_num_threads", None):
        set_number(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's operators use one thread.

    A team of threads costs more than a crop of 10,000 pixels is worth, most of all on busy cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) uint8 tensor in channels-last order, which resizes fastest."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


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
