"""The DALI backend: decodes and crops on a GPU, a few batches ahead of the trainer.

Threads read the files and check their headers. Files that all decoders read alike are passed on as stored;
Pillow decodes all others, and they are passed on as PPM. A DALI pipeline decodes each image once and cuts all
its views. The same pipeline runs on a CPU, slowly, for tests.

Nothing in the pipeline is random. The host draws every parameter (`draws.view_table`) and feeds the windows
with the encoded bytes, so all backends make the same choices, and a resumed run needs no state of DALI.

Colors are changed behind the pipeline: on a GPU by four Triton kernels for one view of the whole batch, on a
CPU image by image as by the backend "torchvision". In DALI, torchvision's color jitter takes about 200
operators for each view.

An error inside DALI breaks its pipeline. A new one is made then, and the batch runs again from pixels that
Pillow has decoded; what Pillow refuses is a bad image.
"""

import logging
import os
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor

from lejepa_fast.data import draws
from lejepa_fast.data.backends.base import Loading, RawBatch
from lejepa_fast.data.backends.threaded import one_thread
from lejepa_fast.data.backends.torchvision_backend import change_color
from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.sources.base import EncodedSource
from lejepa_fast.data.sources.decoding import decode, naming_file, plain_header
from lejepa_fast.data.views import EvalViews, TrainViews
from lejepa_fast.errors import RunError, UsageError

log = logging.getLogger("lejepa_fast.data")

_READ_AHEAD = 2  # batches of encoded bytes beyond those inside DALI
_FILES_PER_TASK = 8
_TRANSPOSED = 5  # the EXIF orientations from here on exchange rows and columns

# A forked process has none of a pipeline's threads: destroying the pipeline there would hang.
# So the child keeps references, taken before the fork, even to pipelines that are already garbage: the child
# may collect garbage before any hook of ours runs in it.
_pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
_held: list[Any] = []
_immortal: list[Any] = []
os.register_at_fork(
    before=lambda: _held.extend(_pipelines),
    after_in_parent=_held.clear,
    after_in_child=lambda: _immortal.extend(_held),
)


@dataclass(frozen=True)
class Encoded:
    """An image file that any decoder reads, as `plain_header` tells; the decoder must not turn the pixels."""

    index: int
    data: bytes
    width: int
    height: int
    orientation: int = 1


def read_encoded(views: TrainViews | EvalViews, epoch: int, index: int, *, careful: bool = False) -> Encoded:
    """Read image `index`. careful: Pillow decodes it in any case, which proves that it can be decoded.

    Raises `UnreadableImageError` when the image cannot be decoded or is too small.
    """
    source = views.source
    if careful or not isinstance(source, EncodedSource):
        return _as_ppm(index, views.load(epoch, index))

    def read() -> Encoded:
        data = source.encoded(index)
        header = plain_header(data)
        if header is not None and views.reduction(*header[:2]) == 1:
            return Encoded(index, data, *header)
        return _as_ppm(index, decode(data, 3, views.reduction, source.value_range))

    found = naming_file(source.describe(index), read)
    views.check_size(index, found.width, found.height)
    return found


def _as_ppm(index: int, image: Image.Image) -> Encoded:
    header = f"P6\n{image.width} {image.height}\n255\n".encode()
    return Encoded(index, header + image.tobytes(), image.width, image.height)


def window_table(table: np.ndarray, rows: Sequence[Encoded]) -> np.ndarray:
    """Start and end of each window of `table` in stored pixels, (B, V, 2, 2) float32 with (y, x) last.

    A mirrored view ends before it starts. Of a transposed image the view comes out transposed.
    """
    width, height = np.array([(row.width, row.height) for row in rows], dtype=np.float64).T[..., None]
    # How stored pixels become upright: rows and columns exchanged, then mirrored, then upside down.
    orientation = np.array([[row.orientation] for row in rows])
    transposed, mirrored = orientation >= _TRANSPOSED, np.isin(orientation, (2, 3, 6, 7))
    inverted = np.isin(orientation, (3, 4, 7, 8))
    top, left = table[..., draws.TOP], table[..., draws.LEFT]
    bottom, right = top + table[..., draws.HEIGHT], left + table[..., draws.WIDTH]
    top, bottom = (np.where(inverted, height - y, y) for y in (top, bottom))
    left, right = (np.where(mirrored, width - x, x) for x in (left, right))
    flip = table[..., draws.FLIP] > 0
    start = np.stack([top, np.where(flip, right, left)], axis=-1)
    end = np.stack([bottom, np.where(flip, left, right)], axis=-1)
    window = np.stack([start, end], axis=-2)
    return np.where(transposed[..., None, None], window[..., ::-1], window).astype(np.float32)


