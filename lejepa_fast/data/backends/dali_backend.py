"""The DALI backend: one thread drives a DALI pipeline a few batches ahead of the trainer.

Files are read and their headers checked in Python threads (`reading`), so which images make up a batch, what
is quarantined and where a run resumes is the same as with torchvision. DALI decodes. On a GPU it also cuts
the views (`dali_graph`), and Triton kernels change their colours (`colour`); on the CPU compiled kernels make
them (`cpu_kernels`), because DALI's own CPU operators are slower, also than torchvision's (docs/loader.md has
the figures). Without Numba, or when asked for (`views`), the graph runs on the CPU, too.

A failure inside DALI ends a pipeline for good. Should one happen in spite of the checks, the pipeline is made
anew and the batch runs again from pixels that Pillow has decoded; what Pillow refuses is quarantined.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lejepa_fast.data.backends.base import ANOTHER_PASS, FaultHandler, RawBatch
from lejepa_fast.data.backends.choose_backend import numba_fault
from lejepa_fast.data.backends.gpu_color import change_colours
from lejepa_fast.data.backends.reading import TURNS, Bad, Encoded, PendingRead, Reader
from lejepa_fast.data.draws import COLUMNS
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.views import EvalPlan, TrainPlan
from lejepa_fast.errors import RunError, UsageError

log = logging.getLogger("lejepa_fast.data")

_IN_FLIGHT = 2  # batches inside DALI: one decodes while the views of the one before are made
_READ_AHEAD = 2  # batches of encoded bytes beyond those
_PATIENCE = 0.1  # seconds between two looks at whether somebody still wants the batches


# A forked process has none of a pipeline's threads: destroying its copy there would wait for them for ever.
# So references are held from before the fork on, even to pipelines that are already garbage: a collection may
# run in the child before any hook of ours does.
_pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
_held: list[Any] = []
_immortal: list[Any] = []
os.register_at_fork(
    before=lambda: _held.extend(_pipelines),
    after_in_parent=_held.clear,
    after_in_child=lambda: _immortal.extend(_held),
)


@dataclass
class _Batch:
    """A batch on its way through DALI.

    position: substitutes used up before it; refusal: why DALI did not take it.
    """

    key: BatchKey
    images: list[Encoded | Bad]
    position: int
    rows: list[Encoded] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.empty((0, 0, COLUMNS)))
    refusal: Exception | None = None


class DaliBackend:
    """Makes batches with DALI on `threads` threads. See `backend.Backend` for the contract.

    device: a CUDA device decodes and augments there; else everything happens on the CPU. prefetch: finished
    batches that wait for the trainer. hw_decoder_load: share of JPEGs for the GPU's hardware decoder. views:
    what makes them, "operators" of DALI's or compiled code ("numba", on the CPU only); "auto": as above.
    Raises `UsageError` for "numba" where that cannot be.
    """

    name = "dali"

    def __init__(
        self,
        plan: TrainPlan | EvalPlan,
        *,
        batch_size: int,
        threads: int,
        device: torch.device | None,
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
        views: str = "auto",
    ) -> None:
        self._plan, self._batch_size, self._prefetch = plan, batch_size, prefetch
        self._threads = max(1, threads)
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._hw_decoder_load = hw_decoder_load
        self._compiled = _compiled(views, on_gpu=self._gpu is not None)
        self._reader = Reader(plan.source, plan.smallest_image, self._threads, plan.reduction)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="lejepa-views")
        self._stream = torch.cuda.Stream(self._gpu) if self._gpu is not None else None
        self._pipe: Any = None
        self._pass: _Pass | None = None

    @property
    def views(self) -> str:
        """What makes the views: "numba" or "operators"."""
        return "numba" if self._compiled else "operators"

    def batches(self, keys: Iterable[BatchKey], faults: FaultHandler) -> Iterator[RawBatch]:
        """Batches in the order of `keys`; a pass that was begun before ends."""
        if self._pass is not None:
            self._pass.stop()
        current = self._pass = _Pass(self, keys, faults, self._prefetch)
        try:
            yield from current
        finally:
            current.stop()

    # ---- in the driving thread -------------------------------------------------------------------

    def produce(
        self, keys: Iterator[BatchKey], faults: FaultHandler, wanted: _Pass
    ) -> Generator[Any, None, None]:
        """All batches with the CUDA events that say when they are ready (None on the CPU)."""
        reads: deque[tuple[BatchKey, PendingRead]] = deque()
        running: deque[_Batch] = deque()
        try:
            while not wanted.stopped():
                while len(reads) < _READ_AHEAD and (key := next(keys, None)) is not None:
                    reads.append((key, self._reader.read(key.indices, faults.known)))
                if reads and len(running) < _IN_FLIGHT:
                    key, pending = reads.popleft()
                    batch = _Batch(key, pending.result(), faults.position)
                    self._start(batch, faults)
                    running.append(batch)
                elif running:
                    yield self._finish(running, faults)
                else:
                    return
        finally:
            for _, pending in reads:
                pending.cancel()
            self._drain(running)

    def _start(self, batch: _Batch, faults: FaultHandler, *, careful: bool = False) -> None:
        """Put good images in the places of bad ones and send the batch on its way."""
        batch.position, batch.rows, batch.refusal = faults.position, [], None
        for found in batch.images:
            image: Encoded | Bad = found
            while isinstance(image, Bad):
                substitute = faults.replace(image.index, image.reason)
                if substitute is None:
                    break
                image = self._reader.one(substitute, careful=careful)
            if isinstance(image, Encoded):
                batch.rows.append(image)
        if not batch.rows:
            return
        rows = batch.rows
        batch.table = self._plan.table(
            batch.key.epoch, [row.index for row in rows], [(row.width, row.height) for row in rows]
        )
        if self._pipe is None:
            self._pipe = self._build()
        try:
            self._feed(batch)
        except Exception as error:  # most likely an earlier batch has broken the pipeline: see `_finish`
            batch.refusal = error

    def _feed(self, batch: _Batch) -> None:
        pipe = self._pipe
        pipe.feed_input("encoded", [np.frombuffer(row.data, dtype=np.uint8) for row in batch.rows])
        if not self._compiled:
            from lejepa_fast.data.backends.dali_graph import window_table

            sizes = [(row.width, row.height) for row in batch.rows]
            turns = [TURNS[row.orientation] for row in batch.rows]
            pipe.feed_input("windows", window_table(batch.table, sizes, turns))
        pipe.schedule_run()

    def _finish(self, running: deque[_Batch], faults: FaultHandler) -> Any:
        batch = running.popleft()
        try:
            return self._collect(batch)
        except Exception as error:  # DALI raises several kinds
            if "cannot schedule new futures" in str(error):  # the program ends, and with it our own threads
                raise
            reason = dali_reason(error)
        log.warning("DALI failed (%s); decoding this batch with Pillow", reason)
        self._pipe = None
        faults.position = batch.position
        batch.images = list(
            self._pool.map(
                lambda image: self._reader.one(image.index, faults.known, careful=True), batch.images
            )
        )
        self._start(batch, faults, careful=True)
        try:
            made = self._collect(batch)
        except Exception as error:
            raise RunError(f"DALI fails on a batch that Pillow can read: {dali_reason(error)}") from error
        for later in running:  # they were lost with the pipeline, and substitutes may have changed
            self._start(later, faults)
        return made

    def _drain(self, running: deque[_Batch]) -> None:
        """Let what is in flight come out, so that the pipeline can be used again."""
        try:
            for batch in running:
                if batch.rows and batch.refusal is None and self._pipe is not None:
                    self._pipe.share_outputs()
                    self._pipe.release_outputs()
        except Exception as error:
            log.debug("DALI failed on an abandoned batch: %s", error)
            self._pipe = None

    def _collect(self, batch: _Batch) -> tuple[RawBatch, Any]:
        if batch.refusal is not None:  # what DALI hands out next is another batch's
            raise batch.refusal
        count = len(batch.rows)
        targets = torch.tensor([self._plan.source.target(row.index) for row in batch.rows], dtype=torch.int64)
        event = None
        if not count:
            views = [torch.empty((0, 3, size, size), dtype=torch.uint8) for size in self._plan.sizes]
        elif self._compiled:
            images = self._pipe.share_outputs()[0]
            decoded = [np.asarray(images[row]) for row in range(count)]
            _check_shapes(batch.rows, decoded)
            views = self._render(batch.rows, decoded, batch.table)
            del images
            self._pipe.release_outputs()
        elif self._stream is None:
            outputs = self._pipe.share_outputs()
            views = self._change([torch.from_numpy(np.asarray(out.as_tensor())) for out in outputs], batch)
            del outputs
            self._pipe.release_outputs()
        else:
            with torch.cuda.stream(self._stream):
                outputs = self._pipe.share_outputs(cuda_stream=self._stream)
                views = self._change([torch.from_dlpack(out.as_tensor()) for out in outputs], batch)
                event = self._stream.record_event()
                self._pipe.release_outputs()
        return RawBatch(views, targets, batch.key.epoch), event

    def _change(self, views: list[Tensor], batch: _Batch) -> list[Tensor]:
        """Colours changed, as upright (B, 3, S, S); always copies, because DALI uses its buffers again."""
        recipe = self._plan.recipe
        changed = (
            [view.clone() for view in views] if recipe is None else change_colours(views, batch.table, recipe)
        )
        return [_as_views(view, batch.rows) for view in changed]

    def _render(
        self, rows: Sequence[Encoded], images: Sequence[np.ndarray], table: np.ndarray
    ) -> list[Tensor]:
        """The views of decoded images, by compiled kernels that do not hold the interpreter's lock."""
        from lejepa_fast.data.backends.cpu_kernels import render_view

        sizes = self._plan.sizes
        recipe = self._plan.recipe
        kernel, threshold = (recipe.blur_kernel, recipe.solarize_threshold) if recipe else (1, 256)
        parameters = table.astype(np.float32)
        made = [torch.empty((len(images), 3, size, size), dtype=torch.uint8) for size in sizes]
        arrays = [view.numpy() for view in made]

        def render(row: int) -> None:
            image = _upright(images[row], rows[row].orientation)
            for v, out in enumerate(arrays):
                render_view(image, parameters[row, v], kernel, threshold, out[row])

        for _ in self._pool.map(render, range(len(images))):
            pass
        return made

    def _build(self) -> Any:
        from lejepa_fast.data.backends.dali_graph import decode_pipeline, view_pipeline

        options: dict[str, Any] = {
            "batch_size": self._batch_size,
            "num_threads": self._threads,
            "device_id": None if self._stream is None else self._stream.device.index,
            "prefetch_queue_depth": 1,  # the loader counts itself what is in flight
            "device": "cpu" if self._gpu is None else "gpu",
            "hw_decoder_load": self._hw_decoder_load,
        }
        if not self._compiled:
            options["sizes"] = self._plan.sizes
        try:
            pipe = (decode_pipeline if self._compiled else view_pipeline)(**options)
            pipe.build()
        except Exception as error:
            raise UsageError(
                f"DALI cannot build its pipeline: {dali_reason(error)}; "
                "use another build of DALI, or backend='torchvision'"
            ) from error
        _pipelines.add(pipe)
        return pipe


