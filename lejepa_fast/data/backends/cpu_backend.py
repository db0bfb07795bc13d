"""The CPU backend: threads decode with Pillow, crop with torch and change colors with Numba kernels.

All three release the interpreter's lock, so threads of one process use all cores and share their memory.
Draws and crops are those of the torchvision backend, bit for bit; colors differ by rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from lejepa_fast.data.backends.base import Loading, RawBatch, another_pass
from lejepa_fast.data.backends.cpu_kernels import render_view
from lejepa_fast.data.backends.torchvision_backend import centre_view
from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.draws import COLUMN_TOP, COLUMN_WIDTH
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.views import EvalViews, TrainViews


class _Pending(NamedTuple):
    """A batch in the making. usable: for each row, whether an image was found for it."""

    batch: RawBatch
    usable: list[Future[bool]]


class CpuBackend:
    """Makes batches in `num_workers` threads of this process, at least one. See `base.Backend`."""

    name = "cpu"

    def __init__(self, views: TrainViews | EvalViews, loading: Loading) -> None:
        self._views, self._loading = views, loading
        self._pool = ThreadPoolExecutor(max(1, loading.num_workers), thread_name_prefix="lejepa-cpu")
        self._pass: object | None = None  # the one that began last

    def batches(self, keys: Iterable[BatchKey], bad: BadImages) -> Iterator[RawBatch]:
        keys, pending = iter(keys), deque[_Pending]()
        current = self._pass = object()

        def fill() -> None:
            while len(pending) < self._loading.prefetch and (key := next(keys, None)) is not None:
                pending.append(self._start(key, bad))

        try:
            fill()
            while pending:
                batch, usable = pending.popleft()
                kept = [row for row, found in enumerate(usable) if found.result()]
                fill()
                yield batch.rows(kept)
                if self._pass is not current:
                    raise another_pass()
        finally:
            for _, usable in pending:
                for future in usable:
                    future.cancel()

    def _start(self, key: BatchKey, bad: BadImages) -> _Pending:
        count = len(key.indices)
        views = [
            torch.empty((count, 3, size, size), dtype=torch.uint8, pin_memory=self._loading.on_gpu)
            for size in self._views.sizes
        ]
        batch = RawBatch(views, torch.empty(count, dtype=torch.int64))
        arrays, targets = [view.numpy() for view in views], batch.targets.numpy()

        def fill(row: int, index: int) -> bool:
            def make(index: int) -> bool:
                self._render(self._views.load(index), key.epoch, index, [view[row] for view in arrays])
                targets[row] = self._views.source.target(index)
                return True

            return bad.first_usable(index, partial(self._views.substitute, key.epoch), make) or False

        return _Pending(batch, [self._pool.submit(fill, *place) for place in enumerate(key.indices)])

    def _render(self, image: Image.Image, epoch: int, index: int, out: list[np.ndarray]) -> None:
        """Write all views of an image, each (3, S, S) uint8, to `out`."""
        if isinstance(self._views, EvalViews):
            out[0][:] = centre_view(image, self._views.image_size).numpy()
            return
        pixels = np.asarray(image)
        recipe = self._views.recipe
        (rows,) = self._views.table(epoch, [index], [image.size])
        for parameters, view in zip(rows.astype(np.float32), out, strict=True):
            crop = resized_crop(pixels, parameters, view.shape[-1])
            render_view(crop, parameters, recipe.blur_kernel, recipe.solarize_threshold, view)


def resized_crop(pixels: np.ndarray, parameters: np.ndarray, size: int) -> np.ndarray:
    """The window of `parameters`, a row of `draws.view_table`, of pixels (H, W, 3) uint8: (size, size, 3)."""
    top, left, height, width = map(int, parameters[COLUMN_TOP : COLUMN_WIDTH + 1])
    window = pixels[top : top + height, left : left + width].copy()
    # One image in channels-last order, for which torch has a vectorised uint8 kernel of one thread.
    tensor = torch.from_numpy(window).permute(2, 0, 1)[None]
    resized = functional.interpolate(tensor, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