@pipeline_def
def view_pipeline(*, device: str, hw_decoder_load: float, sizes: list[int]) -> Any:
    """Encoded bytes and windows (see `window_table`) to V outputs (S, S, 3) uint8, of these sizes."""
    options: dict[str, Any] = {"hw_decoder_load": hw_decoder_load} if device == "gpu" else {}
    images = fn.decoders.image(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # as Pillow
        adjust_orientation=False,  # DALI takes other EXIF entries for valid than Pillow; `window_table` turns
        **options,
    )
    windows = fn.external_source(name="windows", dtype=types.FLOAT, ndim=3)
    return tuple(
        fn.resize(
            images,
            size=[size, size],
            roi_start=windows[v, 0],
            roi_end=windows[v, 1],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        for v, size in enumerate(sizes)
    )


def change_colors(views: Sequence[Tensor], table: np.ndarray, recipe: MultiCropRecipe) -> list[Tensor]:
    """V new views (B, S, S, 3) uint8 with the colors of `table`. A GPU works on the current stream."""
    if views[0].is_cuda:
        return by_kernels(views, table, recipe)
    made = [torch.empty_like(view) for view in views]
    with one_thread():
        for row, parameters in enumerate(table.tolist()):
            for v, view in enumerate(views):
                changed = change_color(view[row].permute(2, 0, 1), parameters[v], recipe)
                made[v][row] = changed.permute(1, 2, 0)
    return made


def by_kernels(views: Sequence[Tensor], table: np.ndarray, recipe: MultiCropRecipe) -> list[Tensor]:
    """`change_colors` on a GPU, or in Triton's interpreter."""
    from lejepa_fast.kernels import color_jitter

    blurred = np.any(table[..., draws.SIGMA] > 0, axis=0)
    drawn = table[..., draws.CODES : draws.SOLARIZE + 1]  # the columns that the kernels read
    rows = torch.from_numpy(drawn.astype(np.float32).transpose(1, 0, 2).copy())
    if views[0].is_cuda:  # a copy from pinned memory need not wait
        rows = rows.pin_memory().to(views[0].device, non_blocking=True)
    options = {"kernel_size": recipe.blur_kernel, "threshold": recipe.solarize_threshold}
    return [
        color_jitter.change_colors(view, rows[v], blurred=bool(blurred[v]), **options)
        for v, view in enumerate(views)
    ]


@dataclass
class _Batch:
    """A batch on its way through DALI."""

    key: BatchKey
    rows: list[Encoded]
    table: np.ndarray = field(default_factory=lambda: np.empty((0, 0, draws.COLUMNS)))
    """Parameters of its views."""
    refusal: Exception | None = None
    """Why DALI did not take it."""


class DaliBackend:
    """Makes batches with DALI, on a GPU or, slowly, on a CPU. See `base.Backend`.

    `num_workers` threads read files and as many work in DALI, at least 1 each.
    """

    name = "dali"

    def __init__(self, views: TrainViews | EvalViews, loading: Loading) -> None:
        self._views, self._loading, self._threads = views, loading, max(1, loading.num_workers)
        self._stream = torch.cuda.Stream(loading.device) if loading.on_gpu else None
        # More threads than cores do no harm: most of the time they wait for the disk.
        self._pool = ThreadPoolExecutor(max(2, min(self._threads, 16)), thread_name_prefix="lejepa-read")
        self._pipe: Any = None
        self._running: deque[_Batch] = deque()  # inside DALI

    def batches(self, keys: Iterable[BatchKey], bad: BadImages) -> Generator[RawBatch]:
        keys, reads = iter(keys), deque[tuple[BatchKey, list[Future[list[Encoded]]]]]()

        def fill() -> None:
            while len(reads) < self._loading.prefetch + _READ_AHEAD and (key := next(keys, None)) is not None:
                reads.append((key, self._read(key, bad)))
            while reads and len(self._running) < self._loading.prefetch:
                if self._running and not all(part.done() for part in reads[0][1]):
                    return
                key, parts = reads[0]
                self._running.append(_Batch(key, [row for part in parts for row in part.result()]))
                reads.popleft()  # after an error, those of its parts that wait are given up
                self._start(self._running[-1])

        try:
            fill()
            while self._running:
                made = self._collect_or_repeat(bad)
                fill()
                yield made
                fill()
        finally:
            for _, parts in reads:
                for part in parts:
                    part.cancel()
            self._drain()

    def _read(self, key: BatchKey, bad: BadImages, *, careful: bool = False) -> list[Future[list[Encoded]]]:
        """Start reading the images of a batch, with good ones in the places of bad ones."""
        read = partial(read_encoded, self._views, key.epoch, careful=careful)

        def read_part(indices: Sequence[int]) -> list[Encoded]:
            found = [bad.first_usable(self._views, key.epoch, index, read) for index in indices]
            return [row for row in found if row is not None]

        size = _FILES_PER_TASK
        parts = [key.indices[first : first + size] for first in range(0, len(key.indices), size)]
        return [self._pool.submit(read_part, part) for part in parts]

    def _start(self, batch: _Batch) -> None:
        """Send a batch on its way."""
        if not batch.rows:
            return
        batch.refusal = None
        sizes = [(row.width, row.height) for row in batch.rows]
        batch.table = self._views.table(batch.key.epoch, [row.index for row in batch.rows], sizes)
        if self._pipe is None:
            self._pipe = self._build()
        windows = window_table(batch.table, batch.rows)
        try:
            self._pipe.feed_input("encoded", [np.frombuffer(row.data, dtype=np.uint8) for row in batch.rows])
            self._pipe.feed_input("windows", windows)
            self._pipe.schedule_run()
        except Exception as error:  # most likely a batch before this one has broken the pipeline
            batch.refusal = error

    def _collect_or_repeat(self, bad: BadImages) -> RawBatch:
        """The next finished batch; where DALI fails, made again from what Pillow decodes."""
        batch = self._running.popleft()
        try:
            return self._collect(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # DALI raises several kinds
            log.warning("DALI failed (%s); decoding this batch with Pillow", dali_reason(error))
        self._pipe = None
        batch.rows = [row for part in self._read(batch.key, bad, careful=True) for row in part.result()]
        self._start(batch)
        try:
            made = self._collect(batch)
        except Exception as error:
            raise RunError(f"DALI fails on a batch that Pillow can read: {dali_reason(error)}") from error
        for later in self._running:  # they were lost with the pipeline
            self._start(later)
        return made

    def _collect(self, batch: _Batch) -> RawBatch:
        if batch.refusal is not None:  # what DALI hands out next is another batch's
            raise batch.refusal
        source = self._views.source
        targets = torch.tensor([source.target(row.index) for row in batch.rows], dtype=torch.int64)
        if not batch.rows:
            empty = [torch.empty((0, 3, size, size), dtype=torch.uint8) for size in self._views.sizes]
            return RawBatch(empty, targets)
        if self._stream is None:
            outputs = self._pipe.share_outputs()
            views = self._change([torch.from_numpy(np.asarray(out.as_tensor())) for out in outputs], batch)
            del outputs
            self._pipe.release_outputs()
            return RawBatch(views, targets)
        with torch.cuda.stream(self._stream):
            outputs = self._pipe.share_outputs(cuda_stream=self._stream)
            views = self._change([torch.from_dlpack(out.as_tensor()) for out in outputs], batch)
            event = self._stream.record_event()
            self._pipe.release_outputs()
        stream = torch.cuda.current_stream(self._stream.device)
        stream.wait_event(event)
        for view in views:
            view.record_stream(stream)
        return RawBatch(views, targets)

    def _change(self, views: list[Tensor], batch: _Batch) -> list[Tensor]:
        """Views with their colors changed, upright (B, 3, S, S). Always copies: DALI reuses its buffers."""
        recipe = self._views.recipe if isinstance(self._views, TrainViews) else None
        changed = change_colors(views, batch.table, recipe) if recipe else [view.clone() for view in views]
        turned = [row for row, image in enumerate(batch.rows) if image.orientation >= _TRANSPOSED]
        for pixels in changed if turned else []:
            pixels[turned] = pixels[turned].transpose(1, 2)
        return [pixels.permute(0, 3, 1, 2) for pixels in changed]

    def _drain(self) -> None:
        """Take out what is inside DALI, so that the pipeline can be used again."""
        try:
            for batch in self._running:
                if batch.rows and batch.refusal is None and self._pipe is not None:
                    self._pipe.share_outputs()
                    self._pipe.release_outputs()
        except Exception as error:
            log.debug("DALI failed on an abandoned batch: %s", error)
            self._pipe = None
        self._running.clear()

    def _build(self) -> Any:
        try:
            pipe = view_pipeline(
                batch_size=self._loading.batch_size,
                num_threads=self._threads,
                device_id=None if self._stream is None else self._stream.device.index,
                prefetch_queue_depth=1,  # the loader itself counts what is in flight
                device="cpu" if self._stream is None else "gpu",
                hw_decoder_load=self._loading.hw_decoder_load,
                sizes=self._views.sizes,
            )
            pipe.build()
        except Exception as error:
            raise UsageError(
                f"DALI cannot build its pipeline: {dali_reason(error)}; "
                "use another build of DALI, or backend='cpu' or 'torchvision'"
            ) from error
        _pipelines.add(pipe)
        return pipe


def dali_reason(error: Exception) -> str:
    """The line of a DALI error that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("[") or "rror" in line]
    skip = ("Critical error", "Error in ", "Stacktrace", "[frame")
    telling = [line for line in telling if not line.startswith(skip)]
    return (telling or lines or [type(error).__name__])[0]
