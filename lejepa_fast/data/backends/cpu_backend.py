"""The CPU backend: threads decode with Pillow, crop with torch and change colors with Numba kernels.

All three release the interpreter's lock, so threads of one process use all cores and share their memory.
Draws and crops are those of the torchvision backend, bit for bit; colors differ by rounding.
"""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from lejepa_fast.data.backends.base import Loading, RawBatch
from lejepa_fast.data.backends.cpu_kernels import render_view
from lejepa_fast.data.backends.torchvision_backend import center_view
from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.draws import TOP, WIDTH
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.views import EvalViews, TrainViews

_IMAGES_PER_TASK = 4  # drawing the parameters of several images takes little longer than those of one


_Pending = tuple[RawBatch, list[Future[list[int]]]]
"""A batch in the making, and the rows for which an image was found, in parts."""


class CpuBackend:
    """Makes batches in `num_workers` threads of this process, at least one. See `base.Backend`."""

    name = "cpu"

    def __init__(self, views: TrainViews | EvalViews, loading: Loading) -> None:
        self._views, self._loading = views, loading
        self._pool = ThreadPoolExecutor(max(1, loading.num_workers), thread_name_prefix="lejepa-cpu")

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

    def close(self) -> None:
        """Nothing to do: there are no processes."""

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
            made = [bad.first_usable(self._views, key.epoch, key.indices[row], read) for row in rows]
            found = [(row, *image) for row, image in zip(rows, made, strict=True) if image is not None]
            if not found:
                return []
            kept, indices, images = zip(*found, strict=True)
            table = self._views.table(key.epoch, indices, [image.size for image in images])
            for row, index, image, drawn in zip(kept, indices, images, table.astype(np.float32), strict=True):
                self._render(image, drawn, [view[row] for view in arrays])
                targets[row] = self._views.source.target(index)
            return list(kept)

        parts = [
            range(count)[first : first + _IMAGES_PER_TASK] for first in range(0, count, _IMAGES_PER_TASK)
        ]
        return batch, [self._pool.submit(fill, rows) for rows in parts]

    def _render(self, image: Image.Image, drawn: np.ndarray, out: list[np.ndarray]) -> None:
        """Write all views of an image, each (C, S, S) uint8, to `out`. drawn: their rows of `view_table`."""
        if isinstance(self._views, EvalViews):
            out[0][:] = center_view(image, self._views.image_size).numpy()
            return
        pixels, recipe = np.asarray(image), self._views.recipe
        for parameters, view in zip(drawn, out, strict=True):
            crop = resized_crop(pixels, parameters, view.shape[-1])
            render_view(crop, parameters, recipe.blur_kernel, recipe.solarize_threshold, view)


def resized_crop(pixels: np.ndarray, parameters: np.ndarray, size: int) -> np.ndarray:
    """The window of `parameters`, a row of `draws.view_table`, of pixels (H, W, C) uint8: (size, size, C)."""
    top, left, height, width = map(int, parameters[TOP : WIDTH + 1])
    window = pixels[top : top + height, left : left + width].copy()
    # torch resizes uint8 fastest in channels-last order, by one thread. It takes a batch for one only if the
    # batch dimension comes before `permute`.
    tensor = torch.from_numpy(window)[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(tensor, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