class _Pass:
    """One pass over the keys: a thread that makes batches and a short queue of finished ones."""

    def __init__(
        self, backend: DaliBackend, keys: Iterable[BatchKey], faults: FaultHandler, prefetch: int
    ) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(max(1, prefetch))
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(backend, iter(keys), faults), name="lejepa-dali"
        )
        self._thread.start()

    def stopped(self) -> bool:
        """Whether nobody wants further batches. The interpreter waits for this thread when it ends."""
        return self._stop.is_set() or not threading.main_thread().is_alive()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stop.set()
        self._thread.join()

    def _run(self, backend: DaliBackend, keys: Iterator[BatchKey], faults: FaultHandler) -> None:
        made = backend.produce(keys, faults, self)
        try:
            for item in made:
                self._put(item)
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            made.close()

    def _put(self, item: Any) -> None:
        while not self.stopped():
            try:
                self._queue.put(item, timeout=_PATIENCE)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[RawBatch]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_PATIENCE)
            except queue.Empty:
                if self._thread.is_alive() or not self._queue.empty():
                    continue
                raise RunError("the thread that drives DALI has ended without a word") from None
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            batch, event = item
            if event is not None:
                stream = torch.cuda.current_stream(batch.views[0].device)
                stream.wait_event(event)
                for view in batch.views:
                    view.record_stream(stream)
            yield batch
        raise RunError(ANOTHER_PASS)


def _check_shapes(rows: Sequence[Encoded], images: Sequence[np.ndarray]) -> None:
    """The windows were drawn for the sizes that the headers promise."""
    for row, image in zip(rows, images, strict=True):
        if image.shape != row.stored_shape:
            raise RuntimeError(
                f"image {row.index} is of shape {image.shape}, its header says {row.stored_shape}"
            )


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) pixels as they are to be seen, of those that are stored with this EXIF orientation."""
    if orientation == 1:
        return image
    turn = TURNS[orientation]
    if turn.transposed:
        image = image.transpose(1, 0, 2)
    image = image[:: -1 if turn.inverted else 1, :: -1 if turn.mirrored else 1]
    turned = np.empty(image.shape, np.uint8)
    for channel in range(3):  # in one go, four times as slow
        turned[..., channel] = image[..., channel]
    return turned


def _as_views(pixels: Tensor, rows: Sequence[Encoded]) -> Tensor:
    """(B, S, S, 3), of which transposed rows are turned, as (B, 3, S, S), which is then channels last."""
    turned = [number for number, row in enumerate(rows) if TURNS[row.orientation].transposed]
    if turned:
        pixels[turned] = pixels[turned].transpose(1, 2)
    return pixels.permute(0, 3, 1, 2)


def _compiled(views: str, *, on_gpu: bool) -> bool:
    """Whether compiled code makes the views, and not DALI's operators."""
    if views == "operators" or (views == "auto" and on_gpu):
        return False
    fault = "it works on the CPU only" if on_gpu else numba_fault()
    if fault and views == "numba":
        raise UsageError(f"dali_views 'numba': {fault}; or use 'operators' or 'auto'")
    return fault is None


def dali_reason(error: Exception) -> str:
    """The line of a DALI error that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("[") or "rror" in line]
    skip = ("Critical error", "Error in ", "Stacktrace", "[frame")
    telling = [line for line in telling if not line.startswith(skip)]
    return (telling or lines or [type(error).__name__])[0]
